"""Checkpoints that cannot be written: a warning while a run trains, an error at its end, and nothing lost."""

import contextlib
import gc
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from devices import outputs
from full_disk import small_files
from states import assert_same_bits, small_state, target_of
from test_distributed import lines, peers
from test_operations import LONG
from tiny import TINY

from clip_jax.checkpoints.checkpoint import Checkpoints
from clip_jax.checkpoints.lock import locked
from clip_jax.config import CheckpointConfig
from clip_jax.errors import UserError

# what Orbax leaves of a write that failed
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parent.parent
STATE = small_state(1)


@pytest.fixture(autouse=True)
def collected():
    """Here, where the warnings are expected, and not in a later test."""
    yield
    gc.collect()


def save(checkpoints: Checkpoints, step: int, state=STATE, *, now: bool = True) -> bool:
    return checkpoints.save(step, state, position=32 * step, config=TINY, data={}, now=now)


def names(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_failed_write_costs_a_warning_and_the_next_one_succeeds(tmp_path, caplog):
    """By a limit on the size of files, which any user may set; the error comes late, out of a background thread."""
    with Checkpoints(tmp_path, CheckpointConfig(every=2)) as checkpoints, caplog.at_level(logging.WARNING):
        assert save(checkpoints, 2)
        checkpoints.wait()
        with small_files(1_000):
            save(checkpoints, 4)
            with pytest.raises(
                UserError, match=r"step 4 could not be written .*File too large; the newest is of step 2"
            ):
                checkpoints.wait()
        assert checkpoints.latest() == 2
        assert len([line for line in caplog.messages if "could not be written" in line]) == 1
        assert "training goes on" in caplog.text
        assert not save(checkpoints, 5, now=False)
        assert save(checkpoints, 6, now=False)  # the schedule's next
        checkpoints.wait()
        assert names(tmp_path) == {"2", "6"}  # what was left of step 4 is gone
        assert_same_bits(checkpoints.restore(6, target_of(STATE)).state, STATE)


def test_the_run_ends_in_an_error_when_its_last_checkpoint_failed(tmp_path):
    def run() -> None:
        with small_files(1_000), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            save(checkpoints, 3)

    with pytest.raises(UserError, match=r"step 3 could not be written .*there is no older one\. Make room, and start"):
        run()
    assert not [name for name in names(tmp_path) if name.isdigit()]


def test_another_error_is_not_hidden_by_that_of_a_failed_write(tmp_path):
    def run() -> None:
        with small_files(1_000), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            save(checkpoints, 3)
            raise ConnectionError("the store is gone")

    with pytest.raises(ConnectionError):
        run()


def test_a_full_disk_is_heard_of_and_room_is_used_again(tmp_path, caplog):
    large = small_state(1, extra=150_000)
    caplog.set_level(logging.WARNING)
    room = "1800k"  # for two and a half: a checkpoint takes 690 to 720 kB, by how many files Orbax makes of it
    with small_disk(tmp_path / "disk", room) as disk, Checkpoints(disk, CheckpointConfig(keep=9)) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, large)
            with contextlib.suppress(UserError):
                checkpoints.wait()
        assert "No space left on device; training goes on, and the newest is of step 2" in caplog.text
        assert checkpoints.latest() == 2
        assert_same_bits(checkpoints.restore(2, target_of(large)).state, large)
        shutil.rmtree(disk / "checkpoints" / "1")  # the user makes room
        assert save(checkpoints, 4, large)
        checkpoints.wait()
        assert checkpoints.latest() == 4


def only_small_files() -> None:
    """For a child process: no file of it can grow over 100 kB; Python ignores the signal, and writes fail."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_train_ends_with_one_line_and_exit_code_2(tmp_path):
    """And again, with room, from the start: nothing was lost that was there."""
    command = [
        sys.executable, "train.py", "--config=configs/demo.py:batch=16,samples=64,warmup_steps=1",
        "--config.data.source=synthetic", "--config.eval.dataset=", f"--workdir={tmp_path}",
    ]  # fmt: skip
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=only_small_files, timeout=400)
    assert failed.returncode == 2
    (said,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert re.match("error: the checkpoint of step 4 could not be written to .*: File too large; ", said)
    assert "Task exception was never retrieved" not in failed.stderr
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert "4" in names(tmp_path)


@pytest.mark.slow
def test_a_write_that_fails_in_one_process_is_heard_of_by_all(tmp_path):
    """Process 1 cannot write: both train on, end with 2, and no half of a checkpoint counts."""
    waits = "--config.checkpoint.timeout_s=20"
    keys = (*LONG, "--config.checkpoint.every=4", "--config.mesh.fsdp=2", waits, f"--workdir={tmp_path}")
    both = peers(*keys, devices=1, prepare={1: only_small_files})
    out = outputs(both, timeout=400)
    assert [process.returncode for process in both] == [2, 2], out
    for (_, errors), reason in zip(
        out, ("another process did not write its part within", "File too large"), strict=True
    ):
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert re.match(rf"error: the checkpoint of step 6 could not be written to .*: {reason}", said[0]), errors
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, 7))
    assert [name for name in names(tmp_path) if name.isdecimal()] == []
    both = peers(*keys, devices=1)
    out = outputs(both, timeout=400)
    assert [process.returncode for process in both] == [0, 0], out
    assert "6" in names(tmp_path)


def test_two_runs_in_one_workdir(tmp_path):
    refused = pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on \S+, since 20.*; let it end")
    with locked(tmp_path), refused, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("gone", [True, False])
def test_a_lock_of_another_host_is_waited_for(tmp_path, monkeypatch, gone):
    """A file server keeps that of a host that is gone for a while, in which the run is started again."""
    monkeypatch.setattr("clip_jax.checkpoints.lock._LEASE_S", 60.0 if gone else -1.0)
    with contextlib.ExitStack() as other:
        other.enter_context(locked(tmp_path))
        (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "then"}))
        monkeypatch.setattr("clip_jax.checkpoints.lock.time.sleep", lambda seconds: other.close())
        expected = contextlib.nullcontext() if gone else pytest.raises(UserError, match="process 7 on elsewhere, since")
        with expected, locked(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_a_killed_owner_leaves_no_lock(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from clip_jax.checkpoints.lock import locked
with locked(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(100)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=rf"in use by process {owner.pid} on "), locked(tmp_path):
        pass
    owner.kill()
    owner.wait()
    owner.stdout.close()
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_a_read_only_workdir_is_one_line(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with (
            pytest.raises(
                UserError, match=r"^--workdir .*disk cannot be written: Read-only file system; name a folder"
            ),
            locked(disk),
        ):
            pass
        with pytest.raises(UserError, match=r"checkpoints cannot be written: Read-only file system"):
            save(Checkpoints(disk, CheckpointConfig()), 1)
