"""Where the samples of a tar shard lie, found by its headers alone.

A sample is consecutive members that share a key: the name up to the first dot of its last part, as in webdataset. Only
regular files count; links and devices are passed over, and so are names without an extension or without anything before
it, such as the `._0.jpg` that macOS puts before each `0.jpg`. Nothing is ever unpacked, so that names are only names.
Headers: POSIX.1-2017 `pax`, "ustar" and GNU's extensions for long names and sizes.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from clip_jax.data.storage import Stat, Storage, StorageError
from clip_jax.files import absolute, is_remote, named_after

_LOG = logging.getLogger(__name__)

BLOCK = 512
IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, xz, zstd: no tar begins so, nor any name
_FORMAT = 2
_CHUNK = 8 << 20
_LONGEST_EXTENSION, _LONGEST_NUMBER = 1 << 20, 20

PARTS = ("image", "text", "json")
SAMPLE = np.dtype([("start", "<u8")] + [(name, "<u4") for part in PARTS for name in (part, f"{part}_size")])
"""A sample: where its first header begins, and where its parts' data begin after that (0: there is none), and sizes."""


class ReadAt(NamedTuple):
    """A file that headers are read from.

    Attributes:
      read: (offset, length) to bytes.
      size: of the file.
    """

    read: Callable[[int, int], bytes]
    size: int


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
      name: with its folders.
      header: where its first header begins.
      data: where its content begins.
      size: of the content.
    """

    name: str
    header: int
    data: int
    size: int


class ShardIndex(NamedTuple):
    """The samples of a shard.

    Attributes:
      samples: SAMPLE [n].
      keys: of the samples, as `key_number` has them; uint64 [n].
      stat: of the shard when it was indexed.
    """

    samples: np.ndarray
    keys: np.ndarray
    stat: Stat

    def to_bytes(self) -> bytes:
        """Returns the sidecar file."""
        about = json.dumps({"format": _FORMAT, "size": self.stat.size, "tag": self.stat.tag})
        buffer = io.BytesIO()
        np.savez(buffer, samples=self.samples, keys=self.keys, about=np.frombuffer(about.encode(), np.uint8))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "ShardIndex":
        """Reads a sidecar.

        Raises:
          ValueError: it is none, or of another format.
        """
        try:
            arrays = np.load(io.BytesIO(content), allow_pickle=False)
            about = json.loads(arrays["about"].tobytes())
            samples, keys = arrays["samples"], arrays["keys"]
            known = about["format"] == _FORMAT and samples.dtype == SAMPLE and keys.shape == samples.shape
            stat = Stat(about["size"], about["tag"])
        except Exception as error:
            raise ValueError(str(error)) from None
        if not known:
            raise ValueError("another format")
        return cls(samples, keys, stat)


class Sidecars:
    """Indexes of shards, kept in a folder; what is missing or out of date is made.

    Args:
      storage: reads shards and sidecars.
      folder: of the sidecars; may be remote, so that all processes share them.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder, self._warned = storage, folder, False

    def get(self, path: str) -> ShardIndex:
        """Returns a shard's index as of now.

        Raises:
          StorageError: the shard cannot be read.
        """
        stat = self._storage.stat(path)
        kept = self._kept(path)
        return kept if kept is not None and kept.stat == stat else self._make(path, stat)

    def _make(self, path: str, stat: Stat) -> ShardIndex:
        index = ShardIndex(*index_samples(members(read_at(self._storage, path, stat.size))), stat)
        self.keep(self.path(path), index.to_bytes())
        return index

    def keep(self, file: str, content: bytes) -> None:
        """Writes a file that saves looking again; where that fails, as on a full disk, a warning says so once."""
        try:
            self._storage.write_whole(file, content)
        except StorageError as error:
            warned, self._warned = self._warned, True
            if not warned:
                _LOG.warning("%s: every process looks into shards again; name another config.data.index_dir", error)

    def path(self, shard: str) -> str:
        """Returns where the sidecar of a shard is kept."""
        return f"{self._folder.rstrip('/')}/{named_after(absolute(shard))}.npz"

    def _kept(self, path: str) -> ShardIndex | None:
        try:
            return ShardIndex.from_bytes(self._storage.read_whole(self.path(path)))
        except (StorageError, ValueError):
            return None


