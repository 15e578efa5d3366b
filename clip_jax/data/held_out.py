"""Held-out pairs: the same ones whenever they are read, by any number of processes, in any run."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from clip_jax.config import RunConfig, held_out_source
from clip_jax.data.loader import fixed_transform_of, open_source
from clip_jax.data.order import FullShuffle, rows_of_process
from clip_jax.data.pipeline import eval_batches
from clip_jax.data.records import Record, Source
from clip_jax.data.synthetic import synthetic_batches

Batch = dict[str, np.ndarray]

_CHOICE = 0
_SYNTHETIC_SEED = 2**32


class HeldOutPairs(NamedTuple):
    """Pairs on which a run measures its loss.

    Attributes:
      batches: to this process's rows of all batches, each of config.eval.batch rows over all processes: `image`,
        `tokens` and `weight`, which is 0 for padding and for pairs that cannot be used.
      count: number of batches.
      pairs: number of pairs.
      description: a few words for the log.
    """

    batches: Callable[[], Iterator[Batch]]
    count: int
    pairs: int
    description: str


class Chosen:
    """Some records of a source, drawn once for all, in the source's order.

    Args:
      source: what they are drawn from.
      pairs: their number, or all of a source that has fewer.
    """

    def __init__(self, source: Source, pairs: int) -> None:
        self._source = source
        order = FullShuffle(len(source), seed=_CHOICE)
        self._index = sorted(order.locate(position).index for position in range(min(pairs, len(source))))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._index[index]]

    def __str__(self) -> str:
        return f"{len(self):,} held-out pairs of {self._source}"


def open_held_out(config: RunConfig) -> HeldOutPairs:
    """Opens what `config.eval.held_out` names.

    Raises:
      UserError: the data are not there or not image + text.
    """
    section, batch = held_out_source(config.data, config.eval), config.eval.batch
    pairs = config.eval.held_out_pairs or config.batch
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    if section.source == "synthetic":
        return HeldOutPairs(
            lambda: _synthetic(config, pairs, **process), -(-pairs // batch), pairs, f"{pairs:,} synthetic pairs"
        )
    chosen = Chosen(open_source(config, section), pairs)
    transform = fixed_transform_of(config)

    def batches() -> Iterator[Batch]:
        return eval_batches(chosen, transform=transform, batch=batch, on_bad=config.data.on_bad, **process)

    return HeldOutPairs(batches, -(-len(chosen) // batch), len(chosen), str(chosen))


def _synthetic(config: RunConfig, pairs: int, *, process_index: int, process_count: int) -> Iterator[Batch]:
    """Yields random pairs that are none of a run's."""
    batch, text = config.eval.batch, config.model.text
    rows = np.asarray(rows_of_process(batch, process_index, process_count))
    stream = synthetic_batches(
        batch=batch,
        image_size=config.model.vision.image_size,
        context=text.context,
        vocab_size=text.vocab_size,
        seed=_SYNTHETIC_SEED,
        process_index=process_index,
        process_count=process_count,
    )
    for start in range(0, pairs, batch):
        yield next(stream) | {"weight": (start + rows < pairs).astype(np.float32)}
