"""What a checkpoint says of itself: a checksum for every leaf and every other item, by which it is believed or not.

Orbax restores a flipped bit as a wrong weight without a word.
"""

import functools
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import flax
import jax

import clip_jax
from clip_jax.checkpoints.checksum import checksums, describe_leaves
from clip_jax.config import RunConfig
from clip_jax.data.images import preprocess_of
from clip_jax.errors import UserError, one_line
from clip_jax.training.state import TrainState

JSON_ITEMS = ("data", "config", "metadata")
ITEMS = ("state", *JSON_ITEMS, "record")
METRICS = "metrics"  # Orbax's own item, written where a metric chooses what is kept
_NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
T = TypeVar("T")


class DamagedError(Exception):
    """A checkpoint that is not whole, or not what was written."""


class IncompleteError(DamagedError):
    """A checkpoint of which parts are missing, as a deletion that was killed leaves it."""


class Contents(NamedTuple):
    """All of a checkpoint but its arrays.

    Attributes:
      data: the data position, `position`, and `skips`, see `Restored`.
      config: the config that it was written with, as nested dicts.
      metadata: what a reader of the weights must know: `preprocess`, `tokenizer`, versions; and `data`, what identified
        the training data.
      leaves: path to shape, dtype and checksum.
    """

    data: dict[str, Any]
    config: dict[str, Any]
    metadata: dict[str, Any]
    leaves: dict[str, dict[str, Any]]


def read_contents(folder: Path) -> Contents:
    """Reads all of a checkpoint but its arrays; writes nothing.

    Raises:
      DamagedError: a part is missing, or is not what was written.
    """
    if missing := [item for item in ITEMS if not (folder / item).is_dir()]:
        raise IncompleteError(f"lacks {', '.join(missing)}")
    record = judged(lambda: dict(_read_json(folder / "record")), folder)
    leaves, sums = record.get("leaves", {}), record.get("items", {})
    if record.get("sha256") != _digest([leaves, sums]):
        raise DamagedError("has changed in its record")
    items = {name: judged(lambda name=name: _read_json(folder / name), folder) for name in sums}
    if changed := [name for name, item in items.items() if _digest(item) != sums[name]]:
        raise DamagedError(f"has changed in {', '.join(changed)}")
    return Contents(**{name: items[name] for name in JSON_ITEMS}, leaves=leaves)


def make_record(state: TrainState, items: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the leaves and the items must be when they are read, and a checksum of itself."""
    sums = checksums(state)
    leaves = {path: leaf | {"sum": sums[path]} for path, leaf in describe_leaves(state).items()}
    digests = {name: _digest(item) for name, item in items.items()}
    return {"leaves": leaves, "items": digests, "sha256": _digest([leaves, digests])}


def _digest(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON holds it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(folder: Path) -> Any:
    return json.loads((folder / (METRICS if folder.name == METRICS else "metadata")).read_text())


def judged(read: Callable[[], T], where: Path) -> T:
    """Returns what `read` gives; its failure is damage, unless its cause lies outside of the files.

    Orbax, TensorStore and JSON raise classes of many kinds, `Exception` itself among them.
    """
    try:
        return read()
    except Exception as error:
        outside = isinstance(error, (MemoryError, PermissionError, jax.errors.JaxRuntimeError))
        if outside or any(word in str(error) for word in _NOT_DAMAGE):
            raise UserError(f"{where} cannot be read: {reason(error)}; it is left as it is") from error
        raise DamagedError(f"cannot be read: {reason(error)}") from error


def check_sums(found: Mapping[str, str], leaves: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises a DamagedError that names the leaves whose checksums are not those of the record."""
    changed = [path for path, checksum in found.items() if leaves.get(path, {}).get("sum") != checksum]
    if changed:
        more = f" and {len(changed) - 3} more leaves" if len(changed) > 3 else ""
        raise DamagedError(f"has changed in {', '.join(changed[:3])}{more}")


def averages_statistics(leaves: Iterable[str]) -> bool:
    """Whether a checkpoint's average holds BatchNorm's statistics; those of older versions do not."""
    return any(path.startswith("ema/batch_stats/") for path in leaves)


def check_same_leaves(leaves: Mapping[str, Mapping[str, Any]], target: TrainState, where: Path) -> None:
    """Raises a UserError where a whole checkpoint is of another state: Orbax would cast what it can."""
    expected = describe_leaves(target)
    saved = {path: {key: leaf[key] for key in ("shape", "dtype")} for path, leaf in leaves.items()}
    for path in [*expected, *saved]:
        if saved.get(path) != expected.get(path):
            raise UserError(
                f"{where} holds another state than this run's: {path} is {saved.get(path)} there and "
                f"{expected.get(path)} here; go on with what the run began with"
            )


def reason(error: BaseException) -> str:
    """Returns the operating system's words where there are any, in what was raised first; else what was raised.

    TensorStore puts the system's code into its message; Orbax raises over it that others wait for this process.
    """
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    for each in reversed(chain):
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
        if code := re.search(r"os_error_code='(\d+)'", str(each)):
            return os.strerror(int(code[1]))
    if any("Barrier timed out" in str(each) for each in chain):
        return "another process did not write its part within config.checkpoint.timeout_s"
    return one_line(error).partition(" See full TensorStore")[0][:200]


def make_metadata(config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the weights alone must know."""
    return {
        "activation": config.model.activation,
        "preprocess": preprocess_of(config.model, config.data).to_dict(),
        "tokenizer": "clip",
        "data": data,
        "git_revision": _git_revision(),
        "versions": {"clip_jax": clip_jax.__version__, "jax": jax.__version__, "flax": flax.__version__},
    }


@functools.cache
def _git_revision() -> str | None:
    """Returns the commit of this package's checkout; None where it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
