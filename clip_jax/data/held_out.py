"""Held-out pairs: the same ones whenever they are read, by any number of processes, in any run."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from clip_jax.config import RunConfig, held_out_source
from clip_jax.data.loader import check_same, fixed_transform_of, open_source
from clip_jax.data.order import FullShuffle, rows_of_process
from clip_jax.data.pipeline import eval_batches
from clip_jax.data.reading import Subset
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


def choose(records: int, pairs: int) -> list[int]:
    """Returns the numbers of the held-out pairs among a source's records: drawn once for all, in the source's order.

    Args:
      records: of the source.
      pairs: how many, or all of a source that has fewer.
    """
    order = FullShuffle(records, seed=_CHOICE)
    return sorted(order.locate(position).index for position in range(min(pairs, records)))


def open_held_out(config: RunConfig) -> HeldOutPairs:
    """Opens what `config.eval.held_out` names.

    Raises:
      UserError: the data are not there or not image + text; or not the same in all processes.
    """
    section, batch = held_out_source(config.data, config.eval), config.eval.batch
    pairs = config.eval.held_out_pairs or config.batch
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    if section.source == "synthetic":
        return HeldOutPairs(
            lambda: _synthetic(config, pairs, **process), -(-pairs // batch), pairs, f"{pairs:,} synthetic pairs"
        )
    source = open_source(config, section)
    check_same("config.eval.held_out", [source])
    chosen = Subset(source, choose(len(source), pairs))
    transform = fixed_transform_of(config)

    def batches() -> Iterator[Batch]:
        return eval_batches(chosen, transform=transform, batch=batch, on_bad=config.data.on_bad, **process)

    description = f"{len(chosen):,} held-out pairs of {source}"
    return HeldOutPairs(batches, -(-len(chosen) // batch), len(chosen), description)


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
