"""Traces of steps: exactly those that were asked for, by config or by a signal, and no run that they could end."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_health import RUN, bits
from test_operations import preempting

from clip_jax.config import LogConfig
from clip_jax.run.profiling import Profiler
from clip_jax.run.trainer import train

ROOT = Path(__file__).parent.parent

# Python's from 3.12 on, about a type of jaxlib's; as an error it ends the process.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute")


def steps_in(file: Path) -> list[int]:
    """The steps of training that a trace holds."""
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            found += [dict(event.stats)["step_num"] for event in line.events if event.name == "train"]
    return sorted(found)


def traces(workdir: Path) -> dict[str, list[int]]:
    files = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
    return {file.parent.name: steps_in(file) for file in files}


@pytest.mark.slow
def test_a_window_of_steps_and_a_signal_leave_their_traces_and_no_other_bit(tmp_path, capsys):
    before = signal.getsignal(signal.SIGUSR1)
    run = dataclasses.replace(RUN, log=LogConfig(every=1, tensorboard=False, profile=(3, 4), profile_steps=2))
    state = train(run, tmp_path / "run", data=preempting(run, 8, number=signal.SIGUSR1))
    assert traces(tmp_path / "run") == {"steps-3-4": [3, 4], "steps-9-10": [9, 10]}
    assert f"profiled steps 3 to 4: xprof --logdir={tmp_path / 'run' / 'profile'}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGUSR1) == before
    assert bits(state) == bits(train(RUN, tmp_path / "plain"))
    assert not (tmp_path / "plain" / "profile").exists()


def profiled(folder: Path, steps: range, *, window=(), ask_before: int = 0) -> list[str]:
    said: list[str] = []
    with Profiler(folder / "profile", window, on_signal=3, say=said.append) as profiler:
        for step in steps:
            if step == ask_before:
                os.kill(os.getpid(), signal.SIGUSR1)
            profiler.before(step, None)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                pass
            profiler.after(step, None)
    return said


def test_a_window_that_the_run_enters_late_or_leaves_early(tmp_path):
    profiled(tmp_path / "resumed", range(4, 9), window=(2, 5))
    assert traces(tmp_path / "resumed") == {"steps-4-5": [4, 5]}
    profiled(tmp_path / "ended", range(1, 4), ask_before=2)
    assert traces(tmp_path / "ended") == {"steps-2-4": [2, 3]}
    assert profiled(tmp_path / "past", range(8, 10), window=(2, 5)) == []


@pytest.mark.filterwarnings("default")
def test_a_trace_that_fails_ends_no_training(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    assert profiled(tmp_path, range(1, 5), window=(2, 3)) == []
    assert caplog.text.count("no profile was written") == 1


WORKER = """
import os, signal
from clip_jax.data.pipeline import _start_worker
_start_worker(0, 1)
os.kill(os.getpid(), signal.SIGUSR1)
print("goes on")
"""
STARTING = """
import os, signal
import train
try:
    train.main(["train.py", "an argument that ends it"], overrides=[])
except train.UserError:
    os.kill(os.getpid(), signal.SIGUSR1)
    print("goes on")
"""


@pytest.mark.parametrize("code", [WORKER, STARTING], ids=["a data worker", "a run without a step"])
def test_who_cannot_trace_goes_on_where_a_whole_job_gets_the_signal(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "goes on\n", done.stderr
