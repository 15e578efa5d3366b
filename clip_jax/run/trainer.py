"""A training run, in the order in which it happens.

Everything that can be refused is refused before anything is written, but for checkpoints that are brought from a copy:
mesh, batch, data, model, checkpoints of another model. The loop's contract: get a batch, start the step, read the
metrics of the step before, then evaluate and checkpoint where due, and read those of a step that is saved. The data
position is the number of pairs consumed, so that a resumed run goes on with the next. What a run does when something
goes wrong is in docs/operations.md.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

from clip_jax.checkpoints.checkpoint import Checkpoints, Restored
from clip_jax.checkpoints.lock import locked, unwritable
from clip_jax.checkpoints.mirror import Mirror
from clip_jax.checkpoints.resume import check_resumable, describe_resume
from clip_jax.config import RunConfig, as_json
from clip_jax.data.loader import TrainingData, open_training_data
from clip_jax.data.skips import Skips, batches_between
from clip_jax.errors import OutageError, RestartError, UserError, one_line
from clip_jax.evals.evaluation import Evaluated, Evaluation, scalars
from clip_jax.evals.held_out import HeldOut
from clip_jax.files import appearing
from clip_jax.models.clip import count_parameters
from clip_jax.models.variants import variant_name
from clip_jax.processes.preemption import PreemptedError, Preemption
from clip_jax.run.fresh import fresh_state, initial_of
from clip_jax.run.health import Rewind
from clip_jax.run.monitor import Monitor
from clip_jax.run.profiling import Profiler
from clip_jax.run.report import report_training, report_zero_shot
from clip_jax.run.startup import Startup
from clip_jax.run.watchdog import Watchdog
from clip_jax.training.losses import chance_loss
from clip_jax.training.program import Program, make_program
from clip_jax.training.state import TrainState
from clip_jax.training.step import place_batch

T = TypeVar("T")


class Run(NamedTuple):
    """The parts of a run that do not change while it trains."""

    config: RunConfig
    workdir: Path
    program: Program
    data: TrainingData
    evaluation: Evaluation | None
    held_out: HeldOut | None
    checkpoints: Checkpoints


class Watch(NamedTuple):
    """What looks at a run while it trains."""

    monitor: Monitor
    watchdog: Watchdog
    preemption: Preemption
    profiler: Profiler


class Found(NamedTuple):
    """What was measured after a step.

    Attributes:
      zero_shot: what the zero-shot evaluation found; None without one, and where it failed.
      numbers: all of it, as it belongs into the metrics.
      failures: of the evaluations that could not be made.
    """

    zero_shot: Evaluated | None
    numbers: dict[str, float]
    failures: Sequence[Exception] = ()


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
      RestartError: a data worker died, or a store that was read before does not answer any more, in the evaluation at
        the end too.
    """
    startup = startup or Startup()
    startup.lap("import")
    program = make_program(config)
    mirror = Mirror(config.checkpoint.mirror, workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint, on_change=mirror.request)
    brought, newest = mirror.fetch(), checkpoints.latest()
    startup.lap("state")
    with _outages_pass(lambda: newest is not None):
        run = Run(
            config=config,
            workdir=workdir,
            program=program,
            data=open_training_data(config) if data is None else data,
            evaluation=Evaluation.open(config, program.model, mesh=program.mesh),
            held_out=HeldOut.open(config, program.model, mesh=program.mesh),
            checkpoints=checkpoints,
        )
    startup.lap("data")
    initial = None
    if newest is None:
        run.data.check(0)
        initial = initial_of(config, program)
    else:
        saved = run.checkpoints.read_contents(newest)
        check_resumable(saved, config, step=newest, where=workdir)
        run.data.check(saved.data["position"])
    with locked(workdir), mirror, _device_errors_explained(run):
        resumed = run.checkpoints.restore_latest(program.target)
        prepare_workdir(workdir, config)
        if resumed is not None:
            step, restored = resumed
            saved = run.checkpoints.read_contents(step)
            notes = brought + describe_resume(saved, config, step=step, data=run.data.fingerprint)
            return _train_from(run, restored, notes, startup)
        state, notes = fresh_state(program, initial), [] if initial is None else initial.report()
        del initial  # whole weights, on the host
        return _train_from(run, Restored(state, 0), notes, startup)


