"""Prepares this package's own datasets with TFDS, in a process of its own.

Writing ArrayRecord through TFDS needs TensorFlow, training does not; so a build is a child process,
`python -m clip_jax.data.build digits --data-dir=DIR`, in which TensorFlow sees no accelerator.
"""

import argparse
import contextlib
import importlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

from clip_jax.data import digits
from clip_jax.data.tfds_files import FILE_FORMAT
from clip_jax.data.tfds_source import OWN_DATASETS, datasets_root, find_dataset
from clip_jax.errors import UserError, did_you_mean

_BUILDERS = {"digits": ("clip_jax.data.digits.builder", "Digits", digits.VERSION)}
_ERROR_LINES = 3


def build_dataset(name: str, data_dir: str) -> Path:
    """Prepares a dataset of ours in ArrayRecord files, unless it is there, and returns its folder.

    TFDS writes to a folder with another name and renames it at the end: an interrupted build leaves nothing that can be
    taken for a dataset, and of two builds at the same time one wins and both succeed.

    Args:
      name: such as `digits`.
      data_dir: folder of prepared datasets; empty means TFDS's default.

    Raises:
      UserError: no such dataset of ours, or the build failed; the line ends with the build's last lines.
    """
    dataset = f"{name}:{_entry(name)[2]}"
    with contextlib.suppress(UserError):
        return find_dataset(dataset, data_dir)
    root = datasets_root(data_dir)
    print(f"preparing the dataset {name} in {root} (once, some seconds)", file=sys.stderr, flush=True)
    _build_in_child(name, root)
    return find_dataset(dataset, data_dir)


def ensure_dataset(name: str, data_dir: str) -> Path:
    """Returns the folder of any prepared dataset; one of ours that is not there is built first.

    Args:
      name: TFDS name, such as `digits` or `my_pairs:1.0.0`.
      data_dir: folder of prepared datasets; empty means TFDS's default.

    Raises:
      UserError: it is not there and is not one of ours, or its build failed; the line says why.
    """
    own = name.partition(":")[0]
    if own in OWN_DATASETS:
        build_dataset(own, data_dir)
    return find_dataset(name, data_dir)


def main(arguments: list[str] | None = None) -> int:
    """The child process: builds one dataset, prints one line, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.build", description="Prepare a dataset of ours.")
    parser.add_argument("name", help=f"one of {', '.join(OWN_DATASETS)}")
    parser.add_argument("--data-dir", default="", help="folder of prepared datasets (default: TFDS's)")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where TFDS announces what it does
            _build_here(options.name, datasets_root(options.data_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.name} is in {datasets_root(options.data_dir)} ({time.monotonic() - started:.0f} s)")
    return 0


def _build_in_child(name: str, root: Path) -> None:
    command = [sys.executable, "-m", "clip_jax.data.build", name, "--data-dir", str(root)]
    # The child must find the package that is running, wherever it was started from.
    search = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " | ".join([line.strip() for line in done.stderr.splitlines() if line.strip()][-_ERROR_LINES:])
        raise UserError(f"preparing {name!r} in {root} failed (exit code {done.returncode}): {last}")


def _build_here(name: str, root: Path) -> None:
    """Builds with TensorFlow in this process."""
    module, builder, version = _entry(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {root}: {error.strerror}") from None
    try:
        load_tensorflow_quietly()
        builder_class = getattr(importlib.import_module(module), builder)
    except ModuleNotFoundError as error:
        raise UserError(
            f"preparing {name!r} needs the module {error.name}; install what builds datasets with: "
            "pip install tensorflow tensorflow-datasets importlib_resources scikit-learn"
        ) from None
    try:
        builder_class(data_dir=str(root)).download_and_prepare(file_format=FILE_FORMAT)
    except OSError:
        # Another process may have renamed the same dataset into place first.
        with contextlib.suppress(UserError):
            find_dataset(f"{name}:{version}", str(root))
            return
        raise


def load_tensorflow_quietly() -> None:
    """Imports TensorFlow, with no accelerator in sight and no progress bars of TFDS's; for processes that only write
    datasets."""
    # Before the import: TensorFlow would reserve the GPU's memory, and speaks of devices and instruction sets.
    os.environ.update(CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0")
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from absl import logging

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)


def _entry(name: str) -> tuple[str, str, str]:
    """Returns (module, class, version) of the builder of a dataset of ours."""
    if name in _BUILDERS:
        return _BUILDERS[name]
    guess = did_you_mean(name, _BUILDERS)
    raise UserError(
        f"{name!r} is not a dataset that clip-jax builds{guess} (it builds {', '.join(_BUILDERS)}; other datasets are "
        "prepared with TFDS itself)"
    )


if __name__ == "__main__":
    sys.exit(main())
