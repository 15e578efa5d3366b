"""Bytes of files, local or remote, by range; remote reads are tried again until a deadline.

A remote file that was given up is not asked for during the next minute: it fails at once, for the same reason. Then one
try decides. So a shard that stays away costs the deadline once, not once for each of its blocks.

Local paths are read with `pread`, once: shares try again themselves. Everything else (`gs://`, `s3://`, `http://`, …)
goes through fsspec; the Hugging Face Hub's files (`hf://datasets/owner/name/file`) by HTTP, whose ranges are exact.
"""

import errno
import functools
import itertools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from clip_jax.errors import OutageError, UserError, did_you_mean, one_line
from clip_jax.files import appearing, is_remote

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0
_SILENCE_S = 30
_GIVEN_UP_S = 60.0
_BEYOND_END = 416
_NEVER_RETRIED = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)
# Of botocore, which need not be there. Cloud machines get their credentials from a service, and many processes that ask
# it at once may be told of none: they ask again, but not for long.
_MISTAKES = frozenset({"ParamValidationError", "PartialCredentialsError", "ProfileNotFound"})
_NO_CREDENTIALS, _CREDENTIALS_S = "NoCredentialsError", 10.0
_SESSION = {"trust_env": True}  # aiohttp's: through HTTPS_PROXY and its like, as other libraries do unasked
_HUB = "hf://"
_HUB_FILE = re.compile(r"hf://(?:(dataset|space)s/)?([^/]+/[^/@]+)(?:@([^/]+))?/(.+)")
_COUNTING = threading.Lock()
_requests = 0


class StorageError(Exception):
    """A file that is not there or that nobody may read; the message names it and says why."""


FAILURES = (StorageError, OutageError)
"""What reading and writing raise: what is the file's fault, and what is its store's."""

OUTAGES = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
)
"""Numbers of the errors by which a share (NFS, gcsfuse) says that its server did not answer."""


class Stat(NamedTuple):
    """What a file was when it was looked at.

    Attributes:
      size: in bytes.
      tag: changes when the content does: the store's ETag, else the time of the last change.
    """

    size: int
    tag: str


class _GivenUp(NamedTuple):
    """When a file that was given up is asked for again, and why it was."""

    until: float
    reason: str


