"""Batches from records: the order of a run is a pure function of its seed.

Position = global samples consumed since the run began. The sample at a position, its augmentation and its row in the
batch follow from (seed, position) alone, so a run resumes at any position in constant time, that integer is all the
state a checkpoint holds, and neither processes nor worker processes nor threads change a bit. Grain supplies the
threads, the worker processes and the prefetching; the order is ours. An element that Grain handles is some rows of a
batch, always made by the same worker.

A record that cannot be used keeps its row, with weight 0 and the reason. Grain is imported when batches are made.
"""

import functools
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clip_jax.data.images import ImageError
from clip_jax.data.order import Mixture, position_of_row, rows_of_process
from clip_jax.data.reading import MixedReader, Part, name_record, where
from clip_jax.data.records import REASONS, UNREACHABLE, Record, RecordError, Records
from clip_jax.data.transforms import Example, Transform
from clip_jax.errors import OutageError, RestartError, UserError, one_line

Batch = dict[str, np.ndarray]

_MOST_ROWS = 256
_OPENING = threading.Lock()


def check_batches(
    parts: Sequence[Part], *, batch: int, position: int, process_count: int = 1, workers: int = 0
) -> None:
    """Raises a UserError where `train_batches` cannot begin: `batch` does not divide, or there are no records."""
    for part in parts:
        _check_source(part.source)
    rows_of_process(batch, 0, process_count)
    streams = _streams(parts)
    if streams == 1:
        return
    serving = _serving_streams(math.gcd(batch, position), process_count=process_count, workers=workers, nearest=streams)
    if streams % process_count or batch % streams or position % streams:
        raise UserError(
            f"config.data.streams is {streams}; it must be a multiple of the number of processes ({process_count}) and "
            f"divide config.batch ({batch}) and the samples consumed so far ({position})"
            + (f", as {serving} does" if serving else "")
        )
    if workers > streams // process_count:
        remedy = f"set config.data.streams={serving} before a run begins, or use threads"
        raise UserError(
            f"config.data.workers is {workers}, over the {streams // process_count} streams of each process; "
            + (remedy if serving else "use fewer of them")
        )


def _serving_streams(rows: int, *, process_count: int, workers: int, nearest: int) -> int:
    """Returns the `nearest` number that divides `rows`, is a multiple of the processes and leaves no worker without a
    stream; 0 where there is none.
    """
    each = range(process_count * max(workers, 1), rows + 1, process_count)
    return min((number for number in each if rows % number == 0), key=lambda number: abs(number - nearest), default=0)


