"""What a run does when it is told to end, and when something around it fails: real processes, real signals.

docs/operations.md promises what is tested here.
"""

import dataclasses
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import outputs
from test_distributed import lines, peers, start
from test_health import RUN, bits, rows_of

from clip_jax.data.loader import open_training_data
from clip_jax.errors import RESTART, OutageError, RestartError, UserError
from clip_jax.evals.embedding import Embedder
from clip_jax.evals.evaluation import Evaluated, Evaluation
from clip_jax.models.clip import CLIP
from clip_jax.partition import make_mesh
from clip_jax.processes.preemption import PreemptedError
from clip_jax.run import watchdog
from clip_jax.run.trainer import train
from clip_jax.run.watchdog import Watchdog

ROOT = Path(__file__).parent.parent
LONG = ("--config.data.source=synthetic", "--config.eval.dataset=", "--config.log.tensorboard=false")


def test_every_promise_names_tests_that_exist():
    tables = [line for line in (ROOT / "docs" / "operations.md").read_text().splitlines() if line.startswith("| ")]
    promises = [line for line in tables if line.count("|") == 4 and not line.endswith("| test |")]
    promises = [line for line in promises if not line.startswith(("| code", "| 0", "| 1", "| 2", "| 7"))]
    known = set(re.findall(r"def (test_\w+)", "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))))
    named = [set(re.findall(r"`(test_\w+)`", line)) for line in promises]
    assert len(promises) > 25
    assert set().union(*named) <= known
    assert [line for line, tests in zip(promises, named, strict=True) if not tests] == []


def steps_of(workdir):
    try:
        return [line["step"] for line in lines(workdir) if "loss" in line]
    except FileNotFoundError:
        return []


def wait_for_step(workdir, step, *processes):
    end = time.monotonic() + 300
    while max(steps_of(workdir), default=0) < step and time.monotonic() < end:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def test_sigterm_saves_and_ends_for_a_restart(tmp_path):
    """At a step where no checkpoint was due."""
    more = ("--config.samples=96000", "--config.checkpoint.every=10000", f"--workdir={tmp_path}")
    process = start(*LONG, *more, devices=1)
    wait_for_step(tmp_path, 5, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == RESTART
    (saved,) = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()]
    assert f"error: stopped by SIGTERM after step {saved}, which is saved" in errors
    assert steps_of(tmp_path) == list(range(1, saved + 1))


def preempting(run, at, *, number=signal.SIGTERM):
    """The run's data, with a signal to this process before a batch."""
    data = open_training_data(run)

    def batches(position):
        for step, batch in enumerate(data.batches(position), position // run.batch + 1):
            if step == at:
                os.kill(os.getpid(), number)
            yield batch

    return data._replace(batches=batches)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, number, code):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    straight = train(RUN, tmp_path / "straight")
    with pytest.raises(Exception, match=r"stopped by SIG\w+ after step 5, which is saved") as caught:
        train(RUN, tmp_path / "stopped", data=preempting(RUN, 5, number=number))
    assert caught.value.code == code
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = train(RUN, tmp_path / "stopped")
    assert bits(straight) == bits(resumed)
    assert rows_of(tmp_path / "straight", "loss") == rows_of(tmp_path / "stopped", "loss")


class Interrupted(Evaluation):
    """An evaluation of many batches; the run gets a signal before the third one of its n-th run."""

    def __init__(self, at):
        self.at, self.runs, self.batches = at, 0, 0

    def run(self, variables, *, progress=None):
        self.runs, self.batches = self.runs + 1, 0
        for number in range(100):
            if (self.runs, number) == (self.at, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            progress()
            self.batches += 1
        return Evaluated((), None)


@pytest.mark.parametrize(("at", "step"), [(1, 4), pytest.param(4, 14, marks=pytest.mark.slow)])
def test_sigterm_during_an_evaluation_saves_the_step_before_it(at, step, tmp_path, monkeypatch):
    """In the middle of the run, and in the evaluation at its end."""
    run = dataclasses.replace(RUN, eval=dataclasses.replace(RUN.eval, every=4))
    evaluation = Interrupted(at)
    monkeypatch.setattr(Evaluation, "open", lambda *_, **__: evaluation)
    with pytest.raises(PreemptedError, match=f"stopped by SIGTERM after step {step}, which is saved"):
        train(run, tmp_path)
    assert (evaluation.runs, evaluation.batches) == (at, 2)
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert list(rows_of(tmp_path, "loss")) == list(range(1, step + 1))
    assert rows_of(tmp_path, "evaluation_failed") == {}


def test_a_batch_of_prompts_is_left_as_one_of_images_is():
    """ImageNet's 80,000 prompts may take longer than a scheduler waits."""
    embedder = Embedder(CLIP(RUN.model), lambda texts: np.zeros(len(texts)), mesh=make_mesh(RUN.mesh), batch=8)
    vars(embedder).update(_encode_texts=lambda variables, batch: np.zeros((8, 2)), source=lambda *_, progress: None)
    evaluation = Evaluation.__new__(Evaluation)
    vars(evaluation).update(templates={"two": ("{}", "of {}")}, _embedder=embedder, _source=None, _classes=["a"] * 10)
    asked = []

    def progress():
        asked.append(None)
        if len(asked) == 3:
            raise PreemptedError("stopped")

    with pytest.raises(PreemptedError):
        evaluation.run({}, progress=progress)
    assert len(asked) == 3


STUCK = """
import os, signal, sys, time
from clip_jax.processes.preemption import Preemption
with Preemption({grace}):
    os.kill(os.getpid(), signal.SIGTERM)
    {then}
    time.sleep(30)
"""
TWICE = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    ("grace", "then", "said"),
    [
        (0.2, TWICE, "no checkpoint was written within config.health.grace_s=0.2 s; the one before holds"),
        (60.0, f"time.sleep(0.6); {TWICE}", "stopped by a second signal; the newest whole checkpoint holds"),
    ],
    ids=["grace", "second"],
)
def test_a_process_that_cannot_save_ends_all_the_same(grace, then, said):
    """A signal that comes twice at once, from a scheduler and from `clip-jax sweep run`, is one."""
    began = time.monotonic()
    code = STUCK.format(grace=grace, then=then)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == RESTART
    assert said in ended.stderr
    assert time.monotonic() - began < 25


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["hangs", "is full"])
def test_a_hang_of_the_disk_that_the_stacks_go_to_ends_too(tmp_path, monkeypatch, make):
    """A pipe without a reader hangs as a lost file server does; a folder cannot be written, as on a full disk."""
    monkeypatch.setattr(watchdog, "_REPORT_S", 0.2)
    left, file = [], tmp_path / "hang-0.txt"
    make(file)
    with Watchdog(0.1 / 60, file, leave=left.append):
        time.sleep(1.0)
    assert left == [RESTART]
    if make is os.mkfifo:
        os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))  # lets the thread go


