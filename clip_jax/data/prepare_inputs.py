"""What datasets are prepared from, in parts that can be read anywhere and again: tar shards, folders, tables.

A part is a tar shard, or a number of a folder's images or a table's rows, in a fixed order. It is small when pickled,
and says by its digest whether it is still the same.
"""

import contextlib
import functools
import posixpath
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from clip_jax.data.captions import CaptionFields, parse_metadata
from clip_jax.data.folder_source import beside, images_below, with_captions
from clip_jax.data.patterns import expand
from clip_jax.data.records import UNREACHABLE, Record, RecordError, read_image_file
from clip_jax.data.storage import Stat, Storage, StorageError
from clip_jax.data.table_source import TableSource
from clip_jax.data.tar_index import index_samples, members, read_at
from clip_jax.data.tar_source import TarBlock, read_ranges
from clip_jax.errors import UserError
from clip_jax.files import absolute, digest, is_remote, state_of

_READ_AT_ONCE = 64
_COPIED_AT_ONCE = 8 << 20
_LOOKED_AT_AT_ONCE = 32


class Sample(NamedTuple):
    """A sample as it was found.

    Attributes:
      key: names it within the dataset.
      where: names it in messages.
      record: or why it cannot be used.
      metadata: its JSON; empty where it has none.
    """

    key: str
    where: str
    record: Record | RecordError
    metadata: Mapping[str, Any]


@runtime_checkable
class Part(Protocol):
    """Samples in a fixed order."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def digest(self) -> str:
        """Changes when what it reads does."""
        ...

    def samples(self, captions: CaptionFields, retry_s: float) -> Iterator[Sample]:
        """Yields the samples.

        Args:
          captions: which texts are captions.
          retry_s: seconds for which a remote read is tried again.

        Raises:
          StorageError: the part as a whole cannot be read.
        """
        ...


@dataclass(frozen=True)
class TarPart:
    """A tar shard in the layout of img2dataset and webdataset.

    Attributes:
      path: or URL.
      stat: when it was looked at.
    """

    path: str
    stat: Stat

    @property
    def name(self) -> str:
        """The path."""
        return self.path

    @property
    def digest(self) -> str:
        """Of path, size and tag."""
        return digest(self.path, self.stat.size, self.stat.tag)

    def samples(self, captions: CaptionFields, retry_s: float) -> Iterator[Sample]:
        """See `Part`; a remote shard is copied to a temporary file first, so that it is read once."""
        storage = Storage(retry_s)
        with _local_copy(storage, self.path) as path:
            shard = read_at(storage, path, storage.stat(path).size, called=self.path)
            index, _ = index_samples(members(shard))
            for first in range(0, len(index), _READ_AT_ONCE):
                rows = index[first : first + _READ_AT_ONCE]
                block = TarBlock(first, rows, read_ranges(storage, path, rows), captions)
                for member in range(len(rows)):
                    yield Sample(
                        f"{posixpath.basename(self.path)}/{first + member}",
                        f"sample {first + member} of {self.path}",
                        _record(functools.partial(block.__getitem__, member)),
                        block.metadata(member),
                    )


@dataclass(frozen=True)
class FolderPart:
    """Some images of a folder, each with its caption in a `.txt` or `.json` of the same name beside it.

    Attributes:
      root: the folder.
      number: counts the parts of a folder.
      images: paths below the folder.
      state: says what the files were when they were listed.
    """

    root: Path
    number: int
    images: tuple[str, ...]
    state: str

    @property
    def name(self) -> str:
        """The folder and the first and last image."""
        return f"{self.root}: {self.images[0]} to {self.images[-1]}"

    @property
    def digest(self) -> str:
        """Of folder, names, sizes and times."""
        return digest(self.root, self.number, self.state)

    def samples(self, captions: CaptionFields, retry_s: float) -> Iterator[Sample]:
        """See `Part`."""
        del retry_s  # the files are local
        for image in self.images:
            path = self.root / image
            yield Sample(
                image, str(path), _record(functools.partial(_beside_image, path, captions)), _metadata_beside(path)
            )


@dataclass(frozen=True)
class TablePart:
    """Some rows of a CSV, TSV or Parquet file.

    Attributes:
      table: the file.
      stat: when it was looked at.
      first: row.
      count: of rows.
      image_key: column of paths, or of encoded images.
      caption_key: column of captions, or of lists of captions.
      image_root: folder to which paths are relative.
    """

    table: Path
    stat: Stat
    first: int
    count: int
    image_key: str
    caption_key: str
    image_root: str

    @property
    def name(self) -> str:
        """The table and the rows."""
        return f"{self.table}: rows {self.first} to {self.first + self.count - 1}"

    @property
    def digest(self) -> str:
        """Of the table's path, size and time, the rows and how they are read."""
        return digest(self.table, *self.stat, self.first, self.count)

    def samples(self, captions: CaptionFields, retry_s: float) -> Iterator[Sample]:
        """See `Part`; the captions are the column's."""
        del captions, retry_s
        rows = _open_table(self.table, self.image_key, self.caption_key, self.image_root)
        for row in range(self.first, min(self.first + self.count, len(rows))):
            record = _record(functools.partial(rows.__getitem__, row))
            yield Sample(f"{self.table.name}/{row}", rows.where(row), record, {})


