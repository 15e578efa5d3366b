"""Batches from records: the order of a run is a pure function of its seed.

Position = global samples consumed since the run began. The sample at a position, its augmentation and its row in the
batch follow from (seed, position) alone, so a run resumes at any position in constant time, that integer is all the
state a checkpoint holds, and neither processes nor worker processes nor threads change a bit. Grain supplies the
threads, the worker processes and the prefetching; the order is ours. An element that Grain handles is a whole batch.

Grain is imported when batches are made from records, not before: `synthetic_batches` needs NumPy only.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from clip_jax.data.images import Preprocess, decode, eval_image, resized_crop, square_crop
from clip_jax.data.sources import Record, Source
from clip_jax.errors import UserError

Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]

_SHUFFLE_ROUNDS = 4
_SYNTHETIC_PAIRS = 256


class RecordError(UserError):
    """A record that cannot be used; the message names its index, its source and the reason."""


@runtime_checkable
class Tokenize(Protocol):
    """Captions to int32 [b, context]."""

    def __call__(self, texts: list[str], *, context: int) -> np.ndarray: ...


@dataclass(frozen=True)
class TrainTransform:
    """A record to the arrays of one training pair.

    The tokenizer is called with one caption at a time: measured, that costs 3 microseconds where an image costs a
    millisecond, and it keeps a pair a function of its record.

    Attributes:
      preprocess: its size is the side of the crops.
      tokenizer: captions to rows of ids.
      context: length of a row.
      crop: `square`, the paper's random square crop, or `resized`, open_clip's random resized crop.
      crop_scale: least and greatest area of a `resized` crop, as a share of the image's.
    """

    preprocess: Preprocess
    tokenizer: Tokenize
    _: KW_ONLY
    context: int = 77
    crop: Literal["square", "resized"] = "square"
    crop_scale: tuple[float, float] = (0.9, 1.0)

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        """Returns `image`, uint8 [s, s, 3], and `tokens`, int32 [l].

        Raises:
          UserError: the image cannot be decoded, or the caption cannot be encoded.
        """
        image = _pixels(record)
        if self.crop == "square":
            cropped = square_crop(image, self.preprocess, rng)
        else:
            cropped = resized_crop(image, self.preprocess, rng, scale=self.crop_scale)
        return {"image": cropped, "tokens": self.tokenizer([record.caption], context=self.context)[0]}


@dataclass(frozen=True)
class EvalTransform:
    """A record to the arrays of one labelled image.

    Attributes:
      preprocess: its size is the side of the image.
    """

    preprocess: Preprocess

    def __call__(self, record: Record) -> Example:
        """Returns `image`, uint8 [s, s, 3], and `label`, int32.

        Raises:
          UserError: the image cannot be decoded.
        """
        return {"image": eval_image(record.image, self.preprocess), "label": np.asarray(record.label, np.int32)}


def train_batches(
    source: Source,
    *,
    transform: Callable[[Record, np.random.Generator], Example],
    batch: int,
    seed: int,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 4,
    prefetch: int = 8,
) -> Iterator[Batch]:
    """Yields this process's rows of every global batch from `position` on, without end.

    Every epoch is a new shuffle of all records, each exactly once; a batch may span two epochs, and none is dropped.
    Rows of the processes, one after the other, are the batch that a single process would see.

    Args:
      source: the records.
      transform: record and random generator to arrays, such as a `TrainTransform`; the generator is a function of
        (seed, epoch, record).
      batch: rows over all processes; a multiple of `process_count`.
      seed: of order and augmentation.
      position: global samples consumed before.
      process_index: of this process.
      process_count: number of processes.
      workers: processes that read and decode, spawned with a pickle of `source` and `transform`; 0 means threads here.
      threads: batches made at the same time, in each of these processes.
      prefetch: batches kept ready in each of these processes.

    Returns:
      An iterator of dicts with the transform's arrays stacked (`image` uint8 [b/P, s, s, 3] and `tokens` int32
      [b/P, l]), `weight` float32 [b/P] of ones and `index` int64 [b/P], the records' numbers. Its `close()` ends the
      threads and worker processes, and so does an exception.

    Raises:
      UserError: `batch` does not divide, or there are no records; at `next`, a `RecordError`.
    """
    _check_source(source)
    rows = _rows_of_process(batch, process_index, process_count)
    batches = _TrainBatches(source, transform, seed, position, batch, rows)
    return _iterate(batches, workers=workers, threads=threads, prefetch=prefetch)


def eval_batches(
    source: Source,
    *,
    transform: Callable[[Record], Example],
    batch: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 8,
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

    Returns:
      An iterator of dicts with the transform's arrays stacked (`image` uint8 [b/P, s, s, 3] and `label` int32 [b/P]),
      `weight` float32 [b/P], 1 for a record and 0 for padding, and `index` int64 [b/P], the records' numbers. Rows of
      padding hold zeros, and index -1.

    Raises:
      UserError: `batch` does not divide, or there are no records; at `next`, a `RecordError`.
    """
    _check_source(source)
    rows = _rows_of_process(batch, process_index, process_count)
    return _iterate(_EvalBatches(source, transform, batch, rows), workers=0, threads=threads, prefetch=prefetch)


