"""What several commands do with their flags."""

import argparse
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.files import local_path

MODEL = (
    "a file, a folder, a run's workdir or one of its checkpoints, a URL of one of these, a model's name or "
    "hf-hub:owner/name"
)


def add_path(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Adds a path that cannot be a URL."""
    parser.add_argument(name, type=functools.partial(local_path, name), **options)


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Refuses numbers that are not positive and finite; what was not given is None."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}={value}: it must be positive")


def check_mfu(arguments: argparse.Namespace) -> None:
    """Refuses what is no share of a peak."""
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu={arguments.mfu}: it must be a share of the peak, such as 0.4")


def number(flag: str, text: str) -> float:
    """Returns one of the numbers that a flag holds."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{flag} holds {text!r}, which is no number")
    return found


def read_lines(path: Path) -> list[str]:
    """Returns a file's lines that hold something, at least one, without what surrounds them."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"{path} holds nothing; there must be a text on each line")
    return found


def make_folder_of(file: Path | None) -> None:
    """Makes the folder of what will be drawn, so that it cannot fail after the work."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {file.parent}: {error.strerror}") from None


@contextmanager
def extra(name: str, *modules: str) -> Iterator[None]:
    """Says which extra brings a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        raise UserError(
            f"this needs the package {error.name}; install it with: pip install '.[{name}]', in a clone of this project"
        ) from None
