"""A first check of a run: can it learn one batch by heart? A pipeline that cannot will not learn a data set either.

The real program, mesh and recipe, on the first batch again and again, without augmentation. Its contrastive loss must
come close to 0, or to what the batch allows: a caption that occurs k times in a batch costs each of its pairs at least
the loss of guessing among k. Where it does not, the check says what to look at.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.config import RunConfig
from clip_jax.data.loader import TrainingData, open_training_data
from clip_jax.data.records import REASONS
from clip_jax.errors import UserError
from clip_jax.run.fresh import fresh_state, initial_of
from clip_jax.training.losses import chance_loss, least_loss
from clip_jax.training.program import make_program
from clip_jax.training.step import place_batch

NEAR = 0.02
"""A loss is near its floor if it is above it by less than this share of the loss of guessing."""

_NAMES_SHOWN, _GROUPS_SHOWN = 4, 3


class Repeats(NamedTuple):
    """Pairs of a batch that share their caption, or their image.

    Attributes:
      what: `caption` or `image`.
      groups: record numbers of those that are the same; largest group first.
    """

    what: str
    groups: tuple[tuple[int, ...], ...]

    def floor(self, kind: Any, pairs: int) -> float:
        """Returns the loss that they cost at least, over so many pairs."""
        return math.fsum(len(group) * chance_loss(kind, len(group)) for group in self.groups) / pairs


class Overfit(NamedTuple):
    """What came of it.

    Attributes:
      config: of the check.
      metrics: of each step that was made.
      pairs: of the batch that count.
      repeats: among these.
      limit: the loss that had to be reached.
      reached: whether it was.
    """

    config: RunConfig
    metrics: tuple[dict[str, float], ...]
    pairs: int
    repeats: tuple[Repeats, ...]
    limit: float
    reached: bool


def check_config(config: RunConfig, *, steps: int) -> RunConfig:
    """Returns the config of a check: the run's, but as short, and with nothing random after the first weights.

    Warm-up takes a tenth of the steps at most, and the rate falls to 0 by a cosine: a cooldown may be longer than this.
    """
    optim = dataclasses.replace(
        config.optim,
        warmup_steps=min(config.optim.warmup_steps, steps // 10),
        schedule="cosine",
        cooldown_steps=0,
        end_lr=0.0,
        ema_decay=0.0,
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, patch_dropout=0.0),
        data=dataclasses.replace(config.data, workers=0, prefetch=1),
        optim=optim,
        samples=steps * config.batch,
    )


def overfit_one_batch(
    config: RunConfig, *, steps: int, say: Callable[[str], None], data: TrainingData | None = None
) -> Overfit:
    """Trains on the first batch until its loss is as near to 0 as it can be, or for `steps` steps.

    Args:
      config: of the run that is checked.
      steps: at most.
      say: shows a line to the user.
      data: training data instead of what `config.data` names.

    Raises:
      UserError: what `clip_jax.run.trainer.train` would refuse too; or a batch of which no two pairs can be used.
    """
    config = check_config(config, steps=steps)
    program = make_program(config)
    initial = initial_of(config, program)
    data = open_training_data(config, augmented=False) if data is None else data
    stream = data.batches(0)
    batch = next(stream)
    stream.close()
    pairs, repeats = _repeats(batch)
    if pairs < 2:
        raise UserError(
            f"of the first batch's {config.batch} pairs {pairs} can be used, and with less than 2 there is nothing to "
            f"learn ({_unused(batch, data.where)})"
        )
    floor = max((each.floor(config.loss.kind, pairs) for each in repeats), default=0.0)
    for line in _describe(repeats, floor, data.where):
        say(line)

    state, rows = fresh_state(program, initial), place_batch(batch, program.mesh)
    found: list[dict[str, float]] = []
    reached, limit = False, floor
    while len(found) < steps and not reached:
        state, metrics = program.train_step(state, rows)
        bias = float(jax.device_get(state.params["logit_bias"])) if config.model.logit_bias else 0.0
        found.append({name: float(value) for name, value in jax.device_get(metrics).items()} | {"logit_bias": bias})
        limit = _limit(config, found[-1], floor=floor, pairs=pairs)
        reached = found[-1]["loss"] <= limit
        if reached or len(found) in (1, steps) or len(found) % max(1, steps // 10) == 0:
            say(_line(len(found), steps, found[-1], limit))
        if found[-1]["skipped"]:
            break
    return Overfit(config, tuple(found), pairs, repeats, limit, reached)


def advice(found: Overfit) -> list[str]:
    """Returns what to look at where the loss was not reached, the likeliest first; with the values that it has."""
    config, last, optim = found.config, found.metrics[-1], found.config.optim
    losses, steps = [row["loss"] for row in found.metrics], len(found.metrics)
    lr, chance = optim.lr, chance_loss(config.loss.kind, found.pairs)
    if last["skipped"]:
        return [
            f"loss or gradients are not finite at step {steps}: lower config.optim.lr ({lr:g}), or look at the batch's "
            "images and at config.model.dtype"
        ]
    still = [name for name in ("image", "text") if last[f"gradient_norm/{name}"] == 0]
    slowed = f"config.optim.lr_multipliers={optim.lr_multipliers}"
    least = least_loss(config.loss.kind, found.pairs, scale=last["logit_scale"], bias=last["logit_bias"])
    cosine, most = max(last["image_cosine"], last["text_cosine"]), config.health.collapse_cosine
    tenth = max(1, steps // 10)
    before, after = np.mean(losses[-3 * tenth : -2 * tenth] or losses[:1]), np.mean(losses[-tenth:])
    points = [
        (bool(still), f"no gradient reaches the {' and the '.join(still)} tower: config.optim.freeze={optim.freeze}"),
        (bool(optim.lr_multipliers), f"some parameters have a rate of their own: {slowed}"),
        (
            config.loss.kind == "softmax" and least > NEAR * chance,
            f"the logit scale is {last['logit_scale']:.3g}, at which no features give less than {least:.3g}: lower "
            f"config.model.temperature ({config.model.temperature:g}), or take more steps for it to grow",
        ),
        (
            cosine > most,
            f"features of different pairs lie together (cosine {cosine:.2f}): images or captions that look all the "
            f"same to a tower, or config.optim.lr ({lr:g}) too high",
        ),
        (
            min(losses) < 0.7 * losses[-1],
            f"the loss was {min(losses):.3g} at step {losses.index(min(losses)) + 1} and rose again: lower "
            f"config.optim.lr ({lr:g}), or raise config.optim.warmup_steps",
        ),
        (
            after < 0.9 * before or losses[-1] < 0.5 * losses[0],
            f"it was falling: more --steps (these were {steps}), a higher config.optim.lr ({lr:g}), or a smaller "
            f"config.batch ({config.batch})",
        ),
        (
            losses[-1] > 0.8 * chance,
            f"it has hardly left the loss of guessing ({chance:.3g}): config.optim.lr ({lr:g}) too low or far too "
            f"high; clip_norm ({optim.clip_norm:g}) and weight_decay ({optim.weight_decay:g}); the captions",
        ),
    ]
    return [text for applies, text in points if applies] or [
        f"config.optim.lr ({lr:g}), weight_decay ({optim.weight_decay:g}), and what the images and captions look like"
    ]


def _limit(config: RunConfig, metrics: dict[str, float], *, floor: float, pairs: int) -> float:
    """Returns the loss from which on the batch counts as learnt.

    The sigmoid's has a floor of its own, which its scale and bias set, and these take longer than a check.
    """
    kind = config.loss.kind
    own = least_loss(kind, pairs, scale=metrics["logit_scale"], bias=metrics["logit_bias"]) if kind == "sigmoid" else 0
    return floor + own + NEAR * chance_loss(kind, pairs)


def _line(step: int, steps: int, metrics: dict[str, float], limit: float) -> str:
    return (
        f"step {step}/{steps}  loss {metrics['loss']:.4f} (must be under {limit:.4f})  accuracy "
        f"{metrics['accuracy']:.1%}  scale {metrics['logit_scale']:.2f}  gradient norms: image "
        f"{metrics['gradient_norm/image']:.2g}, text {metrics['gradient_norm/text']:.2g}"
    )


def _describe(repeats: Sequence[Repeats], floor: float, where: Callable[[int], str]) -> list[str]:
    """Returns a line for each kind of repeats, with the loss below which they let none fall."""
    lines = []
    for what, groups in repeats:
        shown = "; ".join(
            ", ".join(where(index) for index in group[:_NAMES_SHOWN]) + (", …" if len(group) > _NAMES_SHOWN else "")
            for group in groups[:_GROUPS_SHOWN]
        )
        more = "; …" if len(groups) > _GROUPS_SHOWN else ""
        lines.append(f"{sum(map(len, groups))} pairs share their {what} with another one: {shown}{more}")
    return lines + ([f"so the loss cannot fall under {floor:.4f}"] if lines else [])


def _unused(batch: dict[str, np.ndarray], where: Callable[[int], str]) -> str:
    """Returns some of this process's pairs that cannot be used, and why."""
    rows = np.flatnonzero(batch["bad"])[:_NAMES_SHOWN]
    return "; ".join(f"{where(int(batch['index'][row]))}: {REASONS[batch['bad'][row] - 1]}" for row in rows)


def _repeats(batch: dict[str, np.ndarray]) -> tuple[int, tuple[Repeats, ...]]:
    """Returns how many pairs of the whole batch count, and which of them are alike."""
    rows = np.stack([batch["weight"] > 0, batch["index"], _digests(batch["tokens"]), _digests(batch["image"])], axis=1)
    if jax.process_count() > 1:  # through JAX, which would cut 64 bits to 32
        rows = multihost_utils.process_allgather(rows.view(np.int32), tiled=True)
        rows = np.ascontiguousarray(rows).view(np.int64)
    rows = rows[rows[:, 0] > 0]
    found = [Repeats(what, _groups(rows[:, 1], rows[:, column])) for what, column in (("caption", 2), ("image", 3))]
    return len(rows), tuple(each for each in found if each.groups)


def _digests(rows: np.ndarray) -> np.ndarray:
    """Returns int64 [b], equal where rows are."""
    digests = [hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), np.int64)


def _groups(index: np.ndarray, digests: np.ndarray) -> tuple[tuple[int, ...], ...]:
    groups = [tuple(index[digests == each].tolist()) for each in np.unique(digests)]
    return tuple(sorted((group for group in groups if len(group) > 1), key=len, reverse=True))
