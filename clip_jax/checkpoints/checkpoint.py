"""Checkpoints of a run: state, data position, config and metadata together, written by Orbax in the background.

What a run is, is in them: random keys are functions of (config.seed, step), and data of (config.seed, position), so no
generator has a state to keep.

Orbax writes, and chooses when and what is kept; what is read is judged here. Orbax lists any directory with a numeric
name as a checkpoint, also an empty or half-deleted one, and restores a flipped bit as a wrong weight without a word. So
a fifth item, the record, holds a checksum for every leaf and every other item; what does not agree with it is set aside
under another name, and the checkpoint before it is taken.
"""

import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

import clip_jax
from clip_jax.checkpoints.checksum import checksums, describe_leaves
from clip_jax.config import CheckpointConfig, RunConfig, as_json, from_saved
from clip_jax.data.images import Preprocess, preprocess_of
from clip_jax.errors import UserError, one_line
from clip_jax.files import steps_in
from clip_jax.models.clip import CLIP, Variables, init_variables
from clip_jax.models.variants import ModelConfig
from clip_jax.processes.distributed import any_process, from_first
from clip_jax.training.state import TrainState, from_average, to_average

_JSON_ITEMS = ("data", "config", "metadata")
_ITEMS = ("state", *_JSON_ITEMS, "record")
_METRICS = "metrics"  # Orbax's own item, written where a metric chooses what is kept
_NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class DamagedError(Exception):
    """A checkpoint that is not whole, or not what was written."""


class _IncompleteError(DamagedError):
    """A checkpoint of which parts are missing, as a deletion that was killed leaves it."""


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


class Contents(NamedTuple):
    """All of a checkpoint but its arrays.

    Attributes:
      data: the data position, `position`, and `skips`, see `Restored`.
      config: the config that it was written with, as nested dicts.
      metadata: what a reader of the weights must know: `preprocess`, `tokenizer`, versions; and `data`, what identified
        the training data.
      leaves: path to shape, dtype and checksum.
    """

    data: dict[str, Any]
    config: dict[str, Any]
    metadata: dict[str, Any]
    leaves: dict[str, dict[str, Any]]


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
        folder = self._folder / str(step)
        if missing := [item for item in _ITEMS if not (folder / item).is_dir()]:
            raise _IncompleteError(f"lacks {', '.join(missing)}")
        record = _judged(lambda: dict(_read_json(folder / "record")), folder)
        leaves, sums = record.get("leaves", {}), record.get("items", {})
        if record.get("sha256") != _digest([leaves, sums]):
            raise DamagedError("has changed in its record")
        items = {name: _judged(lambda name=name: _read_json(folder / name), folder) for name in sums}
        if changed := [name for name, item in items.items() if _digest(item) != sums[name]]:
            raise DamagedError(f"has changed in {', '.join(changed)}")
        return Contents(**{name: items[name] for name in _JSON_ITEMS}, leaves=leaves)

    def restore(self, step: int, target: TrainState) -> Restored:
        """Reads a checkpoint onto the mesh of `target`; collective over processes.

        An average that lacks statistics, see `_averages_statistics`, begins with those that were trained.

        Args:
          step: as `latest` gives it.
          target: shapes, dtypes and shardings, as `abstract_state` gives them.

        Raises:
          DamagedError: it is not what was written, bit for bit.
          UserError: it holds other leaves than `target`, or cannot be read for a reason outside of it.
        """
        contents, state = self._everywhere(functools.partial(self._read_state, step, target))
        _compare(checksums(state), contents.leaves)
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

    def read_variables(self, step: int, target: Variables, *, ema: bool) -> Variables:
        """Reads only the model's variables, as NumPy arrays; writes nothing.

        Args:
          step: as `latest` gives it.
          target: their shapes and dtypes.
          ema: take their average, if it is whole, see `_averages_statistics`; else they are taken, with a warning.

        Raises:
          DamagedError: they are not what was written.
        """
        leaves, folder = self.read_contents(step).leaves, self._folder / str(step)
        if ema and target["batch_stats"] and not _averages_statistics(leaves):
            _LOG.warning("%s averages parameters without BatchNorm's statistics; what was trained is taken", folder)
            ema = False
        item = {"ema": to_average(target)} if ema else dict(target)
        as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), item)
        arguments = ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True)
        found = _judged(
            lambda: ocp.PyTreeCheckpointHandler().restore(epath.Path(folder / "state"), args=arguments), folder
        )
        _compare(checksums(found), leaves)
        return from_average(found["ema"]) if ema else found

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
            "metadata": _metadata(config, data),
        }
        record = _record(state, items | ({_METRICS: metrics} if self._config.best_metric else {}))
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
            options = ocp.CheckpointManagerOptions(
                save_decision_policy=_when(self._config),
                preservation_policy=_which(self._config),
                best_fn=_metric_of(self._config) if self._config.best_metric else None,
                async_options=ocp.AsyncOptions(timeout_secs=math.ceil(self._config.timeout_s)),
            )
            _hush_lost_tasks()
            try:
                _remove_unfinished(self._folder)
                self._open_manager = _Manager(self._folder, options=options, item_names=_ITEMS)
            except OSError as error:
                raise UserError(
                    f"{self._folder} cannot be written: {error.strerror}; make that possible, or use another --workdir"
                ) from None
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
        reason = "another process failed" if error is None else _reason(error)
        self._close_manager()
        good = next(iter(self.steps()), None)
        kept = "there is no older one" if good is None else f"the newest is of step {good}"
        self._failure = UserError(
            f"the checkpoint of step {step} could not be written to {self._folder}: {reason}; {kept}. Make room, and "
            "start again with the same --workdir"
        )
        _LOG.warning("the checkpoint of step %d could not be written: %s; training goes on, and %s", step, reason, kept)

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
            except _IncompleteError:
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
        if "batch_stats" in target.ema and not _averages_statistics(contents.leaves):
            target = target.replace(ema=target.ema["params"])
        _check_same_leaves(contents.leaves, target, folder)
        handler, arguments = ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(target)
        return contents, _judged(lambda: handler.restore(epath.Path(folder / "state"), args=arguments), folder)

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


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask JAX whether the run shall end.

    It would count by steps, and a thread of it by a step that is over, in the one counter by which processes agree
    where to end: `Preemption` counts its own calls there, which are fewer in a run that was resumed.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def read_run(workdir: Path) -> tuple[ModelConfig, Variables, Preprocess]:
    """Returns the model of a run's newest good checkpoint: sizes, variables as NumPy arrays, preprocessing.

    Where the run keeps an average of its variables, these are it. Newer checkpoints that are not what was written are
    passed over with a warning; nothing is written.

    Raises:
      UserError: there is none.
    """
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    for step in checkpoints.steps():
        try:
            return _read_model(checkpoints, step)
        except DamagedError as error:
            _LOG.warning("checkpoint %d of %s %s; an older one is taken", step, workdir, error)
    raise UserError(f"{workdir} holds no whole checkpoint yet")