def _train_from(run: Run, start: Restored, notes: list[str], startup: Startup) -> TrainState:
    """Trains a fresh or restored state to the end, evaluates it and reports."""
    config, health, log = run.config, run.config.health, run.config.log
    chance, step = chance_loss(config.loss.kind, config.batch), int(start.state.step)
    with (
        run.checkpoints,
        Monitor(
            config,
            run.workdir,
            start_step=step,
            chance_loss=chance,
            where=run.data.where,
            devices=run.program.mesh.devices.flatten().tolist(),
            startup=startup,
        ) as monitor,
        Watchdog(health.hang_minutes, run.workdir / f"hang-{jax.process_index()}.txt") as watchdog,
        Preemption(health.grace_s) as preemption,
        Profiler(run.workdir / "profile", log.profile, on_signal=log.profile_steps, say=monitor.print) as profiler,
        _outages_pass(lambda: step > 0 or monitor.has_read_pairs),
    ):
        for line in [_describe(run), *notes]:
            monitor.print(line)
        watch = Watch(monitor, watchdog, preemption, profiler)
        state = _loop(run, start, watch)
        try:
            found = _evaluate(run, state, watch)
        except PreemptedError:
            run.checkpoints.wait()
            raise
    _report(run, state, found)
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
            watch.profiler.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with monitor.waiting_for_data():
                    position, batch = next(batches)
                monitor.started(step, position, batch)
                state, metrics = run.program.train_step(state, place_batch(batch, run.program.mesh))
            watch.profiler.after(step, state)
            monitor.finished(step, metrics)
            watch.watchdog.progress()
            found, ending = None, watch.preemption.noticed()
            if config.eval.every and step % config.eval.every == 0 and step != last and not ending:
                with suppress(PreemptedError):  # it is raised when the step is saved
                    found = _evaluate(run, state, watch)
                ending = watch.preemption.is_ending
            saved = run.checkpoints.save(
                step,
                state,
                position=position + config.batch,
                skips=skips,
                config=config,
                data=run.data.fingerprint,
                metrics=None if found is None else found.numbers,
                now=step == last or ending,
            )
            if saved:
                if not ending:
                    monitor.flush()  # a run that goes on from here writes no metrics of this step
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
    """Returns a checkpoint without the steps that were skipped, or the beginning, to go on past their pairs."""
    limit, skips = run.config.health.max_rewinds, (*skips, (rewind.begin, rewind.end))
    what = f"more than {run.config.health.max_skipped} steps in a row, from {rewind.first} on, had no finite gradient"
    if len(skips) > limit:
        raise UserError(
            f"{what}, and the run has gone back {limit} time(s) already (config.health.max_rewinds): data or recipe "
            f"need a look. Their pairs are in {run.workdir}/skipped-*.jsonl; passed over so far: {list(skips[:-1])}"
        )
    program, config = run.program, run.config
    found = run.checkpoints.restore_before(rewind.first, program.target)
    restored = found[1] if found else Restored(fresh_state(program, initial_of(config, program)), 0)
    step = int(restored.state.step)
    watch.monitor.rewound(step)
    watch.monitor.print(f"{what}: back to step {step}; positions passed over from here on: {list(skips)}")
    watch.watchdog.progress()
    return restored._replace(skips=skips)


@contextmanager
def _outages_pass(has_begun: Callable[[], bool]) -> Iterator[None]:
    """Ends a run for a restart where a store does not answer; one that has not begun may have a wrong address."""
    try:
        yield
    except OutageError as error:
        if not has_begun():
            raise
        raise RestartError(f"{one_line(error)}; started again, the run goes on from its newest checkpoint") from error


@contextmanager
def _device_errors_explained(run: Run) -> Iterator[None]:
    """Says what to change where the devices' memory is too small, or their compiler knows an option no longer."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        mesh, why = run.program.mesh, one_line(error)[:200]
        kind = mesh.devices.flat[0].device_kind
        if run.config.mesh.overlap and "No such compile option" in why:
            raise UserError(
                f"config.mesh.overlap is true, which the compiler for {kind} does not know: {why}"
            ) from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        from clip_jax.planning.plan import levers  # a run that fits does without plans

        changes = "; ".join(levers(run.config, devices=mesh.size))
        raise UserError(
            f"out of memory on {mesh.size} x {kind} ({why}). Change one after the other: {changes}. `clip-jax plan` "
            "says what fits"
        ) from error


def _evaluate(run: Run, state: TrainState, watch: Watch) -> Found:
    """Returns what the evaluations found; one that fails is left out, and ends neither the other nor training.

    Raises:
      PreemptedError: the run shall end; in all processes before the same batch.
    """
    variables, step = state.inference_variables, int(state.step)
    failures: list[Exception] = []

    def progress() -> None:
        watch.watchdog.progress()
        if watch.preemption.noticed():
            raise watch.preemption.ended(step)

    def attempt(measure: Callable[..., T]) -> T | None:
        try:
            return measure(variables, progress=progress)
        except RestartError:
            raise
        except Exception as error:  # of any kind: nothing in it is needed for training
            watch.monitor.evaluation_failed(step, error)
            failures.append(error)
            return None

    with watch.monitor.pause():
        zero_shot = None if run.evaluation is None else attempt(run.evaluation.run)
        held_out = None if run.held_out is None else attempt(run.held_out.run)
        numbers = ({} if zero_shot is None else scalars(zero_shot)) | (held_out or {})
        if numbers:
            watch.monitor.record(step, numbers)
    return Found(zero_shot, numbers, failures)


def _report(run: Run, state: TrainState, found: Found) -> None:
    if found.zero_shot is not None and run.evaluation is not None:
        sheet = run.evaluation.retrieve(state.inference_variables, found.zero_shot)  # by all processes
        if jax.process_index() == 0:
            report_zero_shot(run.workdir, found.zero_shot, sheet, templates=run.evaluation.templates)
    if jax.process_index() == 0:
        report_training(run.workdir, run.config)
    if found.failures:
        passes = all(isinstance(error, OutageError) for error in found.failures)
        raise (RestartError if passes else UserError)(
            f"the evaluation at the end failed, see above; the run is trained, and its weights are in {run.workdir}. "
            "The same command evaluates again"
        )


def prepare_workdir(workdir: Path, config: RunConfig) -> None:
    """Makes the workdir and writes the config into it.

    Raises:
      UserError: it cannot be made or written.
    """
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with appearing(workdir / "config.json") as temporary:
            temporary.write_text(json.dumps(as_json(config), indent=2) + "\n")
    except OSError as error:
        raise unwritable(workdir, error) from None


def _describe(run: Run) -> str:
    config = run.config
    parameters, mesh = count_parameters(run.program.target.params), run.program.mesh
    measured = "" if run.held_out is None else f", measured on {run.held_out.description}"
    if config.eval.every and not config.eval.metrics:
        measured = "; nothing is evaluated: config.eval.dataset and held_out are empty"
    return (
        f"{variant_name(config.model)} model, {parameters:,} parameters; {run.data.description}{measured}; "
        f"{config.steps} steps of {config.batch} pairs on {mesh.size} device(s), "
        f"mesh {' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}"
    )