def test_a_hang_ends_with_the_stacks_of_all_threads(tmp_path, capfd):
    left = []
    with Watchdog(0.5 / 60, tmp_path / "hang-0.txt", leave=left.append) as running:
        for _ in range(8):
            time.sleep(0.1)
            running.progress()
        assert left == []
        time.sleep(1.5)
    assert left == [RESTART]
    err = capfd.readouterr().err
    for text in (err, (tmp_path / "hang-0.txt").read_text()):
        assert "test_a_hang_ends_with_the_stacks_of_all_threads" in text
    assert "no step has ended for 0.00833333 minutes (config.health.hang_minutes)" in err
    with Watchdog(0.0, tmp_path / "none.txt", leave=left.append):
        time.sleep(0.1)
    assert left == [RESTART]


HANGS = """
import sys, threading, time
from pathlib import Path
import dataclasses
sys.path[:0] = ["tests"]
from test_health import RUN
from clip_jax.config import HealthConfig
from clip_jax.run import watchdog
from clip_jax.data.loader import open_training_data
from clip_jax.run.trainer import train
data = open_training_data(RUN)
def batches(position):
    for number, batch in enumerate(data.batches(position)):
        if number == 4:
            time.sleep(100)
        yield batch
health = HealthConfig(hang_minutes=0.5)
train(dataclasses.replace(RUN, health=health), Path(sys.argv[1]), data=data._replace(batches=batches))
"""