def synthetic_batches(
    *,
    batch: int,
    image_size: int,
    context: int,
    vocab_size: int,
    seed: int,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields batches of random pairs without end, as `train_batches` does, at no cost: for benchmarks and trials.

    256 pairs are made once; the pair at a position is `position % 256`, and a batch is a read-only view of them, so
    larger batches hold repeats. The last two ids of the vocabulary are start and end of a caption.

    Args:
      batch: rows over all processes; a multiple of `process_count`.
      image_size: side of the images.
      context: length of the rows of tokens, at least 3.
      vocab_size: ids are below this.
      seed: of the pairs.
      position: global samples consumed before.
      process_index: of this process.
      process_count: number of processes.

    Raises:
      UserError: `batch` does not divide.
    """
    rows = _rows_of_process(batch, process_index, process_count)
    # Long enough that a batch which starts at any pair is one slice.
    order = np.arange(_SYNTHETIC_PAIRS + len(rows)) % _SYNTHETIC_PAIRS
    rng = np.random.default_rng(seed)
    pairs = {
        "image": rng.integers(0, 256, (_SYNTHETIC_PAIRS, image_size, image_size, 3), dtype=np.uint8)[order],
        "tokens": _synthetic_tokens(rng, context, vocab_size)[order],
        "weight": np.ones(len(order), np.float32),
        "index": order,
    }
    for array in pairs.values():
        array.flags.writeable = False

    def batch_from(start: int) -> Batch:
        first = (start + rows.start) % _SYNTHETIC_PAIRS
        return {name: array[first : first + len(rows)] for name, array in pairs.items()}

    return map(batch_from, itertools.count(position, batch))


def shuffled_index(place: int, epoch: int, *, size: int, seed: int) -> int:
    """Returns the record at `place` of an epoch: for each (seed, epoch) a permutation of range(size), in O(1)."""
    from grain.experimental import index_shuffle

    key = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return index_shuffle(place, max_index=size - 1, seed=key, rounds=_SHUFFLE_ROUNDS)


@dataclass(frozen=True)
class _TrainBatches:
    """Batch number -> this process's rows of it; what Grain's threads and workers index."""

    source: Source
    transform: Callable[[Record, np.random.Generator], Example]
    seed: int
    position: int
    batch: int
    rows: range

    def __len__(self) -> int:
        return (2**62 - self.position) // self.batch  # without end

    def __getitem__(self, index: int) -> Batch:
        start = self.position + index * self.batch
        places = [divmod(start + row, len(self.source)) for row in self.rows]
        seed, size = self.seed, len(self.source)
        records = [shuffled_index(place, epoch, size=size, seed=seed) for epoch, place in places]
        examples = [
            _example(self.source, record, self.transform, np.random.default_rng((seed, epoch, record)))
            for record, (epoch, _) in zip(records, places, strict=True)
        ]
        weight = np.ones(len(self.rows), np.float32)
        return _stack(examples) | {"weight": weight, "index": np.asarray(records, np.int64)}


@dataclass(frozen=True)
class _EvalBatches:
    """Batch number -> this process's rows of it, padded."""

    source: Source
    transform: Callable[[Record], Example]
    batch: int
    rows: range

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch)

    def __getitem__(self, index: int) -> Batch:
        records = index * self.batch + np.asarray(self.rows, np.int64)
        is_record = records < len(self.source)
        examples = [_example(self.source, int(record), self.transform) for record in records[is_record]]
        if padding := int(np.sum(~is_record)):
            # Its shapes are a record's: the last batch of a process may hold nothing but padding.
            examples += [_zeros(examples[0] if examples else _example(self.source, 0, self.transform))] * padding
        return _stack(examples) | {"weight": is_record.astype(np.float32), "index": np.where(is_record, records, -1)}


def _iterate(batches: _TrainBatches | _EvalBatches, *, workers: int, threads: int, prefetch: int) -> Iterator[Batch]:
    """Yields `batches` in order, made ahead by Grain; closing it ends the threads and the worker processes.

    Batches are whole elements before Grain slices them over worker processes, so its buffers count batches, and the
    order does not depend on the number of workers.
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
    finally:
        iterator.close()


def _mark_flags_parsed() -> None:
    """Grain's workers read absl flags, which raise in programs that never parsed any."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(_index: int, _count: int) -> None:
    """Leaves signals to the main process, which must see a preemption first, and lets no worker outlive it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _example(source: Source, index: int, transform: Callable[..., Example], *arguments: Any) -> Example:
    try:
        return transform(source[index], *arguments)
    except UserError as error:
        raise RecordError(f"record {index} of {source}: {error}") from None


def _pixels(record: Record) -> np.ndarray:
    return decode(record.image) if isinstance(record.image, bytes) else record.image


def _stack(examples: Sequence[Example]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _zeros(example: Example) -> Example:
    return {name: np.zeros_like(value) for name, value in example.items()}


def _rows_of_process(batch: int, process_index: int, process_count: int) -> range:
    """Returns the rows of a global batch that a process makes: consecutive ones."""
    if batch % process_count:
        raise UserError(f"a batch of {batch} rows cannot be split evenly over {process_count} processes")
    rows = batch // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def _check_source(source: Source) -> None:
    if not len(source):
        raise UserError(f"{source} has no records")


def _synthetic_tokens(rng: np.random.Generator, context: int, vocab_size: int) -> np.ndarray:
    """Returns int32 [256, l]: start, a caption of random length, end, zeros."""
    start, end = vocab_size - 2, vocab_size - 1
    tokens = rng.integers(1, start, (_SYNTHETIC_PAIRS, context), dtype=np.int32)
    ends = rng.integers(2, context, (_SYNTHETIC_PAIRS, 1))
    columns = np.arange(context)
    tokens = np.where(columns < ends, tokens, np.where(columns == ends, end, 0)).astype(np.int32)
    tokens[:, 0] = start
    return tokens