def read_at(storage: Storage, path: str, size: int, *, called: str = "") -> ReadAt:
    """Returns a shard as `members` reads it: locally from header to header, remotely in large pieces, one after
    another.

    Args:
      storage: reads it.
      path: of the shard.
      size: in bytes.
      called: what to call it in messages; empty means by its path.

    Raises:
      StorageError: it is empty, compressed as a whole or no tar at all, or cannot be read.
    """
    chunk: dict[str, Any] = {"start": 0, "bytes": b""}

    def read(offset: int, length: int) -> bytes:
        if not is_remote(path):
            return storage.read(path, offset, length)
        if not chunk["start"] <= offset <= offset + length <= chunk["start"] + len(chunk["bytes"]):
            wanted = min(max(length, _CHUNK), size - offset)
            chunk.update(start=offset, bytes=storage.read(path, offset, max(wanted, 0)))
        begin = offset - chunk["start"]
        return chunk["bytes"][begin : begin + length]

    called = called or path
    if not size:
        raise StorageError(f"{called} is empty (0 bytes), which no tar is")
    file, start = ReadAt(read, size), read(0, BLOCK)
    if start.startswith(_COMPRESSED):
        raise StorageError(f"{called} is compressed as a whole, so that no sample can be read alone; decompress it")
    # A pointer of Git LFS, a page that asks to log in: taken for a tar without samples, they would be missed by nobody.
    if start.strip(b"\0") and header_size(start) is None and next(members(file), None) is None:
        raise StorageError(f"{called} is no tar; it begins with {start[:16]!r}")
    return file


def members(file: ReadAt) -> Iterator[Member]:
    """Yields the regular files of a tar in order; after a damaged header, it goes on at the next one that is whole.

    Raises:
      StorageError: the file cannot be read.
    """
    offset, first, pax = 0, None, {}
    while offset + BLOCK <= file.size:
        header = file.read(offset, BLOCK)
        if len(header) < BLOCK or not header.strip(b"\0"):
            return
        size = header_size(header)
        if size is None:
            offset, first, pax = offset + BLOCK, None, {}
            continue
        begin, data, kind = offset if first is None else first, offset + BLOCK, header[156:157]
        if kind in b"xLKg" and size <= _LONGEST_EXTENSION:
            pax |= _extension(kind, file.read(data, size))
            offset, first = data + _padded(size), begin
            continue
        # Links, devices and folders have no content, whatever size they state.
        size = 0 if kind in b"123456" else _decimal(pax.get("size", ""), size)
        if kind in (b"0", b"\0", b"7"):
            yield Member(pax.get("path") or _name(header), begin, data, size)
        offset, first, pax = data + _padded(size), None, {}


def index_samples(files: Iterator[Member]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples, SAMPLE [n], that members in order make up, and their keys, see `key_number`.

    A second image, text or JSON of a key begins another sample.
    """
    rows: list[dict[str, int]] = []
    keys: list[int] = []
    current: str | None = None
    for member in files:
        name, _, extension = member.name.rpartition("/")[2].partition(".")
        if not (name and extension):
            continue
        extension = extension.lower()
        part = "image" if extension in IMAGES else {"txt": "text", "json": "json"}.get(extension)
        key = sample_key(member.name)
        if part is None:
            if key != current:
                current = None
            continue
        if key != current or part in rows[-1]:
            rows.append({"start": member.header})
            keys.append(key_number(key))
            current = key
        rows[-1] |= {part: member.data - rows[-1]["start"], f"{part}_size": member.size}
    limit = np.iinfo(np.uint32).max
    columns = {name: [row.get(name, 0) for row in rows] for name in SAMPLE.names or ()}
    samples = np.zeros(len(rows), SAMPLE)
    for name, values in columns.items():
        samples[name] = values if name == "start" else [min(value, limit) for value in values]
    return samples, np.asarray(keys, np.uint64)


def key_number(key: str) -> int:
    """Returns 64 bits of a key's hash: keys of any length in 8 bytes each, enough to tell those of a shard apart."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def sample_key(name: str) -> str:
    """Returns a member's name up to the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def header_size(header: bytes) -> int | None:
    """Returns the size that a header states, or None where its checksum or its numbers are wrong."""
    stated = _number(header[148:156])
    if stated is None or stated != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        return None
    return _number(header[124:136])


def _number(field: bytes) -> int | None:
    """Returns a number in octal digits or, GNU's way, in base 256; None where it is neither, or negative."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip()
    return int(text or b"0", 8) if all(digit in b"01234567" for digit in text) else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _extension(kind: bytes, content: bytes) -> dict[str, str]:
    """Returns what an extension header says of the member after it: its path, its size."""
    if kind == b"L":
        return {"path": content.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    found, at = {}, 0
    while kind == b"x" and (space := content.find(b" ", at, at + _LONGEST_NUMBER + 1)) > 0:
        end = at + _decimal(content[at:space].decode("ascii", "replace"), 0)
        if not space < end <= len(content):
            break
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        at = end
    return found


def _decimal(text: str, default: int) -> int:
    """Returns a number in a few decimal digits, or `default` for anything else."""
    return int(text) if text.isdecimal() and len(text) <= _LONGEST_NUMBER else default