@pytest.mark.slow
def test_a_data_stream_that_blocks_ends_the_run(tmp_path):
    ended = subprocess.run([sys.executable, "-c", HANGS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == RESTART, ended.stderr
    assert "in batches" in (tmp_path / "hang-0.txt").read_text()
    assert "no step has ended for 0.5 minutes" in ended.stderr
    assert steps_of(tmp_path) == [1, 2, 3]


class Failing(Evaluation):
    """An evaluation that can be opened, and fails."""

    def __init__(self, error):
        self.runs, self.error = 0, error

    def run(self, variables, *, progress=None):
        self.runs += 1
        raise self.error


def test_an_evaluation_that_fails_ends_no_training(tmp_path, monkeypatch, caplog):
    failing = Failing(OSError("the evaluation's data are gone"))
    monkeypatch.setattr(Evaluation, "open", lambda *_, **__: failing)
    run = dataclasses.replace(
        RUN, eval=dataclasses.replace(RUN.eval, every=4, held_out="source=synthetic", held_out_pairs=8, batch=8)
    )
    with pytest.raises(UserError, match="the evaluation at the end failed, see above; the run is trained, and its wei"):
        train(run, tmp_path)
    assert failing.runs == 4
    assert list(rows_of(tmp_path, "loss")) == list(range(1, 15))
    assert rows_of(tmp_path, "evaluation_failed") == {4: 1, 8: 2, 12: 3, 14: 4}
    assert list(rows_of(tmp_path, "held_out/loss")) == [4, 8, 12, 14]  # the other evaluation goes on
    assert (tmp_path / "checkpoints" / "14").is_dir()
    records = [record for record in caplog.records if "evaluation after step" in record.message]
    assert [record.exc_info is not None for record in records] == [True, False, False, False]
    failing.error = OutageError("its store does not answer")  # the run that is through evaluates again
    with pytest.raises(RestartError, match="^the evaluation at the end failed, see above; the run is trained"):
        train(run, tmp_path)
    assert failing.runs == 5


def test_images_that_cannot_be_read_are_an_error_when_all_batches_are_through():
    """The batches go on, blank: the other processes wait for this one at each of them."""
    from clip_jax.evals.embedding import InStep

    def reading():
        yield {"label": np.ones(1)}
        raise OSError("gone")

    seen, reading = [], InStep(reading(), {"label": np.zeros(1)}, count=4)
    assert [int(batch["label"][0]) for batch in reading.batches(lambda: seen.append(1))] == [1, 0, 0, 0]
    assert len(seen) == 4
    with pytest.raises(OSError, match="gone"):
        reading.check()


@pytest.mark.parametrize(("lasting", "kind"), [(False, OutageError), (True, RuntimeError)])
def test_what_another_process_could_not_read_is_an_outage_where_it_was_one(monkeypatch, lasting, kind):
    """So that all of them end with the same exit code."""
    from clip_jax.evals import embedding

    elsewhere = iter((True, lasting))
    monkeypatch.setattr(embedding, "any_process", lambda flag: flag or next(elsewhere))
    with pytest.raises(kind, match="another process could not read its images"):
        embedding.InStep(iter(()), {}, count=0).check()


def test_too_little_memory_names_what_to_change(tmp_path, monkeypatch):
    def step(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    expected = r"out of memory on 8 x cpu \(RESOURCE_EXHAUSTED: .* 9 bytes.*model.remat=dots.*micro_batch=8.*fsdp=8"
    with monkeypatch.context() as patched:
        patched.setattr("clip_jax.training.program.create_state", step)
        with pytest.raises(UserError, match=expected):
            train(RUN, tmp_path)
    monkeypatch.setattr("clip_jax.training.program.make_train_step", lambda *_, **__: step)
    with pytest.raises(UserError, match=expected):
        train(RUN, tmp_path)
    monkeypatch.setattr(
        "clip_jax.training.program.make_train_step",
        lambda *_, **__: lambda *_: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: x")),
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train(RUN, tmp_path / "other")


def test_a_compiler_that_does_not_know_the_options_of_overlap(tmp_path, monkeypatch):
    """As libtpu says it; and without `mesh.overlap` that is somebody else's option."""

    def step(*_):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option: 'xla_tpu_x'")

    monkeypatch.setattr("clip_jax.training.program.make_train_step", lambda *_, **__: step)
    overlapping = dataclasses.replace(RUN, mesh=dataclasses.replace(RUN.mesh, overlap=True))
    with pytest.raises(UserError, match=r"config.mesh.overlap is true, which .* cpu does not know: INVALID.*xla_tpu_x"):
        train(overlapping, tmp_path)
    with pytest.raises(jax.errors.JaxRuntimeError):
        train(RUN, tmp_path / "other")


def little_memory() -> None:
    """For a child process."""
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, resource.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # to limit the child alone, in a process that may have JAX
def test_memory_that_is_really_too_little_names_what_to_change(tmp_path):
    """A step that needs ten GiB, in a process that may have six."""
    more = ("--config.batch=65536", "--config.samples=131072", "--config.optim.warmup_steps=0")
    process = start(*LONG, *more, f"--workdir={tmp_path}", devices=1, prepare=little_memory)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert re.match(r"error: out of memory on 1 x cpu \(.*model\.remat=.*micro_batch=", errors.splitlines()[-1]), errors


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_stdout_that_is_closed_stops_no_run(tmp_path, monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    process = start(*LONG, f"--workdir={tmp_path}", devices=1)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=300) == 0, errors
    assert steps_of(tmp_path) == list(range(1, 7))
    process.stderr.close()


def children(pid):
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found.setdefault(int(fields[1]), []).append(int(path.parent.name))
    return found.get(pid, [])


def workers_of(pid):
    return [child for child in children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_data_worker_that_dies_ends_the_run_for_a_restart(digits_dir, tmp_path):
    more = ("--config.eval.dataset=", "--config.samples=480000", "--config.data.workers=2")
    process = start(f"--config.data.data_dir={digits_dir}", *more, f"--workdir={tmp_path}", devices=1)
    wait_for_step(tmp_path, 3, process)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == RESTART, errors
    assert "error: a data worker died (" in errors
    assert "started again, the run goes on from its newest checkpoint" in errors


@pytest.mark.slow
def test_sigterm_to_one_process_saves_both_at_the_same_step(tmp_path):
    """Also where it was resumed, and the other gets it; in the end its losses are an unstopped pair's, to the bit."""
    keys = (*LONG, "--config.checkpoint.every=10000", "--config.samples=19200")

    def run(name):
        return peers(*keys, f"--workdir={tmp_path / name}", devices=1)

    saved = 0
    for victim, at in ((1, 150), (0, 154)):
        both = run("a")
        wait_for_step(tmp_path / "a", max(at, saved + 4), *both)
        reached = max(steps_of(tmp_path / "a"))
        both[victim].send_signal(signal.SIGTERM)
        out = outputs(both, timeout=120)
        assert [process.returncode for process in both] == [RESTART, RESTART], out
        saved = max(int(path.name) for path in (tmp_path / "a" / "checkpoints").iterdir() if path.name.isdecimal())
        assert reached <= saved < reached + 100  # a few steps later, whatever the number of the step
        assert all(f"stopped by SIGTERM after step {saved}, which is saved" in errors for _, errors in out)
        assert steps_of(tmp_path / "a") == list(range(1, saved + 1))
    for name in ("a", "straight"):
        both = run(name)
        out = outputs(both, timeout=400)
        assert [process.returncode for process in both] == [0, 0], out
        assert (f"resuming at step {saved}" in out[0][0]) == (name == "a")
    assert list(rows_of(tmp_path / "a", "loss")) == list(range(1, 401))
    assert rows_of(tmp_path / "a", "loss") == rows_of(tmp_path / "straight", "loss")


@pytest.mark.slow
def test_two_processes_leave_an_evaluation_at_the_same_batch(tmp_path):
    long = ("--config.eval.held_out=source=synthetic", "--config.eval.held_out_pairs=96000", "--config.eval.batch=48")
    keys = (*LONG, *long, "--config.eval.every=5", "--config.checkpoint.every=10000", f"--workdir={tmp_path}")
    both = peers(*keys, devices=1)
    wait_for_step(tmp_path, 5, *both)  # its row is written when the evaluation begins
    both[1].send_signal(signal.SIGTERM)
    out = outputs(both, timeout=120)
    assert [process.returncode for process in both] == [RESTART, RESTART], out
    assert all("stopped by SIGTERM after step 5, which is saved" in errors for _, errors in out)
    assert (tmp_path / "checkpoints" / "5").is_dir()
    assert rows_of(tmp_path, "held_out/loss") == {}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other_within_a_second(tmp_path, victim):
    both = peers(*LONG, "--config.samples=480000", f"--workdir={tmp_path}", devices=1)
    wait_for_step(tmp_path, 4, *both)
    both[victim].kill()
    began = time.monotonic()
    other = both[1 - victim]
    code = other.wait(timeout=60)
    took = time.monotonic() - began
    errors = outputs(both)[1 - victim][1]
    print(f"process {victim} killed: the other exits with {code} after {took:.2f} s: {errors.splitlines()[-1]}")
    assert code == RESTART, errors
    assert f"process {victim} of the run is gone; started again, the run goes on from its newest checkpoint" in errors
    both = peers(*LONG, f"--workdir={tmp_path}", "--config.samples=480000", devices=1)
    reached = max(steps_of(tmp_path))
    wait_for_step(tmp_path, reached + 3, *both)
    for process in both:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_stands_still_ends_the_other(tmp_path, victim):
    more = ("--config.samples=480000", "--config.distributed.heartbeat=10")
    both = peers(*LONG, *more, f"--workdir={tmp_path}", devices=1)
    wait_for_step(tmp_path, 4, *both)
    both[victim].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    other = both[1 - victim]
    code = other.wait(timeout=60)
    took = time.monotonic() - began
    both[victim].send_signal(signal.SIGCONT)
    both[victim].wait(timeout=60)
    errors = outputs(both)[1 - victim][1]
    print(f"process {victim} stopped: the other exits with {code} after {took:.1f} s")
    assert code == RESTART, errors
    assert took < 10 + 15
    assert f"process {victim} of the run is silent for 10 s" in errors


@pytest.mark.slow
def test_a_run_killed_with_its_workers_leaves_no_process(digits_dir, tmp_path):
    more = ("--config.eval.dataset=", "--config.samples=480000", "--config.data.workers=2")
    before = set(os.listdir("/dev/shm"))
    process = start(f"--config.data.data_dir={digits_dir}", *more, f"--workdir={tmp_path}", devices=1)
    wait_for_step(tmp_path, 3, process)
    below = children(process.pid)
    assert len(workers_of(process.pid)) == 2
    process.kill()
    process.communicate()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in below):
        time.sleep(0.1)
    left = [pid for pid in below if Path(f"/proc/{pid}").exists()]
    print(f"after {time.monotonic() - end + 20:.1f} s: {len(left)} processes left of {len(below)}")
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")}
