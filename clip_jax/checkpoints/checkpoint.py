"""Checkpoints of a run: state, data position, config and metadata together, written by Orbax in the background.

What a run is, is in them: random keys are functions of (config.seed, step), and data of (config.seed, position), so no
generator has a state to keep.

Orbax writes, and chooses when and what is kept; what is read is judged here. Orbax lists any directory with a numeric
name as a checkpoint, also an empty or half-deleted one, and restores a flipped bit as a wrong weight without a word. So
a fifth item, the record, holds a checksum for every leaf and every other item; what does not agree with it is set aside
under another name, and the checkpoint before it is taken.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from clip_jax.checkpoints.checksum import checksums
from clip_jax.checkpoints.manager import open_manager
from clip_jax.checkpoints.record import (
    METRICS,
    Contents,
    DamagedError,
    IncompleteError,
    averages_statistics,
    check_same_leaves,
    check_sums,
    judged,
    make_metadata,
    make_record,
    read_contents,
    reason,
)
from clip_jax.config import CheckpointConfig, RunConfig, as_json
from clip_jax.errors import UserError
from clip_jax.files import steps_in
from clip_jax.processes.distributed import any_process, from_first
from clip_jax.training.state import TrainState

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class Restored(NamedTuple):
    """What a run goes on with.

    Attributes:
      state: on its mesh.
      position: pairs consumed, over all processes.
      skips: ranges [begin, end) of positions whose samples are never consumed again.
    """

    state: TrainState
    position: int
    skips: tuple[tuple[int, int], ...] = ()


class Checkpoints:
    """The checkpoints of one workdir; for use in `with`, which ends with all written, or an error.

    Args:
      workdir: the run's folder; the checkpoints lie in `workdir/checkpoints`, made at the first `save`.
      config: when they are written, and when old ones go.
      on_change: called when one was written, or may have been, or when others were abandoned for it.
    """

    def __init__(
        self, workdir: Path, config: CheckpointConfig, *, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._folder = workdir.absolute() / "checkpoints"
        self._config = config
        self._on_change = on_change
        self._open_manager: ocp.CheckpointManager | None = None
        self._writing: int | None = None
        self._is_told = False
        self._failure: UserError | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()
        elif jax.process_count() == 1:  # else the others may be gone, and with them the end of what is being written
            self._settle(wait=True)
            self._close_manager()

    def steps(self) -> list[int]:
        """Returns the numbers of the folder's directories, largest first, whole or not; writes nothing."""
        return steps_in(self._folder)

    def latest(self) -> int | None:
        """Returns the newest checkpoint's step whose parts are all there, or None; reads no arrays, writes nothing."""
        for step in self.steps():
            try:
                self.read_contents(step)
                return step
            except DamagedError as error:
                _LOG.warning("checkpoint %s %s; it is passed over", self._folder / str(step), error)
        return None

    def read_contents(self, step: int) -> Contents:
        """Reads all of a checkpoint but its arrays; writes nothing.

        Raises:
          DamagedError: a part is missing, or is not what was written.
        """
        return read_contents(self._folder / str(step))

    def restore(self, step: int, target: TrainState) -> Restored:
        """Reads a checkpoint onto the mesh of `target`; collective over processes.

        An average that lacks statistics, see `averages_statistics`, begins with those that were trained.

        Args:
          step: as `latest` gives it.
          target: shapes, dtypes and shardings, as `abstract_state` gives them.

        Raises:
          DamagedError: it is not what was written, bit for bit.
          UserError: it holds other leaves than `target`, or cannot be read for a reason outside of it.
        """
        contents, state = self._everywhere(functools.partial(self._read_state, step, target))
        check_sums(checksums(state), contents.leaves)
        if "batch_stats" in target.ema and "batch_stats" not in state.ema:
            statistics = jax.tree.map(jnp.copy, state.batch_stats)
            state = state.replace(ema={"params": state.ema, "batch_stats": statistics})
        skips = tuple((int(begin), int(end)) for begin, end in contents.data["skips"])
        return Restored(state, contents.data["position"], skips)

    def restore_latest(self, target: TrainState) -> tuple[int, Restored] | None:
        """Reads the newest checkpoint that is what was written; collective over processes.

        Newer ones that are not are set aside as `damaged-<step>`, with a warning.

        Returns:
          Its step and what it holds, or None where the run never had a checkpoint.

        Raises:
          UserError: there are checkpoints, and none can be used.
        """
        found = self._restore_newest(target, before=None)
        if found is None and (damaged := sorted(path.name for path in self._folder.glob("damaged-*"))):
            raise UserError(
                f"{self._folder} holds no checkpoint that can be used, and damaged ones: {', '.join(damaged)}; bring a "
                "good one back, or remove them (or name another --workdir) to begin anew"
            )
        return found

    def restore_before(self, step: int, target: TrainState) -> tuple[int, Restored] | None:
        """Reads the newest good checkpoint of an earlier step than `step`, for a run that goes back to it.

        Where newer ones have taken the place of those, the newest of all: `step` and all since were skipped, which
        changed nothing that is learnt. Others from `step` on are set aside as `abandoned-<step>`: a later start must
        not find them.

        Returns:
          Its step and what it holds, or None where there is none.
        """
        self._settle(wait=True)
        found = self._restore_newest(target, before=step) or self._restore_newest(target, before=None)
        kept = found[0] if found else 0
        for later in [later for later in self.steps() if later > kept]:
            self._set_aside(later, "abandoned", why=f"is abandoned for that of step {kept}")
        self._on_change()
        return found

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        position: int,
        config: RunConfig,
        data: dict[str, Any],
        skips: Sequence[tuple[int, int]] = (),
        metrics: Mapping[str, float] | None = None,
        now: bool = False,
    ) -> bool:
        """Starts writing a checkpoint if one is due; to be called after every step, by all processes.

        One is due every `every` steps, every `minutes` by the clock of process 0, and where the metric of `best_metric`
        was measured. The state may be donated as soon as this returns. A write that fails, as on a full disk, costs a
        warning; the next one that is due is tried again.

        Args:
          step: updates done.
          state: on its mesh.
          position: pairs consumed, over all processes.
          config: the run's.
          data: what identifies the training data.
          skips: as in `Restored`.
          metrics: an evaluation's of this state.
          now: write it in any case.

        Returns:
          Whether it is being written.
        """
        self._settle(wait=False)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        due = self._manager.should_save(step) or self._config.best_metric in metrics
        if not (due or now):
            return False
        self._settle(wait=True)
        if step in self._manager.all_steps():
            return False
        items = {
            "data": {"position": position, "skips": [list(each) for each in skips]},
            "config": as_json(config),
            "metadata": make_metadata(config, data),
        }
        record = make_record(state, items | ({METRICS: metrics} if self._config.best_metric else {}))
        parts = {name: ocp.args.JsonSave(item) for name, item in (items | {"record": record}).items()}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), **parts)
        try:
            self._manager.save(step, args=arguments, metrics=metrics if self._config.best_metric else None, force=True)
        except (OSError, ValueError) as error:
            self._failed(step, error)
            return False
        self._writing, self._is_told = step, False
        return True

    def wait(self) -> None:
        """Returns when all is written.

        Raises:
          UserError: the last checkpoint could not be.
        """
        self._settle(wait=True)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Waits as `wait` does, and ends the background threads."""
        self._settle(wait=True)
        self._close_manager()
        self.wait()

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, opened late: opening makes the folder, and a refused run must write nothing."""
        if self._open_manager is None:
            self._open_manager = open_manager(self._folder, self._config)
        return self._open_manager

    def _close_manager(self) -> None:
        manager, self._open_manager = self._open_manager, None
        if manager is not None:
            with suppress(Exception):  # it raises again what was heard of before
                manager.close()

    def _settle(self, *, wait: bool) -> None:
        """Hears of a background write that has ended, which Orbax keeps to itself until it is asked.

        Several processes hear only at the next write, when all of them wait, whether it failed.
        """
        if self._writing is None or self._open_manager is None:
            return
        if not wait:
            if self._open_manager.is_saving_in_progress():
                return
            if jax.process_count() > 1:
                if not self._is_told:
                    self._is_told = True
                    self._on_change()
                return
        step, self._writing = self._writing, None
        error: Exception | None = None
        try:
            self._open_manager.wait_until_finished()
        except Exception as raised:  # of any kind: it went through threads and file systems
            error = raised
        if any_process(error is not None):
            self._failed(step, error)
        else:
            self._failure = None
            self._on_change()

    def _failed(self, step: int, error: Exception | None) -> None:
        """Says that a write failed, and opens the manager anew: that removes what is left of it."""
        why = "another process failed" if error is None else reason(error)
        self._close_manager()
        good = next(iter(self.steps()), None)
        kept = "there is no older one" if good is None else f"the newest is of step {good}"
        self._failure = UserError(
            f"the checkpoint of step {step} could not be written to {self._folder}: {why}; {kept}. Make room, and "
            "start again with the same --workdir"
        )
        _LOG.warning("the checkpoint of step %d could not be written: %s; training goes on, and %s", step, why, kept)

    def _restore_newest(self, target: TrainState, *, before: int | None) -> tuple[int, Restored] | None:
        while (step := self._newest(before)) is not None:
            try:
                restored = self.restore(step, target)
            except DamagedError as error:
                self._set_aside(step, "damaged", why=f"{error}; an older one is taken")
            else:
                self._check_older(step)
                return step, restored
        return None

    def _check_older(self, step: int | None) -> None:
        """Sets damaged ones aside, which Orbax cannot open or would take for the best; looks at no arrays.

        What a deletion left that was killed stays: the next one ends it.
        """
        while (step := self._newest(step)) is not None:
            try:
                self._everywhere(functools.partial(self.read_contents, step))
            except IncompleteError:
                pass
            except DamagedError as error:
                self._set_aside(step, "damaged", why=str(error))

    def _newest(self, before: int | None) -> int | None:
        """Returns the largest step below `before`, as process 0 sees the folder."""
        step = next((step for step in self.steps() if before is None or step < before), -1)
        step = int(from_first(np.array(step, np.int32)))
        return None if step == -1 else step

    def _set_aside(self, step: int, prefix: str, *, why: str) -> None:
        """Renames a checkpoint so that nobody takes it for one, with a warning; an empty directory is removed."""
        folder = self._folder / str(step)
        if jax.process_index() == 0:
            numbers = ["", *(f"-{number}" for number in range(2, 1_000))]
            names = (folder.with_name(f"{prefix}-{step}{number}") for number in numbers)
            to = next(name for name in names if not name.exists())
            with suppress(OSError):
                folder.rmdir()
            try:
                if folder.exists():
                    folder.rename(to)
            except OSError as error:
                raise UserError(f"{folder} {why}, and it cannot be renamed: {error.strerror}") from None
            _LOG.warning("checkpoint %s %s; it is %s now", folder, why, to.name if to.exists() else "removed")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{folder} set aside")
        if self._open_manager is not None:
            self._open_manager.reload()

    def _read_state(self, step: int, target: TrainState) -> tuple[Contents, TrainState]:
        """Reads this process's part of a checkpoint, alone."""
        contents, folder = self.read_contents(step), self._folder / str(step)
        if "batch_stats" in target.ema and not averages_statistics(contents.leaves):
            target = target.replace(ema=target.ema["params"])
        check_same_leaves(contents.leaves, target, folder)
        handler, arguments = ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(target)
        return contents, judged(lambda: handler.restore(epath.Path(folder / "state"), args=arguments), folder)

    def _everywhere(self, read: Callable[[], T]) -> T:
        """Returns what `read` gives; raises a DamagedError in all processes if it does in one."""
        try:
            found = read()
        except DamagedError:
            any_process(True)
            raise
        if any_process(False):
            raise DamagedError("could not be read by another process")
        return found
