"""Which record comes when: pure functions of (seed, position), so that a run resumes anywhere at once.

A position counts the samples that a run has consumed over all processes; epoch e of n records is the positions
[e·n, (e+1)·n), in which every record comes exactly once. Two orders:

* `FullShuffle`: by record over everything, for storage with cheap random access.
* `WindowShuffle`: for object stores, where every request costs tens of milliseconds. The shards are cut into blocks of
  consecutive records; the blocks are permuted, and dealt out to `streams`; records are permuted within windows of
  several blocks of a stream. A reader needs one window of each of its streams, and reads every block once, whole.

Stream s of S has the positions s, s + S, s + 2S, …; so any number of processes that divides S can share a run, each
with streams of its own, and the batch at a position is the same for all of them.
"""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from clip_jax.errors import UserError

_SHUFFLE_ROUNDS = 4
_RESOLUTION = 1024
_GROUP = 256


class Place(NamedTuple):
    """Where a position falls.

    Attributes:
      epoch: full passes over the records before it.
      index: the record.
    """

    epoch: int
    index: int


@runtime_checkable
class Order(Protocol):
    """Position -> record, endlessly.

    Attributes:
      size: records of an epoch.
      streams: positions that are equal modulo this number are read by the same process.
    """

    @property
    def size(self) -> int: ...

    @property
    def streams(self) -> int: ...

    def locate(self, position: int) -> Place: ...


@dataclass(frozen=True)
class FullShuffle:
    """Every epoch a permutation of all records.

    Attributes:
      size: number of records.
      seed: of the permutations.
    """

    size: int
    _: KW_ONLY
    seed: int

    @property
    def streams(self) -> int:
        """One: any process may read any record."""
        return 1

    def locate(self, position: int) -> Place:
        """Returns epoch and record of a position, in constant time and memory."""
        epoch, place = divmod(position, self.size)
        return Place(epoch, shuffled_index(place, epoch, size=self.size, seed=self.seed))


class Window(NamedTuple):
    """The records of a stream that are permuted together.

    Attributes:
      epoch: full passes before it.
      begin: the position of its first record.
      step: positions between one of its records and the next.
      pieces: int64 [p, 2]: first record and length of the runs of consecutive records that it consists of.
      records: int64 [n]: its records in their order.
      sources: int64 [n, 2]: for each of them, its piece and its place in that.
    """

    epoch: int
    begin: int
    step: int
    pieces: np.ndarray
    records: np.ndarray
    sources: np.ndarray

    @property
    def end(self) -> int:
        """The position after its last record, in its stream."""
        return self.begin + self.step * len(self.records)

    def slot(self, position: int) -> int:
        """Returns which of its records comes at a position."""
        return (position - self.begin) // self.step


class _Epoch(NamedTuple):
    """The blocks of an epoch. 5 billion records are 20 million blocks, so that little more than their order is kept.

    Attributes:
      blocks: int32 [n]: their numbers, in their order.
      ends: int64: the records up to the end of every group of _GROUP blocks.
    """

    blocks: np.ndarray
    ends: np.ndarray


