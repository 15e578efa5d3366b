"""How long the captions of a run are, and the groups that fit them; see `clip_jax.models.text_groups`."""

import itertools
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from clip_jax.config import RunConfig, data_sources
from clip_jax.data.loader import Batches, open_part
from clip_jax.data.pipeline import train_batches
from clip_jax.data.records import REASONS, Record
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.data.transforms import Example, Tokenize
from clip_jax.errors import UserError
from clip_jax.models.flops import grouped_text_flops, text_flops
from clip_jax.models.text_groups import groups_of

_PARTS = 10_000


@dataclass(frozen=True)
class CaptionTransform:
    """A record to the tokens that training would see of it; images stay encoded."""

    tokenizer: Tokenize
    context: int

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        """Returns `tokens`, int32 [l]."""
        return {"tokens": self.tokenizer([record.draw_caption(rng)], context=self.context)[0]}

    def blank(self) -> Example:
        """Returns a row of zeros."""
        return {"tokens": np.zeros(self.context, np.int32)}


def caption_lengths(config: RunConfig, count: int) -> np.ndarray:
    """Returns the lengths of a run's first captions, SOT and EOT counted.

    Args:
      config: the run's.
      count: captions to read; some more are taken to fill a batch, and those without a caption are left out.

    Raises:
      UserError: the data are not there, or are random pairs.
    """
    if config.data.source == "synthetic" and not config.data.mixture:
        raise UserError("config.data.source is 'synthetic', whose captions are made up; name a dataset")
    parts = [open_part(config, data) for data in data_sources(config.data)]
    unit = max(part.order.streams for part in parts)
    batch = -(-min(count, 1_024) // unit) * unit

    def batches() -> Batches:
        yield from train_batches(
            parts,
            transform=CaptionTransform(Tokenizer(), config.model.text.context),
            batch=batch,
            seed=config.seed,
            threads=config.data.threads,
            connections=config.data.connections,
        )

    with closing(batches()) as stream:
        rows = [next(stream) for _ in range(-(-count // batch))]
    lengths = np.concatenate([part["tokens"].argmax(axis=1)[part["weight"] > 0] + 1 for part in rows])
    if not len(lengths):
        reasons = np.bincount(np.concatenate([part["bad"] for part in rows]))
        raise UserError(f"none of the pairs can be used; most often the reason is {REASONS[reasons.argmax() - 1]!r}")
    return lengths


def describe_lengths(lengths: np.ndarray, config: RunConfig, *, devices: int) -> str:
    """Returns a few lines: the lengths, and the groups that fit them, as an override.

    Args:
      lengths: as `caption_lengths` gives them.
      config: the run's.
      devices: of the run.

    Raises:
      UserError: more devices than captions in a step.
    """
    rows, context = (config.micro_batch or config.batch) // devices, config.model.text.context
    if not rows:
        raise UserError(
            f"--devices={devices}: a step has {config.micro_batch or config.batch} captions for all of them"
        )
    quantiles = ", ".join(f"{share:.0%} up to {np.quantile(lengths, share):.0f}" for share in (0.5, 0.9, 0.99))
    lines = [f"{len(lengths):,} captions of {lengths.mean():.1f} tokens, SOT and EOT counted: {quantiles}"]
    chosen = choose_groups(lengths, rows=rows, context=context)
    override = f'--config.text_groups="({",".join(chosen)},)"' if chosen else "--config.text_groups=()"
    for what, entries in (("the config's text_groups", config.text_groups), (override, chosen)):
        groups = groups_of(entries, rows=rows, context=context)
        share = grouped_text_flops(config.model, groups) / text_flops(config.model)
        lines.append(f"{what}: {share:.2f} of the text tower's operations, with {rows:,} captions a device")
    return "\n".join(lines)


def choose_groups(lengths: np.ndarray, *, rows: int, context: int, most: int = 4, deviations: float = 4.0) -> list[str]:
    """Returns the entries of `config.text_groups` that leave the fewest tokens to compute.

    Every group and those behind it have room for the captions that are too long for the ones before, and for some
    standard deviations more: a batch's captions are a sample.

    Args:
      lengths: of captions that were seen, SOT and EOT counted.
      rows: captions of a device.
      context: the whole length.
      most: groups, besides the one of the whole length.
      deviations: how many; 4 are exceeded once in 30,000 times, on each device, at each length.
    """
    steps = range(8, context, 8)
    within = {length: _rows_within(lengths, length, rows, deviations) for length in steps}
    usable = [length for length in steps if within[length]]
    best: tuple[int, ...] = min(
        (chosen for count in range(most + 1) for chosen in itertools.combinations(usable, count)),
        key=lambda chosen: _tokens(chosen, within, rows, context),
    )
    bounds = [0, *(math.ceil(within[length] / rows * _PARTS - 1e-9) for length in best)]  # in 10,000ths, no row lost
    shares = [(after - before) / _PARTS for before, after in itertools.pairwise(bounds)]
    return [f"{length}:{share:g}" for length, share in zip(best, shares, strict=True) if share]


def _rows_within(lengths: np.ndarray, length: int, rows: int, deviations: float) -> int:
    """Returns how many rows can be counted on to be no longer than this."""
    short = float(np.mean(lengths <= length))
    return max(0, math.floor(rows * short - deviations * math.sqrt(rows * short * (1 - short)) - (short < 1)))


def _tokens(chosen: Sequence[int], within: dict[int, int], rows: int, context: int) -> int:
    total, used = 0, 0
    for length in chosen:
        total, used = total + (within[length] - used) * length, within[length]
    return total + (rows - used) * context
