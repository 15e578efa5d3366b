"""Runs as they lie on disk: their config, how far they came, and what they measured."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.config import (
    HELD_OUT_METRICS,
    CheckpointConfig,
    DistributedConfig,
    HealthConfig,
    LogConfig,
    RunConfig,
    from_saved,
)
from clip_jax.errors import ConfigError, UserError
from clip_jax.files import json_object, steps_in
from clip_jax.run import metrics

CONFIG, RESULTS = "config.json", "zero_shot.json"
EVALUATIONS = ("zero_shot/", "held_out/")
"""How the names of what evaluations measure begin."""


@dataclass(frozen=True)
class FinishedRun:
    """What is known of a run.

    Attributes:
      workdir: its folder.
      config: that it was last started with.
      rows: its metrics, as `metrics.read` gives them.
    """

    workdir: Path
    config: RunConfig
    rows: Sequence[Mapping[str, Any]]

    @property
    def steps(self) -> int:
        """Steps whose metrics are there."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def samples(self) -> int:
        """Pairs seen."""
        return self.steps * self.config.batch

    @property
    def seconds(self) -> float:
        """Time spent in steps; compilation and evaluation are left out."""
        timed = [(row["step"], row["step_time"]) for row in self.rows if "step_time" in row]
        before = [0, *(step for step, _ in timed)]
        return sum((step - last) * step_time for last, (step, step_time) in zip(before, timed, strict=False))

    @property
    def missing(self) -> str:
        """What it lacks of a finished run; empty where it is one."""
        if self.steps < self.config.steps:
            return f"{self.steps} of {self.config.steps} steps"
        names = [name for name in self.config.eval.metrics if name not in self.rows[-1]]
        return f"its evaluation at the end ({', '.join(names)}); the same command makes it" if names else ""

    @property
    def revision(self) -> str:
        """Of the code that wrote its newest checkpoint, by git; empty where that is not known."""
        checkpoints = self.workdir / "checkpoints"
        try:
            newest = str(steps_in(checkpoints)[0])
            record = json_object((checkpoints / newest / "metadata" / "metadata").read_bytes(), {"git_revision": str})
            return record["git_revision"]
        except (OSError, ValueError, LookupError):
            return ""

    def results(self) -> dict[str, float]:
        """Returns final numbers: `loss`, the mean over the last twentieth of the run, and its last evaluation's.

        A step that was skipped, whose loss is no number or is of no pair, does not count.
        """
        of_steps = [row for row in self.rows if "loss" in row and row["step"] > 0.95 * self.steps]
        last = [row["loss"] for row in of_steps if math.isfinite(row["loss"]) and row.get("pairs", 1)]
        found = {"loss": sum(last) / len(last) if last else math.nan} if of_steps else {}
        return found | {name: value for name, value in self.rows[-1].items() if name.startswith(EVALUATIONS)}


@dataclass(frozen=True)
class RunArm:
    """Runs that differ in nothing but their seeds.

    Attributes:
      name: of the arm.
      runs: by seed.
    """

    name: str
    runs: Mapping[int, FinishedRun]

    @property
    def config(self) -> RunConfig:
        """Of any seed."""
        return next(iter(self.runs.values())).config


def read_config(workdir: Path) -> RunConfig | None:
    """Returns the config in a workdir; None where no run was started in it.

    Raises:
      UserError: a config that is damaged, or has keys that this version does not know.
    """
    file = workdir / CONFIG
    if not file.exists():
        return None
    try:
        return from_saved(json_object(file.read_bytes()))
    except ConfigError as error:
        raise UserError(f"{file}: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a run's config: {error}") from None


def is_finished(workdir: Path, config: RunConfig) -> bool:
    """Returns whether a run has come to its config's end: its last checkpoint and its final evaluation are there."""
    from clip_jax.checkpoints.checkpoint import Checkpoints  # Orbax takes seconds to import, and comparing does without

    evaluated = not config.eval.dataset or (workdir / RESULTS).exists()
    if config.eval.held_out:
        evaluated &= any(HELD_OUT_METRICS[0] in row for row in metrics.read(workdir) if row["step"] == config.steps)
    return evaluated and Checkpoints(workdir, config.checkpoint).latest() == config.steps


def find_runs(folders: Iterable[Path]) -> list[FinishedRun]:
    """Returns the runs in folders, which are workdirs or lie above workdirs; each once, in natural order.

    Raises:
      UserError: a folder that holds none.
    """
    workdirs: dict[Path, Path] = {}
    for folder in folders:
        found = sorted(_workdirs(folder), key=_natural)
        if not found:
            raise UserError(f"{folder} holds no run: there is no {CONFIG} in it or in a folder below")
        workdirs |= {path.resolve(): path for path in found}
    return [_read_run(path) for path in workdirs.values()]


def group_by_arm(runs: Sequence[FinishedRun]) -> list[RunArm]:
    """Returns runs by what their configs say beside the seed, in order of appearance.

    Raises:
      UserError: the same run twice.
    """
    groups: dict[RunConfig, dict[int, FinishedRun]] = {}
    for run in runs:
        group = groups.setdefault(compared_config(run.config), {})
        if run.config.seed in group:
            raise UserError(
                f"{group[run.config.seed].workdir} and {run.workdir} are the same run, seed {run.config.seed} of one "
                "config; name one of them"
            )
        group[run.config.seed] = run
    names = [_arm_name(list(group.values())) for group in groups.values()]
    repeated = {name for name in names if names.count(name) > 1}
    return [
        RunArm(str(next(iter(group.values())).workdir) if name in repeated else name, dict(sorted(group.items())))
        for name, group in zip(names, groups.values(), strict=True)
    ]


def compared_config(config: RunConfig) -> RunConfig:
    """Returns the config without what makes no other run of it: seed, logging, checkpoints, processes, and the folder
    of compiled programs and the grace period, which the launch files set."""
    return dataclasses.replace(
        config,
        seed=0,
        log=LogConfig(),
        checkpoint=CheckpointConfig(),
        distributed=DistributedConfig(),
        compilation_cache="",
        health=dataclasses.replace(config.health, grace_s=HealthConfig.grace_s),
    )


def _read_run(workdir: Path) -> FinishedRun:
    config = read_config(workdir)
    assert config is not None  # _workdirs looked for it
    return FinishedRun(workdir, config, metrics.read(workdir))


def _workdirs(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        if CONFIG in files:
            folders.clear()  # a workdir's checkpoints are thousands of files
            yield Path(path)


def _arm_name(runs: Sequence[FinishedRun]) -> str:
    """The folder above `seed0`, `seed1`, … as sweeps make them; else the names of the workdirs."""
    parents = {run.workdir.resolve().parent for run in runs}
    names = [run.workdir.resolve().name for run in runs]
    if len(parents) == 1 and all(re.fullmatch(r"seed\d+", name) for name in names):
        return parents.pop().name
    return ", ".join(names)


def _natural(path: Path) -> list[Any]:
    """Sorts run2 before run10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))]