def _read_model(checkpoints: Checkpoints, step: int) -> tuple[ModelConfig, Variables, Preprocess]:
    contents = checkpoints.read_contents(step)
    run = from_saved(contents.config)
    shapes = jax.eval_shape(lambda: init_variables(CLIP(run.model), jax.random.key(0)))
    variables = checkpoints.read_variables(step, shapes, ema=run.optim.ema_decay > 0)
    return run.model, variables, Preprocess.from_dict(contents.metadata["preprocess"])


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


def _record(state: TrainState, items: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the leaves and the items must be when they are read, and a checksum of itself."""
    sums = checksums(state)
    leaves = {path: leaf | {"sum": sums[path]} for path, leaf in describe_leaves(state).items()}
    digests = {name: _digest(item) for name, item in items.items()}
    return {"leaves": leaves, "items": digests, "sha256": _digest([leaves, digests])}


def _digest(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON holds it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(folder: Path) -> Any:
    return json.loads((folder / (_METRICS if folder.name == _METRICS else "metadata")).read_text())


def _judged(read: Callable[[], T], where: Path) -> T:
    """Returns what `read` gives; its failure is damage, unless its cause lies outside of the files.

    Orbax, TensorStore and JSON raise classes of many kinds, `Exception` itself among them.
    """
    try:
        return read()
    except Exception as error:
        outside = isinstance(error, (MemoryError, PermissionError, jax.errors.JaxRuntimeError))
        if outside or any(word in str(error) for word in _NOT_DAMAGE):
            raise UserError(f"{where} cannot be read: {_reason(error)}; it is left as it is") from error
        raise DamagedError(f"cannot be read: {_reason(error)}") from error


def _compare(found: Mapping[str, str], leaves: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises a DamagedError that names the leaves whose checksums are not those of the record."""
    changed = [path for path, checksum in found.items() if leaves.get(path, {}).get("sum") != checksum]
    if changed:
        more = f" and {len(changed) - 3} more leaves" if len(changed) > 3 else ""
        raise DamagedError(f"has changed in {', '.join(changed[:3])}{more}")


def _averages_statistics(leaves: Iterable[str]) -> bool:
    """Whether a checkpoint's average holds BatchNorm's statistics; those of older versions do not."""
    return any(path.startswith("ema/batch_stats/") for path in leaves)


def _check_same_leaves(leaves: Mapping[str, Mapping[str, Any]], target: TrainState, where: Path) -> None:
    """Raises a UserError where a whole checkpoint is of another state: Orbax would cast what it can."""
    expected = describe_leaves(target)
    saved = {path: {key: leaf[key] for key in ("shape", "dtype")} for path, leaf in leaves.items()}
    for path in [*expected, *saved]:
        if saved.get(path) != expected.get(path):
            raise UserError(
                f"{where} holds another state than this run's: {path} is {saved.get(path)} there and "
                f"{expected.get(path)} here; go on with what the run began with"
            )


def _reason(error: BaseException) -> str:
    """Returns the operating system's words where there are any, in what was raised first; else what was raised.

    TensorStore puts the system's code into its message; Orbax raises over it that others wait for this process.
    """
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    for each in reversed(chain):
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
        if code := re.search(r"os_error_code='(\d+)'", str(each)):
            return os.strerror(int(code[1]))
    if any("Barrier timed out" in str(each) for each in chain):
        return "another process did not write its part within config.checkpoint.timeout_s"
    return one_line(error).partition(" See full TensorStore")[0][:200]


def _metadata(config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the weights alone must know."""
    return {
        "activation": config.model.activation,
        "preprocess": preprocess_of(config.model, config.data).to_dict(),
        "tokenizer": "clip",
        "data": data,
        "git_revision": _git_revision(),
        "versions": {"clip_jax": clip_jax.__version__, "jax": jax.__version__, "flax": flax.__version__},
    }


@functools.cache
def _git_revision() -> str | None:
    """Returns the commit of this package's checkout; None where it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
