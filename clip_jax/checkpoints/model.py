"""The model in a run's checkpoints, for those who want its weights and not the run; nothing is written."""

import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clip_jax.checkpoints.checksum import checksums
from clip_jax.checkpoints.record import DamagedError, averages_statistics, check_sums, judged, read_contents
from clip_jax.config import from_saved
from clip_jax.data.images import Preprocess
from clip_jax.errors import UserError
from clip_jax.files import steps_in
from clip_jax.models.clip import CLIP, Variables, init_variables
from clip_jax.models.variants import ModelConfig
from clip_jax.training.state import from_average, to_average

_LOG = logging.getLogger(__name__)


def read_run(workdir: Path) -> tuple[ModelConfig, Variables, Preprocess]:
    """Returns the model of a run's newest good checkpoint: sizes, variables as NumPy arrays, preprocessing.

    Where the run keeps an average of its variables, these are it. Newer checkpoints that are not what was written are
    passed over with a warning.

    Raises:
      UserError: there is none.
    """
    folder = workdir.absolute() / "checkpoints"
    for step in steps_in(folder):
        try:
            return _read_model(folder / str(step))
        except DamagedError as error:
            _LOG.warning("checkpoint %d of %s %s; an older one is taken", step, workdir, error)
    raise UserError(f"{workdir} holds no whole checkpoint yet")


def read_checkpoint(folder: Path) -> tuple[ModelConfig, Variables, Preprocess]:
    """Returns the model of one checkpoint, `workdir/checkpoints/<step>` or a copy of it, as `read_run` does.

    Raises:
      UserError: it is not what was written.
    """
    try:
        return _read_model(folder.absolute())
    except DamagedError as error:
        raise UserError(f"checkpoint {folder} {error}; take another one") from None


def _read_model(folder: Path) -> tuple[ModelConfig, Variables, Preprocess]:
    contents = read_contents(folder)
    run = from_saved(contents.config)
    target = jax.eval_shape(lambda: init_variables(CLIP(run.model), jax.random.key(0)))
    ema = run.optim.ema_decay > 0
    if ema and target["batch_stats"] and not averages_statistics(contents.leaves):
        _LOG.warning("%s averages parameters without BatchNorm's statistics; what was trained is taken", folder)
        ema = False
    item = {"ema": to_average(target)} if ema else dict(target)
    as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), item)
    arguments = ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True)
    found = judged(lambda: ocp.PyTreeCheckpointHandler().restore(epath.Path(folder / "state"), args=arguments), folder)
    check_sums(checksums(found), contents.leaves)
    variables = from_average(found["ema"]) if ema else found
    return run.model, variables, Preprocess.from_dict(contents.metadata["preprocess"])