def train_batches(
    parts: Sequence[Part],
    *,
    transform: Transform,
    batch: int,
    seed: int,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 4,
    prefetch: int = 8,
    connections: int = 8,
    on_bad: Literal["drop", "fail"] = "drop",
) -> Generator[Batch, None, None]:
    """Yields this process's rows of every global batch from `position` on, without end.

    Every epoch of a source is a new shuffle of all its records, each exactly once; a batch may span two epochs, and
    none is dropped. Rows of the processes, one after the other, are the batch that a single process would see.

    Args:
      parts: the sources, their orders and weights; orders of several streams agree on their number.
      transform: record and random generator to arrays, such as a `TrainTransform`; the generator is a function of
        (seed, epoch, record).
      batch: rows over all processes; a multiple of `process_count` and of the orders' streams.
      seed: of the augmentation.
      position: global samples consumed before.
      process_index: of this process.
      process_count: number of processes; divides the orders' streams, if these are several.
      workers: processes that read and decode, spawned with a pickle of `parts` and `transform`; 0 means threads here.
      threads: parts of batches made at the same time, in each of these processes.
      prefetch: batches kept ready.
      connections: blocks that each of these processes fetches at the same time.
      on_bad: what becomes of a record that cannot be used: a row of weight 0, or an exception.

    Returns:
      An iterator of dicts with the transform's arrays stacked (`image` uint8 [b/P, s, s, 3] and `tokens` int32
      [b/P, l]), `weight` float32 [b/P], `bad` int32 [b/P], 0 or 1 plus the place of the reason in REASONS, and `index`
      int64 [b/P], the records' numbers through all sources. Its `close()` ends the threads and worker processes, and so
      does an exception.

    Raises:
      UserError: as `check_batches`; at `next`, a `RecordError` or an `OutageError`.
    """
    check_batches(parts, batch=batch, position=position, process_count=process_count, workers=workers)
    rows = rows_of_process(batch, process_index, process_count)
    streams = _streams(parts)
    own = streams // process_count if streams > 1 else len(rows)
    workers = min(workers, own)
    tasks = _split_rows(rows, unit=len(rows) // own, workers=max(workers, 1))
    made = _TrainBatches(
        tuple(parts), transform, seed, position, batch, tuple(tasks), streams, connections, on_bad == "fail"
    )
    elements = _iterate(made, workers=workers, threads=threads, prefetch=prefetch * len(tasks) // max(workers, 1))
    return _joined(elements, tasks)


def eval_batches(
    source: Records,
    *,
    transform: Callable[[Record], Example],
    batch: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 8,
    on_bad: Literal["drop", "fail"] = "fail",
) -> Iterator[Batch]:
    """Yields this process's rows of every record once, in order; all processes yield the same number of batches.

    Args:
      source: the records.
      transform: record to arrays, such as an `EvalTransform`.
      batch: rows over all processes; a multiple of `process_count`.
      process_index: of this process.
      process_count: number of processes.
      threads: batches made at the same time.
      prefetch: batches kept ready.
      on_bad: what becomes of a record that cannot be used: an exception, or the transform's `blank` row with weight 0;
        where its store does not answer, an exception in any case.

    Returns:
      An iterator of dicts with the transform's arrays stacked (`image` uint8 [b/P, s, s, 3] and `label` int32 [b/P]),
      `weight` float32 [b/P], 1 for a record and 0 for padding, and `index` int64 [b/P], the records' numbers. Rows of
      padding hold zeros, and index -1.

    Raises:
      UserError: `batch` does not divide, or there are no records; at `next`, a `RecordError` or an `OutageError`.
    """
    _check_source(source)
    rows = rows_of_process(batch, process_index, process_count)
    made = _EvalBatches(source, transform, batch, rows, on_bad == "drop")
    return _iterate(made, workers=0, threads=threads, prefetch=prefetch)


@dataclass(frozen=True)
class _TrainBatches:
    """Element number -> some rows of a batch; what Grain's threads and workers index. Elements take turns in
    `tasks`."""

    parts: tuple[Part, ...]
    transform: Transform
    seed: int
    position: int
    batch: int
    tasks: tuple[range, ...]
    streams: int
    connections: int
    fail: bool

    def __len__(self) -> int:
        return (2**62 - self.position) // self.batch * len(self.tasks)  # without end

    def __getitem__(self, index: int) -> Batch:
        number, task = divmod(index, len(self.tasks))
        start = self.position + number * self.batch
        place = functools.partial(position_of_row, start=start, batch=self.batch, streams=self.streams)
        rows = [self._row(place(row)) for row in self.tasks[task]]
        examples, indices, bad = zip(*rows, strict=True)
        bad = np.asarray(bad, np.int32)
        return _stack(examples) | {
            "weight": (bad == 0).astype(np.float32),
            "index": np.asarray(indices, np.int64),
            "bad": bad,
        }

    def close(self) -> None:
        """Ends what reads, for good: a thread that is in the midst of a batch opens nothing again."""
        with _OPENING:
            reader = self.__dict__.get("_reader")
            self.__dict__["_reader"] = None
        if reader is not None:
            reader.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def _row(self, position: int) -> tuple[Example, int, int]:
        """Returns arrays, record and reason of a row."""
        (epoch, index), record = self._open().read(position)
        try:
            if isinstance(record, RecordError):
                raise record
            rng = np.random.default_rng((self.seed, epoch, index))
            return self.transform(record, rng), index, 0
        except (ImageError, RecordError) as error:
            if self.fail:
                raise _named(error, where(self.parts, index)) from None
            return self.transform.blank(), index, REASONS.index(error.reason) + 1

    def _open(self) -> MixedReader:
        """Returns the reader of this process, opened when the first row is made."""
        with _OPENING:
            if "_reader" not in self.__dict__:
                mixture = Mixture(tuple(part.weight for part in self.parts), streams=self.streams)
                reader = MixedReader(self.parts, mixture, start=self.position, connections=self.connections)
                self.__dict__["_reader"] = reader
            reader = self.__dict__["_reader"]
        if reader is None:
            raise ValueError("the batches are closed")
        return reader


@dataclass(frozen=True)
class _EvalBatches:
    """Batch number -> this process's rows of it, padded."""

    source: Records
    transform: Callable[[Record], Example]
    batch: int
    rows: range
    drop: bool

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch)

    def __getitem__(self, index: int) -> Batch:
        records = index * self.batch + np.asarray(self.rows, np.int64)
        is_record = records < len(self.source)
        made = [self._example(int(record)) for record in records[is_record]]
        examples, weights = [example for example, _ in made], [weight for _, weight in made]
        if padding := int(np.sum(~is_record)):
            # Its shapes are a record's: the last batch of a process may hold nothing but padding.
            examples += [_zeros(examples[0] if examples else self._example(0)[0])] * padding
            weights += [0.0] * padding
        return _stack(examples) | {
            "weight": np.asarray(weights, np.float32),
            "index": np.where(is_record, records, -1),
        }

    def close(self) -> None:
        """Nothing is open."""

    def _example(self, index: int) -> tuple[Example, float]:
        """Returns arrays and weight of a row."""
        try:
            return self.transform(self.source[index]), 1.0
        except (ImageError, RecordError) as error:
            if self.drop and isinstance(self.transform, Transform) and error.reason != UNREACHABLE:
                return self.transform.blank(), 0.0
            raise _named(error, name_record(self.source, index)) from None


def _iterate(
    batches: _TrainBatches | _EvalBatches, *, workers: int, threads: int, prefetch: int
) -> Generator[Batch, None, None]:
    """Yields `batches` in order, made ahead by Grain; closing it ends the threads and the worker processes.

    Element i is made by worker i modulo their number, so the order does not depend on that number.
    """
    import grain

    read = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(read)
    if workers > 0:
        _mark_flags_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_start_worker)
    iterator = iter(dataset)
    try:
        yield from iterator
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise RestartError(  # going on would leave out the batches that the worker had ready
            f"a data worker died ({one_line(error)[:120]}), for want of memory perhaps (config.data.workers, "
            "config.data.prefetch); started again, the run goes on from its newest checkpoint"
        ) from error
    finally:
        batches.close()
        iterator.close()


