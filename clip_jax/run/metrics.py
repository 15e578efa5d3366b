"""Metrics of a run: JSON lines always, TensorBoard and Weights & Biases if asked for.

`metrics.jsonl` holds one object a line, `{"step": 3, "loss": 2.5}`. Floats are written so that they read back to the
same bits; NaN and the infinities as Python's `json` writes them (NaN, Infinity, -Infinity). A process that is killed
leaves at most one torn line, which the next one ends before it appends.
"""

import importlib.util
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, runtime_checkable

from clip_jax.errors import UserError, one_line
from clip_jax.files import json_object

FILE = "metrics.jsonl"
TENSORBOARD_FLUSH_SECONDS = 10.0
_LOST = "%s cannot be written: %s; training goes on, and its lines are lost while that lasts"
_LOG = logging.getLogger(__name__)


@runtime_checkable
class Backend(Protocol):
    """A place that metrics go to."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the numbers of a step."""

    def flush(self) -> None:
        """Sends what is buffered to where it outlives the process."""

    def close(self) -> None:
        """Writes what is buffered and lets go."""


class MetricWriter:
    """Writes scalars to all backends; for use in `with`.

    A failure of TensorBoard or W&B is logged once and turns that backend off: training goes on.

    Args:
      workdir: gets `metrics.jsonl` and the folder `tensorboard`.
      tensorboard: whether to write TensorBoard events.
      wandb: arguments of `wandb.init`; None means off.
      run_config: the run's config, for W&B.

    Raises:
      UserError: W&B is asked for and not installed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._backends: list[Backend] = []
        if wandb is not None:
            self._open_wandb(workdir, wandb, run_config)
        if tensorboard:
            self._open_tensorboard(workdir / "tensorboard")
        self._lines = JsonLines(workdir / FILE)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Writes the numbers of a step, Python's or numpy's."""
        values = {name: float(value) for name, value in scalars.items()}
        self._lines.write(step, values)
        for backend in list(self._backends):
            self._try(backend, lambda backend=backend: backend.write(step, values))

    def flush(self) -> None:
        """Sends what is buffered to disk."""
        self._lines.flush()
        for backend in list(self._backends):
            self._try(backend, backend.flush)

    def close(self) -> None:
        """Closes all backends; a second call does nothing."""
        for backend in list(self._backends):
            self._try(backend, backend.close)
        self._backends.clear()
        self._lines.close()

    def _open_wandb(self, workdir: Path, arguments: Mapping[str, Any], run_config: Mapping[str, Any] | None) -> None:
        try:
            self._backends.append(WandbBackend(workdir, arguments, run_config))
        except UserError:
            raise
        except Exception as error:
            _warn_off(WandbBackend, error, "; `wandb login` gives it a key, WANDB_MODE=offline lets it do without")

    def _open_tensorboard(self, folder: Path) -> None:
        if importlib.util.find_spec("tensorboardX") is None:
            _LOG.warning("tensorboardX is not installed; no TensorBoard events are written")
            return
        try:
            self._backends.append(TensorBoardBackend(folder))
        except Exception as error:
            _warn_off(TensorBoardBackend, error)

    def _try(self, backend: Backend, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of any kind: these libraries talk to disks and networks
            self._backends.remove(backend)
            _warn_off(type(backend), error)


class Unwritten:
    """Says once that a file's lines cannot be written, as on a full disk, and lets go on; for use in `with`.

    Args:
      path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._is_said = path, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, *_: object) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self._is_said:
            _LOG.warning(_LOST, self._path, error.strerror)
        self._is_said = True
        return True


class JsonLines:
    """`metrics.jsonl`, opened for appending."""

    def __init__(self, path: Path) -> None:
        _end_torn_line(path)
        self._file, self._unwritten = path.open("a", encoding="utf-8"), Unwritten(path)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line, at once."""
        with self._unwritten:
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            self._file.flush()

    def flush(self) -> None:
        """Waits until the disk has the lines, against a failure of the machine."""
        with self._unwritten:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with self._unwritten:
            self._file.close()


class TensorBoardBackend:
    """TensorBoard event files, by tensorboardX.

    Written in the calling thread: the thread of tensorboardX's `SummaryWriter` dies of a full disk in silence, and the
    run then waits forever for room in its queue.
    """

    def __init__(self, folder: Path) -> None:
        with _torch_hidden():
            from tensorboardX.event_file_writer import EventsWriter
        folder.mkdir(parents=True, exist_ok=True)
        # its names tell seconds: without a suffix of its own, a run restarted at once would overwrite the last one's
        self._writer = EventsWriter(str(folder / "events"), filename_suffix="." + secrets.token_hex(4))
        self._flush_due = 0.0

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one point to every scalar's curve."""
        from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore

        points = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))
        if time.monotonic() >= self._flush_due:  # not always: each one waits for the disk
            self.flush()

    def flush(self) -> None:
        """Writes what is buffered."""
        self._writer.flush()
        self._flush_due = time.monotonic() + TENSORBOARD_FLUSH_SECONDS

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


class WandbBackend:
    """A Weights & Biases run; its curves are over our own `step`, for W&B's only grows, and drops what is before it.

    A step comes again when a run goes back to a checkpoint.
    """

    def __init__(self, workdir: Path, arguments: Mapping[str, Any], run_config: Mapping[str, Any] | None) -> None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise UserError(
                "config.log.wandb_project is set, and the package wandb is not installed: pip install wandb"
            ) from None
        options = {"dir": str(workdir), "id": _wandb_id(workdir), "resume": "allow", "config": dict(run_config or {})}
        self._run = wandb.init(**(options | dict(arguments)))
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs the scalars."""
        self._run.log({"step": step, **scalars})

    def flush(self) -> None:
        """Does nothing: W&B's own process sends what it was given."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def read(workdir: Path) -> list[dict[str, Any]]:
    """Returns one dict a step, in order, with `step` and every scalar written for it.

    Where a step was written twice, as after a resume, the later line holds. What was written of later steps before a
    line is of a run that went back since, or of a longer one that this is a copy of, and left out. A line that is
    torn, or no row of numbers, is passed over.
    """
    path = workdir / FILE
    by_step: dict[int, dict[str, Any]] = {}
    last = -1
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json_object(line, {...: int | float})
        except ValueError:
            continue
        if not 0 <= row.get("step", -1) < math.inf:
            continue
        if row["step"] < last:
            by_step = {step: scalars for step, scalars in by_step.items() if step <= row["step"]}
        last = row["step"]
        by_step.setdefault(last, {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def _warn_off(backend: type, error: Exception, advice: str = "") -> None:
    _LOG.warning(
        "%s failed and is off from here on: %s: %s%s", backend.__name__, type(error).__name__, one_line(error), advice
    )


def _wandb_id(workdir: Path) -> str:
    """Returns the id under which W&B knows the run of this workdir, so that a resumed run goes on in its curves."""
    file = workdir / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    return file.read_text()


@contextmanager
def _torch_hidden() -> Iterator[None]:
    """Keeps tensorboardX from importing torch where that is installed: seconds and memory for nothing."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyrefly: ignore
    try:
        yield
    finally:
        del sys.modules["torch"]


def _end_torn_line(path: Path) -> None:
    if path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
        with path.open("a") as file:
            file.write("\n")
