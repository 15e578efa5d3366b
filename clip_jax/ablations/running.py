"""The runs of a sweep on this machine, one after another or several at once.

Each is a process of its own, `train.py` as it would be started by hand, and writes what it prints into `train.log` of
its workdir. What is finished is known from the run's own files, so a sweep that was interrupted goes on where it was.
"""

import glob
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import clip_jax
from clip_jax.ablations.launching import train_arguments
from clip_jax.ablations.runs import compared_config, is_finished, read_config
from clip_jax.ablations.sweep import Job, Sweep
from clip_jax.config import as_json, describe_diff, diff
from clip_jax.console import clock
from clip_jax.errors import UserError
from clip_jax.files import alone

LOG, LOCK = "train.log", "sweep.lock"
_POLL, _PATIENCE = 0.1, 10.0  # seconds; the second beyond a run's own time to save
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Outcome(NamedTuple):
    """What became of a run: its seconds in this sweep, and the last line of its log where it failed."""

    job: Job
    state: Literal["finished before", "finished", "failed"]
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Slot:
    """A part of the machine that one run has at a time.

    Attributes:
      cores: numbers of the CPU cores; empty means all.
      environment: variables that hide the other slots' accelerators.
    """

    cores: tuple[int, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def run_sweep(sweep: Sweep, jobs: Sequence[Job], folder: Path, *, at_once: int = 1) -> list[Outcome]:
    """Runs what is not finished; a run that fails stops no other.

    Args:
      sweep: the study.
      jobs: as `expand` gives them.
      folder: the sweep's; each run's workdir is in it.
      at_once: processes at the same time, each with its share of the cores and of the GPUs.

    Returns:
      What became of each run, in the order of `jobs`.

    Raises:
      UserError: a workdir holds a run of another config, another process runs this sweep, or the machine cannot be
        divided; nothing was started.
    """
    slots = machine_slots(at_once, os.environ)
    script = _train_script()
    _check_unchanged(jobs, folder)
    with _locked(folder) as lock:
        done = [job for job in jobs if is_finished(folder / job.folder, job.config)]
        outcomes = {job.folder: Outcome(job, "finished before") for job in done}
        waiting = deque(job for job in jobs if job.folder not in outcomes)
        print(f"{len(jobs)} runs in {folder}: {len(outcomes)} finished before, {len(waiting)} to go", flush=True)
        with _Processes(script, lock) as processes:
            while waiting or processes.running:
                for slot in processes.free(slots):
                    if waiting:
                        job = waiting.popleft()
                        processes.start(train_arguments(sweep, job, folder), job, folder / job.folder, slot)
                for outcome in processes.ended():
                    outcomes[outcome.job.folder] = outcome
                    print(f"[{len(outcomes)}/{len(jobs)}] {_line(outcome)}", flush=True)
                time.sleep(_POLL)
    return [outcomes[job.folder] for job in jobs]


def machine_slots(count: int, environment: Mapping[str, str]) -> list[Slot]:
    """Divides this machine's cores and GPUs evenly; one slot is the whole machine, as a run by hand has it.

    Raises:
      UserError: there are fewer cores or GPUs than slots, or TPUs, which one process holds as a whole.
    """
    if count < 1:
        raise UserError(f"--jobs={count}: it must be at least 1")
    if count == 1:
        return [Slot()]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise UserError(f"--jobs={count}: there are {len(cores)} cores; use --jobs={len(cores)} or less")
    on_cpu = environment.get("JAX_PLATFORMS") == "cpu"
    if not on_cpu and glob.glob("/dev/accel*"):
        raise UserError(f"--jobs={count}: a process holds all TPUs of its host; use --jobs=1")
    gpus = [] if on_cpu else _gpus(environment)
    if gpus and len(gpus) < count:
        raise UserError(f"--jobs={count}: there are {len(gpus)} GPUs; use --jobs={len(gpus)} or less")
    return [
        Slot(
            tuple(_share(cores, number, count)),
            (("CUDA_VISIBLE_DEVICES", ",".join(_share(gpus, number, count))),) if gpus else (),
        )
        for number in range(count)
    ]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [each for each in environment["CUDA_VISIBLE_DEVICES"].split(",") if each]
    return sorted(path.removeprefix("/dev/nvidia") for path in glob.glob("/dev/nvidia[0-9]*"))


def _share(items: Sequence, number: int, count: int) -> Sequence:
    return items[len(items) * number // count : len(items) * (number + 1) // count]


class _Processes:
    """The runs that are going on; those that are left are stopped at the end of a `with`, however that comes.

    Each hears of Ctrl-C, or of a terminal that closes, from here alone: a second signal would end it without a save.
    """

    def __init__(self, script: Path, lock: int) -> None:
        self._script, self._lock = script, lock
        self.running: dict[Slot, tuple[Job, subprocess.Popen, float, Path]] = {}
        self._unstarted: list[Outcome] = []

    def __enter__(self) -> "_Processes":
        heard = [each for each in _STOPPING if signal.getsignal(each) != signal.SIG_IGN]  # nohup's ignore one
        self._handlers = {each: signal.signal(each, _exit) for each in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        running = [(job, process) for job, process, _, _ in self.running.values()]
        if running:
            print(f"stopping {len(running)} run(s), which save; the same command goes on", flush=True)
        for _, process in running:
            process.terminate()
        try:
            for job, process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(job.config.health.grace_s + _PATIENCE)
        finally:  # after a second signal too
            for _, process in running:
                process.kill()
                process.wait()
            for each, handler in self._handlers.items():
                signal.signal(each, handler)

    def free(self, slots: Sequence[Slot]) -> list[Slot]:
        return [slot for slot in slots if slot not in self.running]

    def start(self, arguments: Sequence[str], job: Job, workdir: Path, slot: Slot) -> None:
        try:
            self._start(arguments, job, workdir, slot)
        except OSError as error:  # such as a full disk, of which no other run need hear
            self._unstarted.append(Outcome(job, "failed", note=f"it could not be started: {error}"))

    def _start(self, arguments: Sequence[str], job: Job, workdir: Path, slot: Slot) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(self._script), *arguments[1:]]
        with (workdir / LOG).open("a") as log:
            print("$", *command, file=log, flush=True)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(slot.environment),
                process_group=0,
                pass_fds=(self._lock,),  # a sweep that was killed stays locked while one of its runs goes on
            )
        if slot.cores:
            os.sched_setaffinity(process.pid, slot.cores)  # long before XLA counts them
        self.running[slot] = job, process, time.monotonic(), workdir

    def ended(self) -> Iterator[Outcome]:
        while self._unstarted:
            yield self._unstarted.pop()
        for slot, (job, process, began, workdir) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[slot]
            seconds = time.monotonic() - began
            if code == 0 and is_finished(workdir, job.config):
                yield Outcome(job, "finished", seconds)
            else:
                yield Outcome(job, "failed", seconds, f"exit code {code}: {_last_line(workdir / LOG)}")


def _exit(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _check_unchanged(jobs: Sequence[Job], folder: Path) -> None:
    """Refuses workdirs whose runs began with another config than they would go on with; what the launch files set, and
    what is logged or saved, may be another."""
    changed = []
    for job in jobs:
        saved = read_config(folder / job.folder)
        if saved is not None and compared_config(saved) != compared_config(job.config):
            changed.append(f"{job.folder} ({describe_diff(diff(as_json(saved), as_json(job.config)))})")
    if changed:
        raise UserError(
            f"{folder} holds runs of another config: {'; '.join(changed[:3])}"
            + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
            + " (saved -> sweep); give the sweep another name, or move these runs away"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Yields the file descriptor of a lock that this process and its children hold."""
    busy = f"{folder} is in use: another process runs this sweep, or one of its runs"
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(alone(folder / LOCK, busy=busy, without="do not run it twice at once"))
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}; name a folder that can") from None
        yield lock


def _train_script() -> Path:
    """Returns train.py of the folder that this is called in, or of the package's checkout."""
    for folder in (Path.cwd(), Path(clip_jax.__file__).parent.parent):
        if (folder / "train.py").is_file():
            return folder / "train.py"
    raise UserError("there is no train.py here; run this in the folder of the repository")


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _line(outcome: Outcome) -> str:
    note = f": {outcome.note}" if outcome.note else ""
    return f"{outcome.job.folder} {outcome.state} after {clock(outcome.seconds)}{note}"
