"""A training run, in the order in which it happens.

Everything that can be refused is refused before anything is written: mesh, batch, data, model, checkpoints of another
model. The loop's contract: get a batch, start the step, read the metrics of the step before, then evaluate and
checkpoint where due. The data position is the number of pairs consumed, so that a resumed run goes on with the next.
What a run does when something goes wrong is in docs/operations.md.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.checkpoint import Checkpoints, Restored
from clip_jax.config import RunConfig, as_json
from clip_jax.data.loader import TrainingData, open_training_data
from clip_jax.data.skips import Skips, batches_between
from clip_jax.errors import RestartError, UserError, one_line
from clip_jax.evals.evaluation import Evaluated, Evaluation, scalars
from clip_jax.evals.report import report_training, report_zero_shot
from clip_jax.gradient_cache import check_micro_batch
from clip_jax.health import Rewind
from clip_jax.lock import locked, unwritable
from clip_jax.losses import chance_loss
from clip_jax.models.clip import CLIP
from clip_jax.models.variants import variant_name
from clip_jax.monitor import Monitor
from clip_jax.optim import make_optimizer
from clip_jax.partition import check_batch, make_mesh, place_rows
from clip_jax.preemption import Preemption
from clip_jax.resume import check_resumable, describe_resume
from clip_jax.startup import Startup
from clip_jax.state import TrainState, abstract_state, count_parameters, create_state, start_from
from clip_jax.step import TrainStep, make_train_step
from clip_jax.watchdog import Watchdog

if TYPE_CHECKING:
    from clip_jax.initial import Initial


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
    fresh: "Callable[[Initial | None], TrainState]"


class Watch(NamedTuple):
    """What looks at a run while it trains."""

    monitor: Monitor
    watchdog: Watchdog
    preemption: Preemption


def train(
    config: RunConfig, workdir: Path, *, data: TrainingData | None = None, startup: Startup | None = None
) -> TrainState:
    """Trains until the config's last step, resuming from the newest checkpoint of `workdir`.

    Args:
      config: the run's.
      workdir: made if it is not there; gets checkpoints, metrics, config and the report.
      data: training data instead of what `config.data` names.
      startup: of this process; its time up to here goes to `import`. Without, the start begins here.

    Returns:
      The final state.

    Raises:
      UserError: see the module docstring; nothing was overwritten. Later on, what a person must look at.
      PreemptedError: it was told to end, and has saved.
    """
    startup = startup or Startup()
    startup.lap("import")
    model = CLIP(config.model)
    optimizer = make_optimizer(config.optim, steps=config.steps)
    mesh = make_mesh(config.mesh)
    check_batch("batch", config.batch, mesh)
    check_micro_batch(config, mesh)
    layout = {"mesh": mesh, "zero1": config.mesh.zero1, "ema": config.optim.ema_decay > 0}
    target = abstract_state(model, optimizer, **layout)

    def fresh(initial: "Initial | None") -> TrainState:
        state = create_state(model, optimizer, seed=config.seed, **layout)
        return state if initial is None else start_from(state, initial.arrays)

    startup.lap("state")
    run = Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        data=open_training_data(config) if data is None else data,
        evaluation=Evaluation.open(config, model, mesh=mesh),
        checkpoints=Checkpoints(workdir, config.checkpoint),
        train_step=make_train_step(model, optimizer, config, mesh=mesh, state=target),
        target=target,
        fresh=fresh,
    )
    startup.lap("data")
    initial = None
    if (newest := run.checkpoints.latest()) is None:
        run.data.check(0)
        initial = _initial(config, target)
    else:
        saved = run.checkpoints.read_contents(newest)
        check_resumable(saved, config, step=newest, where=workdir)
        run.data.check(saved.data["position"])
    with locked(workdir):
        resumed = run.checkpoints.restore_latest(target)
        prepare_workdir(workdir, config)
        if resumed is not None:
            step, restored = resumed
            saved = run.checkpoints.read_contents(step)
            notes = describe_resume(saved, config, step=step, data=run.data.fingerprint)
            return _train_from(run, restored, notes, startup)
        state, notes = fresh(initial), [] if initial is None else initial.report()
        del initial  # whole weights, on the host
        return _train_from(run, Restored(state, 0), notes, startup)


def _train_from(run: Run, start: Restored, notes: list[str], startup: Startup) -> TrainState:
    """Trains a fresh or restored state to the end, evaluates it and reports."""
    config, health = run.config, run.config.health
    chance, step = chance_loss(config.loss.kind, config.batch), int(start.state.step)
    with (
        run.checkpoints,
        Monitor(
            config,
            run.workdir,
            start_step=step,
            chance_loss=chance,
            where=run.data.where,
            devices=run.mesh.devices.flatten().tolist(),
            startup=startup,
        ) as monitor,
        Watchdog(health.hang_minutes, run.workdir / f"hang-{jax.process_index()}.txt") as watchdog,
        Preemption(health.grace_s) as preemption,
        _memory_explained(run),
    ):
        for line in [_describe(run), *notes]:
            monitor.print(line)
        watch = Watch(monitor, watchdog, preemption)
        state = _loop(run, start, watch)
        evaluated = _evaluate(run, state, watch)
    _report(run, state, evaluated)
    return state


def _loop(run: Run, start: Restored, watch: Watch) -> TrainState:
    """Trains to the last step, going back where too many steps in a row had to be skipped."""
    while True:
        try:
            return _steps(run, start, watch)
        except Rewind as error:
            rewind = error.with_traceback(None)  # whose frames hold a state
        start = _go_back(run, start.skips, rewind, watch)


def _steps(run: Run, start: Restored, watch: Watch) -> TrainState:
    config, last, monitor = run.config, run.config.steps, watch.monitor
    state, position, skips = start
    with closing(batches_between(run.data.batches, position, batch=config.batch, skips=skips)) as batches:
        for step in range(int(state.step) + 1, last + 1):
            with monitor.waiting_for_data():
                position, batch = next(batches)
            monitor.started(step, position, batch)
            state, metrics = run.train_step(state, place_rows(_for_step(batch), run.mesh))
            monitor.finished(step, metrics)
            watch.watchdog.progress()
            ending = watch.preemption.noticed()
            is_evaluated = config.eval.every and step % config.eval.every == 0 and step != last and not ending
            found = _evaluate(run, state, watch) if is_evaluated else None
            saved = run.checkpoints.save(
                step,
                state,
                position=position + config.batch,
                skips=skips,
                config=config,
                data=run.data.fingerprint,
                metrics=None if found is None else scalars(found),
                now=step == last or ending,
            )
            if saved:
                monitor.sync()
                watch.watchdog.progress()
            if ending:
                run.checkpoints.wait()
                with suppress(Rewind):  # which the next start decides on
                    monitor.flush()
                raise watch.preemption.ended(step)
    monitor.flush()
    return state


def _go_back(run: Run, skips: Skips, rewind: Rewind, watch: Watch) -> Restored:
    """Returns the checkpoint before the steps that were skipped, or the beginning, to go on past their pairs."""
    limit, skips = run.config.health.max_rewinds, (*skips, (rewind.begin, rewind.end))
    what = f"more than {run.config.health.max_skipped} steps in a row, from {rewind.first} on, had no finite gradient"
    if len(skips) > limit:
        raise UserError(
            f"{what}, and the run has gone back {limit} time(s) already (config.health.max_rewinds): data or recipe "
            f"need a look. Their pairs are in {run.workdir}/skipped-*.jsonl; passed over so far: {list(skips[:-1])}"
        )
    found = run.checkpoints.restore_before(rewind.first, run.target)
    restored = found[1] if found else Restored(run.fresh(_initial(run.config, run.target)), 0)
    step = int(restored.state.step)
    watch.monitor.rewound(step)
    watch.monitor.print(f"{what}: back to step {step}; positions passed over from here on: {list(skips)}")
    watch.watchdog.progress()
    return restored._replace(skips=skips)


@contextmanager
def _memory_explained(run: Run) -> Iterator[None]:
    """Says what to change where the devices' memory is too small."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        from clip_jax.plan import levers  # a run that fits does without plans

        changes = "; ".join(levers(run.config, chips=run.mesh.size))
        raise UserError(
            f"out of memory on {run.mesh.size} x {run.mesh.devices.flat[0].device_kind} ({one_line(error)[:200]}). "
            f"Change one after the other: {changes}. `clip-jax plan` says what fits"
        ) from error


