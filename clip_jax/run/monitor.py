"""From steps on the device to numbers that a person watches: metrics are read one step late, so that the next step is
already running while they are fetched.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax.chips import peak_of
from clip_jax.config import LogConfig, RunConfig, as_json
from clip_jax.console import Progress
from clip_jax.errors import one_line
from clip_jax.planning.utilization import StepFlops
from clip_jax.run.bad_records import BadRecords
from clip_jax.run.health import Health
from clip_jax.run.metrics import MetricWriter
from clip_jax.run.startup import Startup, describe_startup

_STATM = Path("/proc/self/statm")  # in pages; the second number is what is resident
_STEPS_WATCHED = 50

_LOG = logging.getLogger(__name__)


class Monitor:
    """Times steps, and sends their metrics to the console and to the files of the workdir; for use in `with`.

    Only process 0 shows and writes; the others still wait for their metrics, which bounds how far ahead they run.

    Attributes:
      has_read_pairs: whether any pair could be used so far, in any process.

    Args:
      config: the run's.
      workdir: where metrics go.
      start_step: updates done before this process.
      chance_loss: the loss of a model that knows nothing.
      where: record number to what to call it in messages.
      devices: on which the run is.
      startup: of this process, which ends with the first step.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        *,
        start_step: int,
        chance_loss: float,
        where: Callable[[int], str],
        devices: Sequence[jax.Device],
        startup: Startup | None = None,
    ) -> None:
        self._config, self._workdir = config, workdir
        self._start_step, self._chance_loss = start_step, chance_loss
        self._bad_records = BadRecords(workdir, where, batch=config.batch, max_share=config.data.max_bad_share)
        self._health = Health(config, workdir, where, say=self.print)
        self._devices, self._peak = len(devices), peak_of(devices[0].device_kind)
        self._flops = StepFlops.of(config, devices=self._devices)
        self._startup, self._of_startup = startup, dict[str, float]()
        self._steps_in_groups: list[float] | None = []
        self._failed_evaluations = 0
        self.has_read_pairs = False
        self._alarms: dict[str, float] = {}
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._progress: Progress | None = None
        self._writer: MetricWriter | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Monitor":
        if jax.process_index() == 0:
            log = self._config.log
            self._writer = self._stack.enter_context(
                MetricWriter(
                    self._workdir,
                    tensorboard=log.tensorboard,
                    wandb=wandb_arguments(log, self._workdir),
                    run_config=as_json(self._config),
                )
            )
            self._progress = self._stack.enter_context(
                Progress(
                    self._config.steps,
                    start_step=self._start_step,
                    chance_loss=self._chance_loss,
                    log_every=log.every,
                )
            )
        self._begin_window()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as data-wait."""
        self._lap("state")
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._lap("data")

    def started(self, step: int, position: int, batch: Mapping[str, np.ndarray]) -> None:
        """Takes this process's rows of a step's batch, which begins at `position`, to name those that go wrong."""
        self._bad_records.note(step, batch)
        self._health.note(step, position, batch)

    def finished(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step that was just started, and reads those of the step before.

        Raises:
          UserError: too many pairs could not be used.
          Rewind: too many steps were skipped.
        """
        if self._startup is not None:
            self._end_startup(self._startup, metrics)
        previous, self._pending = self._pending, (step, metrics)
        if previous is not None:
            self._read(*previous)

    def flush(self) -> None:
        """Reads the metrics that are still on the device."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._read(*previous)

    def rewound(self, step: int) -> None:
        """Forgets what is pending: the run goes on from an earlier step."""
        self._pending, self._start_step = None, step
        self._begin_window()

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes other numbers of a step, such as an evaluation's."""
        if self._writer is not None:
            self._writer.write(step, scalars)

    def evaluation_failed(self, step: int, error: Exception) -> None:
        """Logs an evaluation's error, the first one with its traceback, and counts it in the metrics."""
        self._failed_evaluations += 1
        first = self._failed_evaluations == 1
        _LOG.error("the evaluation after step %d failed: %s", step, one_line(error), exc_info=error if first else None)
        self.record(step, {"evaluation_failed": float(self._failed_evaluations)})

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Keeps the time inside, such as an evaluation's, out of the step times; reads what is pending first."""
        self.flush()
        began = time.perf_counter()
        yield
        self._window_began += time.perf_counter() - began

    def sync(self) -> None:
        """Puts on disk what was written so far, so that the metrics are as safe as a checkpoint."""
        if self._writer is not None:
            self._writer.flush()

    def print(self, text: str) -> None:
        """Shows a line above the progress bar."""
        if self._progress is not None:
            self._progress.print(text)

    def _lap(self, name: str) -> None:
        if self._startup is not None:
            self._startup.lap(name)

    def _end_startup(self, startup: Startup, metrics: Mapping[str, jax.Array]) -> None:
        """Waits for the first step, once: its call has returned, so that what was left to do was compiling."""
        startup.lap("compile")
        jax.block_until_ready(metrics)
        startup.lap("first_step")
        self._of_startup, self._startup = startup.metrics(), None
        self.print(describe_startup(self._of_startup))

    def _read(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.has_read_pairs |= values["pairs"] > 0
        values = self._bad_records.count(values)
        values = self._health.judge(step, values)
        values |= self._since_last_row(values)
        self._window_steps += 1
        values |= self._of_startup or self._speed()  # the step that was compiled says nothing of how fast steps are
        self._of_startup = {}
        self._watch_groups(values.get("text_groups", 1.0))
        if self._progress is not None:
            self._progress.update(step, values)
        if step % self._config.log.every == 0 or step in (self._start_step + 1, self._config.steps):
            self.record(step, values | memory_in_use(jax.local_devices()[0].memory_stats()))
            self._begin_window()

    def _since_last_row(self, values: Mapping[str, float]) -> dict[str, float]:
        """Returns the alarms, 1 if one was on at any step that has no row of its own."""
        on = {name: value for name, value in values.items() if name.startswith("alarm/")}
        self._alarms = {name: max(value, self._alarms.get(name, 0.0)) for name, value in on.items()}
        return self._alarms

    def _begin_window(self) -> None:
        self._alarms = {}
        self._window_began, self._window_steps, self._waited = time.perf_counter(), 0, 0.0

    def _speed(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._window_began
        step_time = elapsed / self._window_steps
        return {
            "step_time": step_time,
            "samples_per_second": self._config.batch / step_time,
            "data_wait": min(1.0, self._waited / elapsed),
            **self._flops.rates(step_time, devices=self._devices, peak=self._peak),
        }

    def _watch_groups(self, fitted: float) -> None:
        """Says once, after some steps, where captions often do not fit into their groups."""
        if self._steps_in_groups is None:
            return
        self._steps_in_groups.append(fitted)
        if len(self._steps_in_groups) == _STEPS_WATCHED:
            share = sum(self._steps_in_groups) / _STEPS_WATCHED
            self._steps_in_groups = None
            if share < 0.9:
                self.print(
                    f"captions fitted config.text_groups in {share:.0%} of {_STEPS_WATCHED} steps, and the others were "
                    "computed in the whole context; `clip-jax data lengths --config=…` says which groups would fit"
                )


def memory_in_use(device: Mapping[str, int] | None) -> dict[str, float]:
    """Returns what memory is taken, as metrics, in GiB.

    `memory/host_gib` is what this process has in the host's, its data workers not counted, on Linux;
    `memory/device_peak_gib` the most that a device has had in use, where its runtime counts it, as on GPUs and TPUs.

    Args:
      device: its `memory_stats()`.
    """
    found = {"device_peak": (device or {}).get("peak_bytes_in_use")}
    if _STATM.exists():
        found["host"] = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {f"memory/{name}_gib": size / 2**30 for name, size in found.items() if size is not None}


def wandb_arguments(log: LogConfig, workdir: Path) -> dict[str, Any] | None:
    """Returns what `wandb.init` is given, or None where W&B is off."""
    if not log.wandb_project:
        return None
    return {"project": log.wandb_project, "name": log.wandb_name or workdir.name}
