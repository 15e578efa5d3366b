"""What may change between a checkpoint and the run that goes on with it: refused where it cannot be, else explained.

Steps count updates, and the position counts pairs. `config.samples / config.batch` is the run's last step, so a batch
of another size, in the middle of a run, changes how many pairs the run sees; the schedule goes by steps.
"""

from pathlib import Path
from typing import Any

from clip_jax.config import RunConfig, as_json, describe_diff, diff, model_diff
from clip_jax.errors import UserError


def check_resumable(saved: dict[str, Any], config: RunConfig, *, where: Path) -> None:
    """Raises a UserError if a checkpoint holds another model than the config's, or more or less beside it.

    Args:
      saved: as `Checkpoints.read_config` gives it.
      config: the run's.
      where: the workdir, for the message.
    """
    changes = model_diff(saved["model"], as_json(config)["model"])
    if changes:
        raise UserError(
            f"{where} holds checkpoints of another model: {describe_diff(changes)} (saved -> config); "
            "use another --workdir, or the config that the run began with"
        )
    old, new = saved["optim"], as_json(config)["optim"]
    for key in ("freeze", "mu_dtype"):
        _check_same(f"optim.{key}", old.get(key), new[key], where)
    _check_same("optim.ema_decay > 0", old.get("ema_decay", 0) > 0, new["ema_decay"] > 0, where)


def _check_same(key: str, old: Any, new: Any, where: Path) -> None:
    if old != new:
        raise UserError(
            f"{where} holds checkpoints of another optimizer state: {key} {old!r} -> {new!r} (saved -> config); "
            "go on with what the run began with, or start another --workdir from its weights (config.init_from)"
        )


def describe_resume(
    saved: dict[str, Any],
    config: RunConfig,
    *,
    step: int,
    position: int,
    saved_data: dict[str, Any],
    data: dict[str, Any],
) -> list[str]:
    """Returns lines on where a run goes on, what changed since, and what that means.

    Args:
      saved: the checkpoint's config, as nested dicts.
      config: the run's.
      step: updates done.
      position: pairs consumed.
      saved_data: what identified the training data.
      data: what identifies them now.
    """
    changes = diff(saved, as_json(config))
    return [f"resuming at step {step}" + (f"; changed since: {describe_diff(changes)}" if changes else "")]
