"""Eight simulated devices, one compilation cache, and shapes checked at run time.

All must be set before JAX or clip_jax is imported.
"""

import atexit
import os
import shutil
import tempfile

if "CLIP_JAX_TEST_CACHE" not in os.environ:  # the first process of a run; its workers and subprocesses share the folder
    os.environ["CLIP_JAX_TEST_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["CLIP_JAX_TEST_CACHE"], ignore_errors=True)
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxtyping import install_import_hook

_HOOK = install_import_hook("clip_jax", "beartype.beartype")
pytest_plugins = ["data_fixtures", "search_fixtures"]
