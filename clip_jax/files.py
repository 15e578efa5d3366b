"""Files on disks and shares: their paths, writing that leaves all or nothing, JSON that people may have edited, locks,
and digests of what files are."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import resource
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from clip_jax.errors import UserError, one_line

_LOG = logging.getLogger(__name__)
RECORD = "record/metadata"
"""The file by which the folder of a run's checkpoint is known, see `clip_jax.checkpoints.record`."""
_URL = re.compile(r"[a-z0-9+]+://")
_JSON_NAMES = {dict: "an object", list: "a list", str: "a text", str | None: "a text or null", int: "a whole number"}


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return _URL.match(path) is not None


def local_path(given: str, path: str) -> Path:
    """Returns where something lies that is neither read from stores nor written to them.

    Args:
      given: as what the path was, such as `--workdir`.
      path: that was; may begin with `~`, which shells leave as it is behind a `=`.

    Raises:
      UserError: a URL, of which `Path` would make a folder `gs:` on each host.
    """
    if is_remote(path):
        raise UserError(
            f"{given}={path}: it must be on a disk, or on a share that every process sees (NFS, Filestore, a bucket "
            "mounted by gcsfuse), and is a URL"
        )
    return Path(os.path.expanduser(path))


def absolute(path: str) -> str:
    """Returns a local path from the root on, and a URL as it is."""
    return path if is_remote(path) else os.path.abspath(path)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yields another path to write to; what is there at the end is put in place whole, and is on disk before that.

    Where writing fails, nothing is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_appearing(folder: Path) -> Iterator[Path]:
    """Yields another folder to write into, which takes the name of `folder` at the end, whole.

    Where writing fails, nothing is left.

    Raises:
      OSError: it cannot be made, or `folder` has come meanwhile and holds something.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        yield partial
        partial.rename(folder)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, as `folder_appearing`, for one that a user has named.

    Raises:
      UserError: it exists, or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists, and nothing is written over; name another folder, or remove it")
    try:
        with folder_appearing(folder) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {one_line(error)}; nothing was kept") from error


def json_object(content: bytes, shape: dict[Any, Any] | None = None) -> dict[str, Any]:
    """Returns the object that a JSON file holds, with a byte order mark before it or without.

    Args:
      content: of the file.
      shape: see `check_shape`.

    Raises:
      ValueError: it is no JSON, or does not hold what it must.
    """
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    check_shape(values, shape or {})
    return values


def check_shape(value: Any, shape: Any, path: str = "it") -> None:
    """Checks what JSON gave.

    Args:
      value: to be checked.
      shape: a type, or a union of them; for an object, the shape of each key that must be there, or of all that are,
        {...: shape}; for a list, a list of the shape of its items.
      path: to the value, for the message.

    Raises:
      ValueError: something is missing, or of another type.
    """
    kind = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kind):
        raise ValueError(f"{path} is {value!r:.50}, and must be {_JSON_NAMES.get(kind, kind)}")
    if isinstance(shape, dict):
        for key, inner in (dict.fromkeys(value, shape[...]) if ... in shape else shape).items():
            if key not in value:
                raise ValueError(f"{path} has no {key!r}")
            check_shape(value[key], inner, f"{path}[{key!r}]")
    elif isinstance(shape, list):
        for number, item in enumerate(value):
            check_shape(item, shape[0], f"{path}[{number}]")


def sweep(folder: Path, *, seconds: float = 0.0) -> None:
    """Removes what processes that are gone had begun to write by `appearing`, and not touched for so many seconds."""
    for left_over in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if not seconds or time.time() - left_over.stat().st_mtime > seconds:
                left_over.unlink()


def sync(path: Path) -> None:
    """Returns when a local file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps_in(folder: Path) -> list[int]:
    """Returns the numbers that are names of a folder's directories, largest first; whole checkpoints or not."""
    names = [path.name for path in folder.glob("*") if path.is_dir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def take_lock(file: IO[str], without: str, *, wait: bool = False) -> None:
    """Keeps other processes out of what a file stands for, until it is closed or its last holder is gone.

    Args:
      file: in the folder that is kept.
      without: what to say where its file system has no locks, such as Lustre's without the option `flock`.
      wait: for another process that has it.

    Raises:
      BlockingIOError: another process has it, and it is not waited for.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        _LOG.warning("%s has no locks (%s): %s", Path(file.name).parent, error.strerror, without)


@contextlib.contextmanager
def alone(path: Path, *, busy: str, without: str, mode: str = "w") -> Iterator[int]:
    """Keeps other processes out of what a file stands for, while the `with` lasts; yields the file's descriptor.

    Args:
      path: of the file, which is made unless `mode` is another.
      busy: what to say where another process has it.
      without: as for `take_lock`.
      mode: in which it is opened, for writing.

    Raises:
      UserError: another process has it.
      OSError: it cannot be opened.
    """
    with path.open(mode) as file:
        try:
            take_lock(file, without)
        except BlockingIOError:
            raise UserError(busy) from None
        yield file.fileno()


def allow_open_files(number: int) -> None:
    """Lets this process open so many files more than its soft limit says, 1,024 on most systems; as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + number if hard == resource.RLIM_INFINITY else min(soft + number, hard)
        with contextlib.suppress(ValueError, OSError):  # a system may have a limit below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def digest(*values: object) -> str:
    """Returns what changes when one of the values does: 32 hexadecimal digits."""
    return hashlib.sha256(repr(tuple(map(str, values))).encode()).hexdigest()[:32]


def named_after(*texts: str) -> str:
    """Returns a file's name for texts such as paths, in whatever encoding these are: 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def state_of(root: Path, files: Iterable[str]) -> str:
    """Returns a digest of local files' names, sizes and times of change; of one that is not there, of its name."""
    return digest(*((file, *_size_and_time(root / file)) for file in files))


def _size_and_time(path: Path) -> tuple[int, ...]:
    try:
        about = path.stat()
        return about.st_size, about.st_mtime_ns
    except OSError:
        return ()