def tar_parts(shards: str, retry_s: float) -> list[Part]:
    """Returns a part for every shard that the patterns name; see `clip_jax.data.patterns.expand`.

    Raises:
      UserError: there is none, or one cannot be read.
    """
    storage = Storage(retry_s)
    paths = list(map(absolute, expand(shards)))
    try:
        with ThreadPoolExecutor(_LOOKED_AT_AT_ONCE) as pool:
            return [TarPart(path, stat) for path, stat in zip(paths, pool.map(storage.stat, paths), strict=True)]
    except StorageError as error:
        raise UserError(f"{error}; take it out of the shards, or make it again") from None


def folder_parts(folder: str, per_part: int) -> list[Part]:
    """Returns the images in a folder and in the folders below it, so many in a part, sorted by their paths.

    Raises:
      UserError: as `images_below`.
    """
    root = Path(folder).expanduser().resolve()
    images = images_below(root)
    cuts = [tuple(images[first : first + per_part]) for first in range(0, len(images), per_part)]
    return [FolderPart(root, number, cut, state_of(root, with_captions(cut))) for number, cut in enumerate(cuts)]


def table_parts(tables: str, per_part: int, *, image_key: str, caption_key: str, image_root: str) -> list[Part]:
    """Returns the rows of tables, so many in a part.

    Raises:
      UserError: one cannot be read, or has no such columns; or none has a row.
    """
    parts: list[Part] = []
    for path in expand(tables):
        if is_remote(path):
            raise UserError(f"{path}: tables are read from local disks only; copy it first")
        table, root = Path(path).resolve(), image_root or str(Path(path).absolute().parent)  # where a link lies, too
        rows = len(TableSource(table, image_key=image_key, caption_key=caption_key, image_root=root))
        stat = Storage().stat(str(table))
        parts += [
            TablePart(table, stat, first, min(per_part, rows - first), image_key, caption_key, root)
            for first in range(0, rows, per_part)
        ]
    if not parts:
        raise UserError(f"{tables} has no rows")
    return parts


@functools.lru_cache(maxsize=2)
def _open_table(table: Path, image_key: str, caption_key: str, image_root: str) -> TableSource:
    return TableSource(table, image_key=image_key, caption_key=caption_key, image_root=image_root)


@contextlib.contextmanager
def _local_copy(storage: Storage, path: str) -> Iterator[str]:
    """Yields a local path with the content of a file: of a copy without a name, so that nothing is left of one that a
    process was killed with.

    Raises:
      UserError: there is no room for it.
    """
    if not is_remote(path):
        yield path
        return
    size = storage.stat(path).size
    with tempfile.TemporaryFile(buffering=0) as copy:
        for start in range(0, size, _COPIED_AT_ONCE):
            rest = memoryview(storage.read(path, start, min(_COPIED_AT_ONCE, size - start)))
            try:
                while rest:
                    rest = rest[copy.write(rest) :]
            except OSError as error:
                folder = tempfile.gettempdir()
                raise UserError(
                    f"{path} cannot be copied to {folder}: {error.strerror}; set TMPDIR to a folder with more room"
                ) from None
        yield f"/dev/fd/{copy.fileno()}"


def _beside_image(path: Path, captions: CaptionFields) -> Record:
    texts = captions.find(beside(path, ".txt"), beside(path, ".json"))
    return Record(read_image_file(path), *texts)


def _metadata_beside(path: Path) -> Mapping[str, Any]:
    try:
        content = beside(path, ".json")
        return {} if content is None else parse_metadata(content)
    except RecordError as error:
        if error.reason == UNREACHABLE:
            raise  # a filter would leave the sample out
        return {}


def _record(read: Callable[[], Record]) -> Record | RecordError:
    try:
        return read()
    except RecordError as error:
        return error
