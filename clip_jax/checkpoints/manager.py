"""Orbax's manager of a run's checkpoints: when it writes, what it keeps, and what must not be left to it."""

import functools
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from clip_jax.checkpoints.record import ITEMS
from clip_jax.config import CheckpointConfig
from clip_jax.errors import UserError


def open_manager(folder: Path, config: CheckpointConfig) -> ocp.CheckpointManager:
    """Opens, and makes, the folder of checkpoints.

    Raises:
      UserError: it cannot be written.
    """
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=_when(config),
        preservation_policy=_which(config),
        best_fn=_metric_of(config) if config.best_metric else None,
        async_options=ocp.AsyncOptions(timeout_secs=math.ceil(config.timeout_s)),
    )
    _hush_lost_tasks()
    try:
        _remove_unfinished(folder)
        return _Manager(folder, options=options, item_names=ITEMS)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}; make that possible, or use another --workdir"
        ) from None


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask JAX whether the run shall end.

    It would count by steps, and a thread of it by a step that is over, in the one counter by which processes agree
    where to end: `Preemption` counts its own calls there, which are fewer in a run that was resumed.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def _when(config: CheckpointConfig) -> policies.AnySavePolicy:
    """Returns Orbax's policy: by steps, which all processes count alike, or by process 0's clock, which it tells."""
    chosen: list[Any] = [policies.FixedIntervalPolicy(config.every)]
    if config.minutes:
        chosen.append(policies.ContinuousCheckpointingPolicy(minimum_interval_secs=round(60 * config.minutes)))
    return policies.AnySavePolicy(chosen)


def _which(config: CheckpointConfig) -> policies.AnyPreservationPolicy:
    """Returns Orbax's policy of what is kept."""
    chosen: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every:
        chosen.append(policies.EveryNSteps(config.keep_every))
    if config.best_metric:
        best = {"reverse": config.best_mode == "min", "n": 1, "keep_checkpoints_without_metrics": False}
        chosen.append(policies.BestN(get_metric_fn=_metric_of(config), **best))
    return policies.AnyPreservationPolicy(chosen)


def _metric_of(config: CheckpointConfig) -> Callable[[Mapping[str, float]], float]:
    """Returns what orders checkpoints; those without the metric, or with NaN, are the worst."""
    worst = math.inf if config.best_mode == "min" else -math.inf

    def metric(metrics: Mapping[str, float]) -> float:
        value = metrics.get(config.best_metric, worst)
        return worst if math.isnan(value) else value

    return metric


def _remove_unfinished(folder: Path) -> None:
    """Removes what writes left that were killed or failed.

    Orbax can do so too, but not while other threads of a write that failed still create files: its next save then fails
    as well.
    """
    for _ in range(20):
        left = list(folder.glob("*.orbax-checkpoint-tmp")) if jax.process_index() == 0 else []
        if not left:
            return
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


@functools.cache
def _hush_lost_tasks() -> None:
    """Keeps the many small tasks of a write that failed, which nobody waits for any more, from reporting one by one.

    The write's own error is told; theirs would bury it under a thousand lines.
    """
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.msg or "orbax" not in record.getMessage()
    )
