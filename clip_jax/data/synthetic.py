"""Random pairs, for tests, benchmarks and trials without data; needs NumPy only."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from clip_jax.data.order import rows_of_process
from clip_jax.data.records import Record

Batch = dict[str, np.ndarray]

_CLASSES = 10
_PAIRS = 256
_MEDIAN_LENGTH, _LENGTH_SPREAD = 17.0, 0.55


class SyntheticSource:
    """Random images with captions, for tests and trials without data; a record is a function of (seed, index).

    Attributes:
      classes: names of the labels, which are index modulo their number.
      fingerprint: the arguments, as JSON holds them.
    """

    classes = tuple(f"class {label}" for label in range(_CLASSES))
    state = None

    def __init__(self, size: int, image_size: int, seed: int):
        """Args:
        size: number of records.
        image_size: side of the images.
        seed: of everything in them.
        """
        self.fingerprint: dict[str, Any] = {
            "name": "synthetic",
            "records": size,
            "image_size": image_size,
            "seed": seed,
        }

    def __len__(self) -> int:
        return self.fingerprint["records"]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        side, seed = self.fingerprint["image_size"], self.fingerprint["seed"]
        image = np.random.default_rng((seed, index)).integers(0, 256, (side, side, 3), dtype=np.uint8)
        label = index % _CLASSES
        return Record(image, (f"random pixels, picture {index} of class {label}",), label=label)

    def __str__(self) -> str:
        return f"{len(self)} synthetic records"


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
    rows = rows_of_process(batch, process_index, process_count)
    # Long enough that a batch which starts at any pair is one slice.
    order = np.arange(_PAIRS + len(rows)) % _PAIRS
    rng = np.random.default_rng(seed)
    pairs = {
        "image": rng.integers(0, 256, (_PAIRS, image_size, image_size, 3), dtype=np.uint8)[order],
        "tokens": _tokens(rng, context, vocab_size)[order],
        "weight": np.ones(len(order), np.float32),
        "index": order,
        "bad": np.zeros(len(order), np.int32),
    }
    for array in pairs.values():
        array.flags.writeable = False

    def batch_from(start: int) -> Batch:
        first = (start + rows.start) % _PAIRS
        return {name: array[first : first + len(rows)] for name, array in pairs.items()}

    return map(batch_from, itertools.count(position, batch))


def _tokens(rng: np.random.Generator, context: int, vocab_size: int) -> np.ndarray:
    """Returns int32 [256, l]: start, a caption, end, zeros.

    Lengths are as web captions have them, log-normal: with start and end 20 tokens on average, 3 % over 48.
    """
    start, end = vocab_size - 2, vocab_size - 1
    tokens = rng.integers(1, start, (_PAIRS, context), dtype=np.int32)
    lengths = rng.lognormal(np.log(_MEDIAN_LENGTH), _LENGTH_SPREAD, (_PAIRS, 1))
    ends = np.clip(np.rint(lengths), 3, context).astype(int) - 1
    columns = np.arange(context)
    tokens = np.where(columns < ends, tokens, np.where(columns == ends, end, 0)).astype(np.int32)
    tokens[:, 0] = start
    return tokens