def _for_step(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The part of a batch that the device needs; the record index stays on the host."""
    return {name: batch[name] for name in ("image", "tokens", "weight", "bad")}


def _evaluate(run: Run, state: TrainState, watch: Watch) -> Evaluated | None:
    """Returns what the evaluation found, or None where there is none, or where it failed, which ends no training."""
    if run.evaluation is None:
        return None
    with watch.monitor.pause():
        step = int(state.step)
        try:
            evaluated = run.evaluation.run(state.inference_variables, progress=watch.watchdog.progress)
        except RestartError:
            raise
        except Exception as error:  # of any kind: nothing in it is needed for training
            watch.monitor.evaluation_failed(step, error)
            return None
        watch.monitor.record(step, scalars(evaluated))
    return evaluated


def _report(run: Run, state: TrainState, evaluated: Evaluated | None) -> None:
    if evaluated is not None and run.evaluation is not None:
        sheet = run.evaluation.retrieve(state.inference_variables, evaluated)  # by all processes
        if jax.process_index() == 0:
            report_zero_shot(run.workdir, evaluated, sheet, templates=run.evaluation.templates)
    if jax.process_index() == 0:
        report_training(run.workdir, run.config)
    if evaluated is None and run.evaluation is not None:
        raise UserError(
            f"the evaluation at the end failed, see above; the run is trained, and its weights are in {run.workdir}. "
            "The same command evaluates again"
        )


def _initial(config: RunConfig, target: TrainState) -> "Initial | None":
    """Returns the weights that the config names to start from, refused where they do not fit."""
    if not config.init_from:
        return None
    from clip_jax.initial import read_initial  # a run from random weights does without the readers

    return read_initial(config, target.variables)


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