class WindowShuffle:
    """Blocks permuted, then records within windows of blocks; see the module docstring.

    Attributes:
      size: number of records.
      streams: S.
    """

    def __init__(self, counts: np.ndarray, *, seed: int, streams: int, block: int, window: int) -> None:
        """Args:
        counts: records of each shard; int64 [shards].
        seed: of the permutations.
        streams: parts of an epoch that are read independently.
        block: records that are read at once; a shard's last block may be shorter.
        window: blocks of a stream that are permuted together.
        """
        self._counts = np.asarray(counts, np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        blocks = -(-self._counts // block)
        self._after = np.cumsum(blocks)  # the blocks up to the end of each shard
        self._before = self._after - blocks
        self.size, self.streams = int(self._counts.sum()), streams
        self._seed, self._block, self._window = seed, block, window
        self._epochs: dict[int, _Epoch] = {}

    def locate(self, position: int) -> Place:
        """Returns epoch and record of a position."""
        window = self.window_at(position)
        return Place(window.epoch, int(window.records[window.slot(position)]))

    def window_at(self, position: int) -> Window:
        """Returns the window of a position; costs as much as its records' number."""
        epoch, place = divmod(position, self.size)
        stream, rank = place % self.streams, place // self.streams
        plan = self._plan(epoch)
        low, high = self._ranks(stream)
        first, last = self._blocks_of_window(plan, low, high, low + rank, stream)
        firsts, lengths = self._cut(plan.blocks[first:last])
        begin = self._records_before(plan, first)
        skipped, rest = max(0, low - begin), max(0, begin + int(lengths.sum()) - high)
        firsts[0] += skipped
        lengths[0] -= skipped
        lengths[-1] -= rest
        begin_rank = begin + skipped - low
        records, sources = self._permuted(firsts, lengths, (epoch, stream, begin_rank))
        begin = epoch * self.size + stream + begin_rank * self.streams
        return Window(epoch, begin, self.streams, np.stack([firsts, lengths], axis=1), records, sources)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_epochs": {}}

    def _ranks(self, stream: int) -> tuple[int, int]:
        """Returns the part of the permuted epoch that is a stream's: equal parts, the first ones longer by one."""
        share, rest = divmod(self.size, self.streams)
        low = stream * share + min(stream, rest)
        return low, low + share + (stream < rest)

    def _blocks_of_window(self, plan: _Epoch, low: int, high: int, rank: int, stream: int) -> tuple[int, int]:
        """Returns the range of blocks of the window in which a rank lies.

        Windows of different streams begin at different blocks, so that not all of them are read at the same time.
        """
        of_low, of_rank, of_last = (self._block_of(plan, each) for each in (low, rank, high - 1))
        phase = stream * self._window // self.streams
        number = (of_rank - of_low + phase) // self._window
        first = of_low + number * self._window - phase
        return max(of_low, first), min(of_last + 1, first + self._window)

    def _block_of(self, plan: _Epoch, rank: int) -> int:
        """Returns which of the permuted blocks holds a rank."""
        group = int(np.searchsorted(plan.ends, rank, side="right"))
        first = group * _GROUP
        _, lengths = self._cut(plan.blocks[first : first + _GROUP])
        before = int(plan.ends[group - 1]) if group else 0
        return first + int(np.searchsorted(np.cumsum(lengths), rank - before, side="right"))

    def _records_before(self, plan: _Epoch, block: int) -> int:
        """Returns the records of the permuted blocks before one."""
        group = block // _GROUP
        _, lengths = self._cut(plan.blocks[group * _GROUP : block])
        return (int(plan.ends[group - 1]) if group else 0) + int(lengths.sum())

    def _cut(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns first records and lengths of blocks, given by number."""
        shards = np.searchsorted(self._after, blocks, side="right")
        inside = (blocks - self._before[shards]) * self._block
        return self._starts[shards] + inside, np.minimum(self._block, self._counts[shards] - inside)

    def _permuted(self, firsts: np.ndarray, lengths: np.ndarray, key: tuple) -> tuple[np.ndarray, np.ndarray]:
        piece = np.repeat(np.arange(len(lengths)), lengths)
        member = np.arange(len(piece)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        order = permutation(len(piece), self._seed, *key)
        return (firsts[piece] + member)[order], np.stack([piece, member], axis=1)[order]

    def _plan(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            # Two at a time: readers run ahead into the next epoch. Read before it is replaced, for threads read on.
            kept = {old: plan for old, plan in self._epochs.items() if old >= epoch - 1}
            self._epochs = kept | {epoch: self._make_plan(epoch)}
        return self._epochs[epoch]

    def _make_plan(self, epoch: int) -> _Epoch:
        blocks = permutation(int(self._after[-1]), self._seed, epoch).astype(np.int32)
        lengths = np.full(len(blocks), self._block, np.int32)
        filled = self._counts > 0
        lengths[self._after[filled] - 1] = (self._counts[filled] - 1) % self._block + 1
        in_groups = np.add.reduceat(lengths[blocks], np.arange(0, len(blocks), _GROUP), dtype=np.int64)
        return _Epoch(blocks, np.cumsum(in_groups))


class Mixture:
    """Several sources, each with its own epochs, in fixed proportions.

    Rounds of `streams` positions come from one source each, so that all its streams advance alike; the rounds are dealt
    out as evenly as the weights allow.

    Attributes:
      streams: positions of a round.
      shares: part of the samples that each source gives, the weights rounded to 1/1024.
    """

    def __init__(self, weights: tuple[float, ...], *, streams: int = 1) -> None:
        """Args:
        weights: of the sources, relative to each other.
        streams: the number on which all sources' orders agree.
        """
        self.streams = streams
        self._pattern = _even_pattern(weights)
        counts = np.bincount(self._pattern, minlength=len(weights))
        self.shares = tuple(float(count) for count in counts / len(self._pattern))
        self._counts = counts
        # How often each round's source came before it in the pattern.
        before = np.zeros(len(self._pattern), np.int64)
        for source in range(len(weights)):
            mine = self._pattern == source
            before[mine] = np.arange(mine.sum())
        self._before = before

    def split(self, position: int) -> tuple[int, int]:
        """Returns the source of a position, and the position in that source."""
        round_, stream = divmod(position, self.streams)
        cycle, slot = divmod(round_, len(self._pattern))
        source = int(self._pattern[slot])
        return source, (cycle * int(self._counts[source]) + int(self._before[slot])) * self.streams + stream

    def consumed(self, position: int) -> tuple[int, ...]:
        """Returns the samples that each source gave before a position at which a round begins."""
        cycle, slot = divmod(position // self.streams, len(self._pattern))
        begun = np.bincount(self._pattern[:slot], minlength=len(self._counts))
        return tuple(int(count) * self.streams for count in cycle * self._counts + begun)


def shuffled_index(place: int, epoch: int, *, size: int, seed: int) -> int:
    """Returns the record at `place` of an epoch: for each (seed, epoch) a permutation of range(size), in O(1)."""
    from grain.experimental import index_shuffle

    key = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return index_shuffle(place, max_index=size - 1, seed=key, rounds=_SHUFFLE_ROUNDS)


def permutation(size: int, *key: int) -> np.ndarray:
    """Returns a permutation of range(size), int64 [size], that is the same for a key for ever.

    NumPy promises the raw stream of a bit generator, and not what `Generator.permutation` makes of it. Numbers are
    sorted by random bits above their own: no two are equal, so that any algorithm sorts them alike, and in place.
    """
    own = np.uint64((1 << (size - 1).bit_length()) - 1)
    keys = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    keys &= ~own
    keys |= np.arange(size, dtype=np.uint64)
    keys.sort()
    keys &= own
    return keys.view(np.int64)


def rows_of_process(batch: int, process_index: int, process_count: int) -> range:
    """Returns the rows of a global batch that a process makes: consecutive ones.

    Raises:
      UserError: they cannot be split evenly.
    """
    if batch % process_count:
        raise UserError(f"a batch of {batch} rows cannot be split evenly over {process_count} processes")
    rows = batch // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def position_of_row(row: int, *, start: int, batch: int, streams: int) -> int:
    """Returns the position of a row of the batch that starts at a position: row by row, stream after stream."""
    stream, number = divmod(row, batch // streams)
    return start + number * streams + stream


def _even_pattern(weights: tuple[float, ...]) -> np.ndarray:
    """Returns int64 [n]: sources in proportion to their weights, each spread as evenly as can be."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    counts = np.maximum(1, np.round(shares * _RESOLUTION)).astype(np.int64)
    counts //= np.gcd.reduce(counts)
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(times, kind="stable")]