class Storage:
    """Reads files by range.

    Threads may share one.

    Args:
      retry_s: seconds for which a remote read is tried again after errors.
    """

    def __init__(self, retry_s: float = 300.0) -> None:
        self._retry_s = retry_s
        self._stopped = threading.Event()
        self._given_up: dict[str, _GivenUp] = {}

    def read(self, path: str, start: int, length: int) -> bytes:
        """Returns `length` bytes from `start`; fewer where the file ends before.

        Raises:
          StorageError: it is not there or cannot be read.
          OutageError: its store did not answer for `retry_s`, or lately did not; or its share did not.
        """
        if not is_remote(path):
            return _local(path, lambda: _read_range(path, start, length))
        if not length:
            return b""
        system, address = _located(path)

        def ask() -> bytes:
            try:
                return system.cat_file(address, start=start, end=start + length)
            except Exception as error:
                if _status(error) == _BEYOND_END:
                    return b""
                raise

        content = self._retried(path, ask)
        if len(content) <= length:
            return content
        _say_no_ranges("/".join(address.split("/")[:3]))
        return content[start:][:length]

    def stat(self, path: str) -> Stat:
        """Returns size and tag.

        Raises:
          StorageError, OutageError: as `read`.
        """
        if not is_remote(path):
            found = _local(path, lambda: os.stat(path))
            return Stat(found.st_size, str(found.st_mtime_ns))
        system, address = _located(path)
        if address.startswith("http"):
            return self._retried(path, lambda: _http_stat(system, address))
        return _stat_of(self._retried(path, lambda: system.info(address)))

    def read_whole(self, path: str) -> bytes:
        """Returns a file.

        Raises:
          StorageError, OutageError: as `read`.
        """
        if not is_remote(path):
            return _local(path, lambda: Path(path).read_bytes())
        system, address = _located(path)
        return self._retried(path, lambda: system.cat_file(address))

    def write_whole(self, path: str, content: bytes) -> None:
        """Writes a file: whole, or not at all.

        Raises:
          StorageError, OutageError: it cannot be written.
        """
        if is_remote(path):
            system, address = _located(path)
            self._retried(path, lambda: system.pipe_file(address, content))  # stores put objects whole
            return

        def write() -> None:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with appearing(Path(path)) as temporary:
                temporary.write_bytes(content)

        _local(path, write)

    def close(self) -> None:
        """Ends the tries of reads that are under way; later reads are tried anew."""
        stopped, self._stopped = self._stopped, threading.Event()
        stopped.set()

    def __getstate__(self) -> dict[str, Any]:
        return {"retry_s": self._retry_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _retried(self, path: str, call: Callable[[], T]) -> T:
        given_up, stopped = self._given_up.get(path), self._stopped
        if given_up and time.monotonic() < given_up.until:
            raise OutageError(given_up.reason)
        began = time.monotonic()
        deadline = began + (0 if given_up else self._retry_s)
        for attempt in itertools.count():
            _count_request()
            try:
                result = call()
                self._given_up.pop(path, None)
                return result
            except Exception as error:
                if not _may_pass(error):
                    raise StorageError(f"{path}: {one_line(error)}") from None
                # Full jitter (Brooker, 2015): readers that failed together must not come back together.
                delay = random.uniform(0, min(_LONGEST_DELAY, _FIRST_DELAY * 2**attempt))
                if type(error).__name__ == _NO_CREDENTIALS:
                    deadline = min(deadline, began + _CREDENTIALS_S)
                late = time.monotonic() + delay > deadline
                if late or stopped.wait(delay):
                    reason = f"{path}: {one_line(error)} (after {attempt + 1} tries)"
                    if late:
                        self._given_up[path] = _GivenUp(time.monotonic() + _GIVEN_UP_S, reason)
                    raise OutageError(reason) from None
                _LOG.debug("%s: %s; trying again", path, one_line(error))
        raise AssertionError("unreachable")


def file_system(path: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL or a local folder, and the path in it.

    Raises:
      UserError: a protocol that nobody knows, or whose package is not installed.
    """
    system = _system(path if is_remote(path) else f"file://{path}")
    return system, system._strip_protocol(path)


def matches(pattern: str) -> list[str]:
    """Returns the URLs that a URL with `*`, `?` or `[` stands for.

    Raises:
      UserError: the store cannot be asked; an OutageError where it does not answer.
    """
    protocol = pattern.partition("://")[0]
    try:
        listed = _system(pattern).glob(pattern)
    except UserError:
        raise
    except Exception as error:  # stores have their own
        kind = OutageError if _may_pass(error) else UserError
        raise kind(f"{pattern} cannot be listed: {one_line(error)}") from None
    return [path if is_remote(path) else f"{protocol}://{path}" for path in listed]


def find(system: Any, root: str) -> dict[str, Stat]:
    """Returns the files below a path of a file system, by their paths from there; a file itself, as ""."""
    found = system.find(root, detail=True).items()
    return {
        path.removeprefix(root).lstrip("/"): _stat_of(info or system.info(path))
        for path, info in found
        if not path.endswith("/")
    }


def bring(system: Any, files: Mapping[str, Path]) -> None:
    """Copies files of a file system to a disk, and makes the folders that they lie in."""
    for target in files.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    system.get([*files], [*map(str, files.values())])


def requests_made() -> int:
    """Returns how many requests this process has made to remote stores, those that failed too."""
    return _requests


@functools.cache
def _say_no_ranges(server: str) -> None:
    _LOG.warning("%s sends whole files where a part is asked for: copy them to a disk, or to another server", server)


def _count_request() -> None:
    global _requests
    with _COUNTING:
        _requests += 1


def _located(path: str) -> tuple[Any, str]:
    """Returns what reads a URL, and under which name it has the file.

    Raises:
      UserError: as `_system`; or a URL of the Hugging Face Hub that names no file.
    """
    if not path.startswith(_HUB):
        return _system(path), path
    found = _HUB_FILE.fullmatch(path)
    if found is None:
        raise UserError(f"{path} names no file of the Hugging Face Hub; write hf://datasets/owner/name/file")
    from huggingface_hub import hf_hub_url

    kind, repository, revision, file = found.groups()
    return _hub(), hf_hub_url(repository, file, repo_type=kind, revision=unquote(revision or "main"))


def _system(path: str) -> Any:
    """Returns what reads a URL.

    Raises:
      UserError: a protocol that nobody knows, or whose package is not installed.
    """
    protocol = path.partition("://")[0]
    try:
        return _file_system(protocol)
    except ImportError as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    except ValueError:
        import fsspec

        raise UserError(f"{path}: unknown protocol{did_you_mean(protocol, fsspec.available_protocols())}") from None


@functools.cache
def _file_system(protocol: str) -> Any:
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}  # a listing kept would hide that a shard changed
    if protocol == "file":
        options["auto_mkdir"] = True
    if protocol in ("gs", "gcs"):
        options["session_kwargs"] = _SESSION
    return _http() if protocol in ("http", "https") else fsspec.filesystem(protocol, **options)


@functools.cache
def _hub() -> Any:
    """Returns what reads files of the Hugging Face Hub, as the user who is logged in there."""
    from huggingface_hub.utils import build_hf_headers

    return _http(build_hf_headers())


def _http(headers: Mapping[str, str] | None = None) -> Any:
    import aiohttp
    import fsspec

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENCE_S)
    plain = {"Accept-Encoding": "identity"}  # of what is compressed on the way, neither sizes nor ranges are the file's
    options = {"timeout": timeout, "headers": plain | dict(headers or {}), **_SESSION}
    return fsspec.filesystem("http", use_listings_cache=False, client_kwargs=options)


def _stat_of(info: Mapping[str, Any]) -> Stat:
    tags = (info.get(key) for key in ("ETag", "etag", "md5Hash", "mtime", "updated", "LastModified", "created"))
    return Stat(int(info.get("size") or 0), str(next((tag for tag in tags if tag), "")))


def _http_stat(system: Any, url: str) -> Stat:
    """Asks for the first byte: fsspec's own `info` takes any failure for a file that is not there."""
    from fsspec.asyn import sync

    async def ask() -> Stat:
        session = await system.set_session()
        async with session.get(url, headers={"Range": "bytes=0-0"}) as answer:
            answer.raise_for_status()
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
            size = whole if whole.isdecimal() else answer.headers.get("Content-Length")
            if size is None:
                raise FileNotFoundError("its server does not say how many bytes it has; copy it to a disk")
            return Stat(int(size), answer.headers.get("ETag") or answer.headers.get("Last-Modified", ""))

    answered: Any = sync(system.loop, ask)
    return answered


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed: not where the server says that the request itself is wrong, or not known; nor
    where it was not asked, for a mistake in credentials or in the name."""
    if isinstance(error, _NEVER_RETRIED) or type(error).__name__ in _MISTAKES:
        return False
    status = _status(error)
    return status in (408, 425, 429) or not (400 <= status < 500 or status == 501)


def _status(error: BaseException) -> int:
    """Returns the HTTP status behind an error of aiohttp, gcsfs or s3fs (which keeps botocore's as the cause), or 0."""
    answer = getattr(error.__cause__, "response", {})
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(answer, dict):
        status = status or answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else 0


def _read_range(path: str, start: int, length: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    parts: list[bytes] = []
    try:
        while length and (part := os.pread(descriptor, length, start)):  # of under 2 GiB, whatever is asked for
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _local(path: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except OSError as error:
        kind = OutageError if error.errno in OUTAGES else StorageError
        raise kind(f"{path}: {error.strerror}") from None