def _split_rows(rows: range, *, unit: int, workers: int) -> list[range]:
    """Returns the rows of each element of a batch, so that elements in turn are of workers in turn.

    A worker's rows are consecutive, and in whole units; its elements have at most _MOST_ROWS rows.
    """
    units = len(rows) // unit
    bounds = [units * worker // workers * unit for worker in range(workers + 1)]
    parts = list(itertools.pairwise(bounds))
    rounds = -(-max(high - low for low, high in parts) // _MOST_ROWS)
    return [
        rows[low + (high - low) * i // rounds : low + (high - low) * (i + 1) // rounds]
        for i in range(rounds)
        for low, high in parts
    ]


def _joined(elements: Generator[Batch, None, None], tasks: Sequence[range]) -> Generator[Batch, None, None]:
    """Yields batches from their elements, rows in order."""
    by_row = sorted(range(len(tasks)), key=lambda task: tasks[task].start)
    try:
        while True:
            made = [next(elements) for _ in tasks]
            yield {name: np.concatenate([made[task][name] for task in by_row]) for name in made[0]}
    finally:
        elements.close()


def _mark_flags_parsed() -> None:
    """Grain's workers read absl flags, which raise in programs that never parsed any."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _named(error: ImageError | RecordError, record: str) -> UserError:
    """Returns the error of a record, with what it is called."""
    message = f"{record}: {error}"
    return OutageError(message) if error.reason == UNREACHABLE else RecordError(error.reason, message)


def _start_worker(_index: int, _count: int) -> None:
    """Leaves signals to the main process, which must see a preemption first, and lets no worker outlive it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which asks the main process for a profile
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _stack(examples: Sequence[Example]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _zeros(example: Example) -> Example:
    return {name: np.zeros_like(value) for name, value in example.items()}


def _streams(parts: Sequence[Part]) -> int:
    return max(part.order.streams for part in parts)


def _check_source(source: Records) -> None:
    if not len(source):
        raise UserError(f"{source} has no records")
