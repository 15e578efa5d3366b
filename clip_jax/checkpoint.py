"""Checkpoints of a run: state, data position, config and metadata together, written by Orbax in the background.

A directory counts as a checkpoint only when all of its parts are there: Orbax lists any directory with a numeric
name, also an empty or half-deleted one.
"""

import dataclasses
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

import clip_jax
from clip_jax.config import CheckpointConfig, RunConfig, as_json, describe_diff, from_config_dict, model_diff
from clip_jax.data.images import Preprocess, preprocess_of
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP, Variables, init_variables
from clip_jax.models.variants import ModelConfig
from clip_jax.state import TrainState

_ITEMS = ("state", "data", "config", "metadata")
_LOG = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder; the checkpoints lie in `workdir/checkpoints`, made at the first save.
      config: when old ones go.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig) -> None:
        self._folder = workdir.absolute() / "checkpoints"
        self._keep = config.keep
        self._open_manager: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, opened late: opening makes the folder, and a refused run must write nothing."""
        if self._open_manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
            self._open_manager = ocp.CheckpointManager(self._folder, options=options, item_names=_ITEMS)
        return self._open_manager

    def latest(self) -> int | None:
        """Returns the newest whole checkpoint's step, or None."""
        steps = [int(path.name) for path in self._folder.glob("*") if path.name.isdigit()]
        for step in sorted(steps, reverse=True):
            missing = [item for item in _ITEMS if not (self._folder / str(step) / item).is_dir()]
            if not missing:
                return step
            _LOG.warning("checkpoint %s lacks %s; it is passed over", self._folder / str(step), ", ".join(missing))
        return None

    def read_config(self, step: int) -> dict[str, Any]:
        """Returns the config that a checkpoint was written with, as nested dicts; writes nothing."""
        return self._read_json(step, "config")

    def read_preprocess(self, step: int) -> Preprocess:
        """Returns the preprocessing that a checkpoint's model was trained with; writes nothing."""
        return Preprocess.from_dict(self._read_json(step, "metadata")["preprocess"])

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(self._folder, options=options, item_names=_ITEMS) as reader:
            return reader.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, int]:
        """Reads a checkpoint onto the mesh of `target`.

        Args:
          step: as `latest` gives it.
          target: shapes, dtypes and shardings, as `abstract_state` gives them.

        Returns:
          The state, and the data position in samples.
        """
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        )
        return restored["state"], restored["data"]["position"]

    def read_variables(self, step: int, target: Variables, *, ema: bool) -> Variables:
        """Reads only the model's variables, as NumPy arrays; writes nothing.

        Args:
          step: as `latest` gives it.
          target: their shapes and dtypes.
          ema: take the average of the parameters for the parameters.
        """
        params = "ema" if ema else "params"
        item = {params: target["params"], "batch_stats": target["batch_stats"]}
        as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), item)
        arguments = ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(self._folder / str(step) / "state", args=arguments)
        return {"params": found[params], "batch_stats": found["batch_stats"]}

    def save(self, step: int, state: TrainState, *, position: int, config: RunConfig, data: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the state may be donated as soon as this returns.

        Args:
          step: updates done.
          state: on its mesh.
          position: pairs consumed, over all processes.
          config: the run's.
          data: what identifies the training data.
        """
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"position": position}),
            config=ocp.args.JsonSave(dataclasses.asdict(config)),
            metadata=ocp.args.JsonSave(_metadata(config, data)),
        )
        self._manager.save(step, args=parts)

    def wait(self) -> None:
        """Returns when all is written; an error of a background write is raised here."""
        if self._open_manager is not None:
            self._open_manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, and ends the background threads."""
        self.wait()
        if self._open_manager is not None:
            self._open_manager.close()


def check_same_state(saved: dict[str, Any], config: RunConfig, *, where: Path) -> None:
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


def read_run(workdir: Path) -> tuple[ModelConfig, Variables, Preprocess]:
    """Returns the model of a run's newest whole checkpoint: sizes, variables as NumPy arrays, preprocessing.

    Where the run keeps an average of its parameters, these are it.

    Raises:
      UserError: there is none.
    """
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    step = checkpoints.latest()
    if step is None:
        raise UserError(f"{workdir} holds no whole checkpoint yet")
    run = from_config_dict(checkpoints.read_config(step))
    config = run.model
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0)))
    variables = checkpoints.read_variables(step, shapes, ema=run.optim.ema_decay > 0)
    return config, variables, checkpoints.read_preprocess(step)


def _metadata(config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the weights alone must know."""
    return {
        "activation": config.model.activation,
        "preprocess": preprocess_of(config.model).to_dict(),
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
