"""What may change between a checkpoint and the run that goes on with it: refused where it cannot be, else explained.

Steps count updates, and the position counts pairs. A run ends at the step config.samples / config.batch, and its
schedule goes by steps; so another batch in the middle of a run changes how many pairs it sees in all, which is said.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.checkpoints.record import Contents
from clip_jax.config import HELD_OUT_METRICS, RunConfig, as_json, describe_diff, diff, from_saved, model_diff
from clip_jax.errors import ConfigError, UserError
from clip_jax.training.optim import learning_rate

_ORDER = ("seed", "data.order", "data.streams", "data.block", "data.window", "data.mixture", "data.weight")
"""Keys that decide which pair is at a position, beside the data themselves."""

_OF_HELD_OUT = ("loss.kind", "eval.held_out", "eval.held_out_pairs")
_OF_ZERO_SHOT = ("eval.dataset", "eval.split", "eval.label_key", "eval.classes")
"""Keys on which an evaluation's numbers depend, beside the weights."""


def check_resumable(saved: Contents, config: RunConfig, *, step: int, where: Path) -> None:
    """Raises a UserError if a checkpoint holds another model than the config's, or more or less beside it; or if the
    config's steps are over, but not as the run's own end.

    Args:
      saved: as `Checkpoints.read_contents` gives it.
      config: the run's.
      step: the checkpoint's.
      where: the workdir, for the message.
    """
    before = _saved_config(saved)
    old, new = as_json(before), as_json(config)
    pixels = {key: values for key, values in diff(old["data"], new["data"]).items() if key in ("mean", "std")}
    if changes := model_diff(old["model"], new["model"]) | pixels:
        raise UserError(
            f"{where} holds checkpoints of another model: {describe_diff(changes)} (saved -> config); "
            "use another --workdir, or the config that the run began with"
        )
    for key in ("freeze", "mu_dtype"):
        _check_same(f"optim.{key}", old["optim"][key], new["optim"][key], where)
    _check_same("optim.ema_decay > 0", old["optim"]["ema_decay"] > 0, new["optim"]["ema_decay"] > 0, where)
    if config.batch != old["batch"] and config.steps <= step:
        raise UserError(
            f"config.batch is {config.batch}, and was {old['batch']} for the {step} steps of {where}: the run "
            f"has {config.steps} steps now (config.samples / config.batch), so nothing is left to do; "
            f"{_samples_for_the_rest(saved, before, config, step)}"
        )
    if config.steps < step:
        raise UserError(
            f"config.samples is {config.samples:,}, {config.steps} steps, and {where} is at step {step} already; "
            f"config.samples={step * config.batch} would end the run there"
        )


def describe_resume(saved: Contents, config: RunConfig, *, step: int, data: dict[str, Any]) -> list[str]:
    """Returns lines on where a run goes on, what changed since, and what that means.

    Args:
      saved: as `Checkpoints.read_contents` gives it.
      config: the run's.
      step: the checkpoint's.
      data: what identifies the training data.
    """
    before = _saved_config(saved)
    changes = diff(as_json(before), as_json(config))
    lines = [f"resuming at step {step}" + (f"; changed since: {describe_diff(changes)}" if changes else "")]
    if "batch" in changes:
        lines.append(_describe_batch(saved, before, config, step))
    if before.optim != config.optim or before.steps != config.steps:  # an unchanged run compiles nothing for this
        was, is_now = _rate(before, step), _rate(config, step)
        if not math.isclose(was, is_now, rel_tol=1e-3):
            lines.append(f"the learning rate goes on at {is_now:.3g}; without these changes it would at {was:.3g}")
    best = config.checkpoint.best_metric
    if best and best == before.checkpoint.best_metric and (measured := _measured_by(config, best) & changes.keys()):
        lines.append(
            f"{best} is measured otherwise from here on ({', '.join(sorted(measured))}): the best checkpoint until now "
            "stays until its number is beaten (config.checkpoint.best_metric), though these cannot be compared"
        )
    other_data = saved.metadata["data"] != json.loads(json.dumps(data))
    if other_data or any(key in changes for key in _ORDER):
        what = "data" if other_data else "order of the data"
        lines.append(
            f"the {what} changed after {saved.data['position']:,} pairs: in the epoch that was begun some pairs may "
            "come twice or not at all, and once in every later one"
        )
    return lines


def _measured_by(config: RunConfig, metric: str) -> set[str]:
    if metric not in HELD_OUT_METRICS:
        return {*_OF_ZERO_SHOT}
    return {*_OF_HELD_OUT} if config.eval.held_out_pairs else {*_OF_HELD_OUT, "batch"}


def _saved_config(saved: Contents) -> RunConfig:
    """Returns a checkpoint's config; keys that came later have their defaults."""
    try:
        return from_saved(saved.config)
    except ConfigError as error:
        raise UserError(f"the config of the newest checkpoint is not understood by this version: {error}") from None


def _rate(config: RunConfig, step: int) -> float:
    return float(np.asarray(learning_rate(config.optim, steps=config.steps)(step)))


def _describe_batch(saved: Contents, before: RunConfig, config: RunConfig, step: int) -> str:
    seen = _seen(saved)
    return (
        f"config.batch is another after {step} steps and {seen:,} pairs: steps count updates, so the schedule goes on "
        f"at step {step} of {config.steps} (config.samples / config.batch), and the run will have seen "
        f"{seen + (config.steps - step) * config.batch:,} pairs; {_samples_for_the_rest(saved, before, config, step)}"
    )


def _samples_for_the_rest(saved: Contents, before: RunConfig, config: RunConfig, step: int) -> str:
    rest = (before.steps - step) * before.batch
    samples = (step + rest // config.batch) * config.batch
    return f"config.samples={samples} would make it {_seen(saved) + rest:,}, as planned"


def _seen(saved: Contents) -> int:
    """Returns the pairs that a run was trained on: positions that it passed over are none."""
    position = saved.data["position"]
    return position - sum(max(0, min(end, position) - begin) for begin, end in saved.data["skips"])


def _check_same(key: str, old: Any, new: Any, where: Path) -> None:
    if old != new:
        raise UserError(
            f"{where} holds checkpoints of another optimizer state: {key} {old!r} -> {new!r} (saved -> config); "
            "go on with what the run began with, or start another --workdir from its weights (config.init_from)"
        )
