"""A training run, in the order in which it happens.

Everything that can be refused is refused before anything is written: mesh, batch, data, model, checkpoints of another
model. The loop's contract: get a batch, start the step, read the metrics of the step before, then checkpoint and
evaluate where due. The data position is the number of pairs consumed, so that a resumed run goes on with the next.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.bad_records import BadRecords
from clip_jax.checkpoint import Checkpoints, Restored
from clip_jax.config import RunConfig, as_json
from clip_jax.data.images import preprocess_of
from clip_jax.data.loader import TrainingData, open_training_data
from clip_jax.errors import UserError
from clip_jax.evals.evaluation import Evaluated, Evaluation, scalars
from clip_jax.evals.report import report_training, report_zero_shot
from clip_jax.gradient_cache import check_micro_batch
from clip_jax.lock import locked, unwritable
from clip_jax.losses import chance_loss
from clip_jax.models.clip import CLIP, Variables
from clip_jax.models.variants import variant_name
from clip_jax.monitor import Monitor
from clip_jax.optim import make_optimizer
from clip_jax.partition import check_batch, make_mesh, place_rows
from clip_jax.resume import check_resumable, describe_resume
from clip_jax.state import TrainState, abstract_state, count_parameters, create_state, start_from
from clip_jax.step import TrainStep, make_train_step


class Run(NamedTuple):
    """The parts of a run that do not change while it trains."""

    config: RunConfig
    workdir: Path
    mesh: Mesh
    data: TrainingData
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    train_step: TrainStep
    target: TrainState


def train(config: RunConfig, workdir: Path, *, data: TrainingData | None = None) -> TrainState:
    """Trains until the config's last step, resuming from the newest checkpoint of `workdir`.

    Args:
      config: the run's.
      workdir: made if it is not there; gets checkpoints, metrics, config and the report.
      data: training data instead of what `config.data` names.

    Returns:
      The final state.

    Raises:
      UserError: see the module docstring; nothing was overwritten.
    """
    model = CLIP(config.model)
    optimizer = make_optimizer(config.optim, steps=config.steps)
    mesh = make_mesh(config.mesh)
    check_batch("batch", config.batch, mesh)
    check_micro_batch(config, mesh)
    layout = {"mesh": mesh, "zero1": config.mesh.zero1, "ema": config.optim.ema_decay > 0}
    target = abstract_state(model, optimizer, **layout)
    run = Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        data=open_training_data(config) if data is None else data,
        evaluation=Evaluation.open(config, model, mesh=mesh),
        checkpoints=Checkpoints(workdir, config.checkpoint),
        train_step=make_train_step(model, optimizer, config, mesh=mesh, state=target),
        target=target,
    )
    newest = run.checkpoints.latest()
    if newest is not None:
        check_resumable(run.checkpoints.read_contents(newest), config, step=newest, where=workdir)
    initial = _initial_variables(config) if newest is None else None
    with locked(workdir):
        resumed = run.checkpoints.restore_latest(target)
        prepare_workdir(workdir, config)
        if resumed is not None:
            step, restored = resumed
            saved = run.checkpoints.read_contents(step)
            return _train_from(run, restored, describe_resume(saved, config, step=step, data=run.data.fingerprint))
        state = create_state(model, optimizer, seed=config.seed, **layout)
        if initial is None:
            return _train_from(run, Restored(state, 0), [])
        return _train_from(run, Restored(start_from(state, initial), 0), [f"starting from {config.init_from}"])


def _train_from(run: Run, start: Restored, notes: list[str]) -> TrainState:
    """Trains a fresh or restored state to the end, evaluates it and reports."""
    chance = chance_loss(run.config.loss.kind, run.config.batch)
    bad = BadRecords(run.workdir, run.data.where, max_share=run.config.data.max_bad_share)
    with (
        run.checkpoints,
        Monitor(
            run.config, run.workdir, start_step=int(start.state.step), chance_loss=chance, bad_records=bad
        ) as monitor,
    ):
        for line in [_describe(run), *notes]:
            monitor.print(line)
        state = _loop(run, start, monitor, bad)
        evaluated = _evaluate(run, state, monitor)
    _report(run, state, evaluated)
    return state


def _loop(run: Run, start: Restored, monitor: Monitor, bad: BadRecords) -> TrainState:
    config, last = run.config, run.config.steps
    state, position, skips = start
    with closing(run.data.batches(position)) as batches:
        for step in range(int(state.step) + 1, last + 1):
            with monitor.waiting_for_data():
                batch = next(batches)
            bad.note(step, batch)
            state, metrics = run.train_step(state, place_rows(_for_step(batch), run.mesh))
            position += config.batch
            monitor.finished(step, metrics)
            is_evaluated = config.eval.every and step % config.eval.every == 0 and step != last
            found = _evaluate(run, state, monitor) if is_evaluated else None
            saved = run.checkpoints.save(
                step,
                state,
                position=position,
                skips=skips,
                config=config,
                data=run.data.fingerprint,
                metrics=None if found is None else scalars(found),
                now=step == last,
            )
            if saved:
                monitor.sync()
    monitor.flush()
    return state


def _for_step(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The part of a batch that the device needs; the record index stays on the host."""
    return {name: batch[name] for name in ("image", "tokens", "weight", "bad")}


def _evaluate(run: Run, state: TrainState, monitor: Monitor) -> Evaluated | None:
    if run.evaluation is None:
        return None
    with monitor.pause():
        evaluated = run.evaluation.run(state.inference_variables)
        monitor.record(int(state.step), scalars(evaluated))
    return evaluated


def _report(run: Run, state: TrainState, evaluated: Evaluated | None) -> None:
    if evaluated is not None and run.evaluation is not None:
        sheet = run.evaluation.retrieve(state.inference_variables, evaluated)  # by all processes
        if jax.process_index() == 0:
            report_zero_shot(run.workdir, evaluated, sheet, templates=run.evaluation.templates)
    if jax.process_index() == 0:
        report_training(run.workdir, run.config)


def _initial_variables(config: RunConfig) -> Variables | None:
    """Returns the weights that the config names to start from, refused where they are another model's."""
    if not config.init_from:
        return None
    from clip_jax.interop.read import read_weights  # a run from random weights does without the readers

    weights = read_weights(config.init_from, expect=config.model, image_size=config.model.vision.image_size)
    if weights.preprocess != preprocess_of(config.model):
        raise UserError(
            f"config.init_from={config.init_from!r}: its model was trained with other pixels "
            f"({weights.preprocess}) than this run would be ({preprocess_of(config.model)})"
        )
    return weights.variables


def prepare_workdir(workdir: Path, config: RunConfig) -> None:
    """Makes the workdir and writes the config into it.

    Raises:
      UserError: it cannot be made or written.
    """
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / "config.json.tmp"
        temporary.write_text(json.dumps(as_json(config), indent=2) + "\n")
        temporary.replace(workdir / "config.json")
    except OSError as error:
        raise unwritable(workdir, error) from None


def _describe(run: Run) -> str:
    config = run.config
    parameters = count_parameters(run.target.params)
    return (
        f"{variant_name(config.model)} model, {parameters:,} parameters; {run.data.description}; "
        f"{config.steps} steps of {config.batch} pairs on {run.mesh.size} device(s), "
        f"mesh {' '.join(f'{axis}={size}' for axis, size in run.mesh.shape.items())}"
    )
