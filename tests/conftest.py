"""Eight simulated devices, programs compiled quickly and kept, and shapes checked at run time.

All must be set before JAX or clip_jax is imported. Compiling is most of the tests' work, and what is compiled runs for
milliseconds: so code is generated without LLVM's optimizations and, where JAX still has them, by XLA's older emitters,
at a quarter of the time. What XLA makes of a program before (sharding, collectives) is the same.
JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as for a user, and the long proofs run so.
"""

import atexit
import gc
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
from devices import xla_flags

if "CLIP_JAX_TEST_CACHE" not in os.environ:  # the first process of a run; its workers and subprocesses share the folder
    os.environ["CLIP_JAX_TEST_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["CLIP_JAX_TEST_CACHE"], ignore_errors=True)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = xla_flags(devices=8)
os.environ["JAX_PLATFORMS"] = "cpu"

from hypothesis import settings
from jaxtyping import install_import_hook

gc.set_threshold(200_000)  # tracing makes many objects and little garbage
settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
settings.load_profile("untimed")
_HOOK = install_import_hook("clip_jax", "beartype.beartype")
pytest_plugins = ["data_fixtures", "search_fixtures"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs clip-jax in this process, whose devices are simulated ones too; returns exit code, stdout and stderr."""
    from clip_jax import cli, command_line

    def run(*arguments):
        code = 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the load_module")  # ml_collections reads config files with it
            try:
                cli.main(arguments)
            except SystemExit as ended:
                code = ended.code
        return code, *capsys.readouterr()

    monkeypatch.setattr(command_line, "simulate_devices", lambda count: None)
    monkeypatch.chdir(Path(__file__).parent.parent)
    return run
