"""Records by position, in the order of their source; every worker process has readers of its own.

A reader holds what its order needs: nothing for records read one by one; for windows, the blocks of the windows that
are in use, and of the next ones, fetched ahead by threads.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from clip_jax.data.order import Mixture, Order, Place, Window, WindowShuffle
from clip_jax.data.records import Record, RecordError, Records, Source
from clip_jax.errors import UserError


@runtime_checkable
class Block(Protocol):
    """Consecutive records in memory."""

    def __getitem__(self, member: int, /) -> Record: ...


@runtime_checkable
class BlockSource(Records, Protocol):
    """A source that reads consecutive records at once.

    Attributes:
      counts: records of each shard; int64 [shards]. No block crosses shards.
    """

    counts: np.ndarray

    def read_block(self, first: int, count: int) -> Block: ...

    def close(self) -> None: ...


class Reading(NamedTuple):
    """What stands at a position.

    Attributes:
      place: epoch and record.
      record: or why it cannot be used.
    """

    place: Place
    record: Record | RecordError


@runtime_checkable
class Reader(Protocol):
    """Reads one source by its positions; threads may share one."""

    def read(self, position: int) -> Reading: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Part:
    """A source of a mixture, and its order.

    Attributes:
      source: the records.
      order: of them; a `WindowShuffle` for a `BlockSource`.
      weight: how often it is read, relative to the others.
    """

    source: Source
    order: Order
    weight: float = 1.0


class DirectReader:
    """Reads record by record.

    Args:
      part: what to read.
    """

    def __init__(self, part: Part) -> None:
        self._source, self._order = part.source, part.order

    def read(self, position: int) -> Reading:
        """Returns what stands at a position."""
        place = self._order.locate(position)
        return Reading(place, _get(self._source, place.index))

    def close(self) -> None:
        """Nothing is open."""


class _OpenWindow:
    """A window whose blocks are being fetched, or are there."""

    def __init__(self, window: Window, blocks: list[Future], left: int) -> None:
        self.window, self.blocks, self.left = window, blocks, left


class WindowReader:
    """Reads windows of blocks. A window is fetched when half of the one before it is consumed.

    Every position of the streams that it is asked for must be read once, from `start` on: a window is dropped when all
    of it was read.

    Args:
      source: the records.
      order: of them.
      start: position from which it is read.
      connections: blocks fetched at the same time.
    """

    def __init__(self, source: BlockSource, order: WindowShuffle, *, start: int, connections: int) -> None:
        self._source, self._order, self._start = source, order, start
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="blocks")
        self._lock = threading.Lock()
        self._windows: dict[int, list[_OpenWindow]] = {}
        self._ends: dict[int, int] = {}  # of each stream's last window that was opened

    def read(self, position: int) -> Reading:
        """Returns what stands at a position."""
        with self._lock:
            opened = self._consume(position)
        window = opened.window
        slot = window.slot(position)
        piece, member = window.sources[slot].tolist()
        place = Place(window.epoch, int(window.records[slot]))
        return Reading(place, _get(opened.blocks[piece].result(), member))

    def close(self) -> None:
        """Stops fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._source.close()

    def _consume(self, position: int) -> _OpenWindow:
        stream = position % self._order.streams
        windows = self._windows.setdefault(stream, [])
        found = next((each for each in windows if each.window.begin <= position < each.window.end), None)
        if found is None:
            found = self._open(position)
            windows.append(found)
        found.left -= 1
        # A thread that is ahead may have opened the next one, and read all of it: nobody would read another one of it.
        if 2 * found.left <= len(found.window.records) and self._ends[stream] == found.window.end:
            windows.append(self._open(found.window.end))
        if found.left == 0:
            windows.remove(found)
        return found

    def _open(self, position: int) -> _OpenWindow:
        window = self._order.window_at(position)
        first = self._start + (position - self._start) % self._order.streams
        skipped = window.slot(first) if first > window.begin else 0
        blocks = [self._pool.submit(self._source.read_block, *piece) for piece in window.pieces.tolist()]
        stream = position % self._order.streams
        self._ends[stream] = max(self._ends.get(stream, 0), window.end)
        return _OpenWindow(window, blocks, len(window.records) - skipped)


class MixedReader:
    """Reads several sources in turn; what one process reads of a run.

    Args:
      parts: the sources.
      mixture: which of them comes when.
      start: position from which it is read.
      connections: blocks fetched at the same time.
    """

    def __init__(self, parts: Sequence[Part], mixture: Mixture, *, start: int, connections: int) -> None:
        starts = mixture.consumed(start)
        self._mixture = mixture
        self._readers = [
            _reader(part, start=begin, connections=connections) for part, begin in zip(parts, starts, strict=True)
        ]
        sizes = [len(part.source) for part in parts]
        self._offsets = np.cumsum([0, *sizes]).tolist()

    def read(self, position: int) -> Reading:
        """Returns what stands at a position; records of the sources are numbered through."""
        source, own_position = self._mixture.split(position)
        (epoch, index), record = self._readers[source].read(own_position)
        return Reading(Place(epoch, self._offsets[source] + index), record)

    def close(self) -> None:
        """Stops fetching."""
        for reader in self._readers:
            reader.close()


class Subset:
    """Some records of a source, as a source; messages name them as the source does.

    Args:
      source: of the records.
      records: their numbers in it, in the order in which they are read.
    """

    def __init__(self, source: Records, records: Sequence[int]) -> None:
        self._source, self._records = source, records

    def __len__(self) -> int:
        return len(self._records)

    def __str__(self) -> str:
        return f"{len(self):,} records of {self._source}"

    def __getitem__(self, index: int) -> Record:
        return self._source[self._records[index]]

    def where(self, index: int) -> str:
        """Returns what to call a record in messages."""
        return name_record(self._source, self._records[index])


def where(parts: Sequence[Part], index: int) -> str:
    """Returns what to call a record of the sources, numbered through, in messages."""
    for part in parts:
        if index < len(part.source):
            return name_record(part.source, index)
        index -= len(part.source)
    return f"record {index}"


def name_record(source: Records, index: int) -> str:
    """Returns what to call a record of a source in messages."""
    named = getattr(source, "where", None)
    return named(index) if named else f"record {index} of {source}"


def _reader(part: Part, *, start: int, connections: int) -> Reader:
    if not isinstance(part.order, WindowShuffle):
        return DirectReader(part)
    if not isinstance(part.source, BlockSource):
        raise UserError(f"{part.source} is read record by record; it has no blocks to make windows of")
    return WindowReader(part.source, part.order, start=start, connections=connections)


def _get(records: Any, index: int) -> Record | RecordError:
    try:
        return records[index]
    except RecordError as error:
        return error
