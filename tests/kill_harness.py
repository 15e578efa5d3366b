"""Kills a training process with SIGKILL at random moments, starts it again, until the run has ended.

A third of the kills is aimed at a save: the process is killed as soon as one is seen open in the checkpoints' folder.
The others come while it starts and restores, or while it trains. To restart in a second and not in six, the processes
are forked by one that has imported JAX and has never used it:

    PYTHONPATH=.:tests python tests/kill_harness.py

reads workdirs from its input, a line each, and answers with the process id, then its exit status
"""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from devices import simulating

ROOT = Path(__file__).parent.parent
EPOCH, BATCH, EPOCHS, PAUSE_S = 1_000, 50, 2, 0.04
TMP = "*.orbax-checkpoint-tmp"


class Outcome(NamedTuple):
    """What a run left: the digest of its last checkpoint's leaves, every loss, and every sample that it consumed."""

    leaves: dict[str, str]
    losses: dict[int, str]
    samples: list[int]


def train_recorded(workdir: Path) -> None:
    """A run of two epochs, with a checkpoint every second step; it writes down the samples of every batch."""
    from tiny import TINY

    from clip_jax.config import CheckpointConfig, DataConfig
    from clip_jax.data.loader import open_training_data
    from clip_jax.models.variants import TextConfig
    from clip_jax.run.trainer import train

    config = replace(
        TINY,
        model=replace(TINY.model, text=TextConfig(width=32, heads=2, layers=1, context=16)),
        data=DataConfig(source="synthetic", mixture=("source=synthetic",)),
        checkpoint=CheckpointConfig(every=2, keep=2),
        batch=BATCH,
        samples=EPOCH * EPOCHS,
    )
    data = open_training_data(config)

    def batches(position: int):
        with closing(data.batches(position)) as stream, (workdir / "samples.jsonl").open("a") as file:
            for batch in stream:
                file.write("\n" + json.dumps([position, batch["index"].tolist()]))  # a torn line is ended by the next
                file.flush()
                position += BATCH
                time.sleep(PAUSE_S)
                yield batch

    train(config, workdir, data=data._replace(batches=batches))


def outcome(workdir: Path) -> Outcome:
    """Reads what a run that has ended left: samples by position; where a position was read twice, they were equal."""
    from clip_jax.run import metrics

    record = json.loads((_newest(workdir) / "record" / "metadata").read_text())
    by_position: dict[int, list[int]] = {}
    for line in (workdir / "samples.jsonl").read_text().splitlines():
        try:
            position, index = json.loads(line)
        except ValueError:
            continue
        assert by_position.setdefault(position, index) == index, position
    return Outcome(
        {path: leaf["sum"] for path, leaf in record["leaves"].items()},
        {row["step"]: row["loss"].hex() for row in metrics.read(workdir) if "loss" in row},
        [index for position in sorted(by_position) for index in by_position[position]],
    )


def _newest(workdir: Path) -> Path:
    return max((path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))


class Processes:
    """Starts training processes; for use in `with`."""

    def __enter__(self) -> "Processes":
        environment = simulating(1) | {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.communicate(timeout=60)

    def start(self, workdir: Path) -> int:
        """Returns the process id."""
        print(workdir, file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        """Returns the exit status of the process that was started last, negative for a signal."""
        return int(self._server.stdout.readline())


def run_with_kills(
    processes: Processes, folder: Path, *, kills: int, rng: random.Random
) -> tuple[collections.Counter, list[Path]]:
    """Trains one run after the other to its end, until there were `kills` kills.

    Returns:
      How many kills there were of each kind, and the workdirs.
    """
    done: collections.Counter = collections.Counter()
    runs = [folder / "0"]
    folder.mkdir()
    waits = {"save": _until_save, "training": _until_training, "start": _until_start}
    while done.total() < kills:
        process = processes.start(runs[-1])
        kind = ("save", "training", "start", "save", "training", "training")[done.total() % 6]
        if waits[kind](process, runs[-1], rng):
            os.kill(process, signal.SIGKILL)
        if (status := processes.wait()) == -signal.SIGKILL:
            done[kind] += 1
        else:
            assert status == 0, runs[-1].with_suffix(".log").read_text()
            runs.append(folder / str(len(runs)))
    processes.start(runs[-1])
    assert processes.wait() == 0, runs[-1].with_suffix(".log").read_text()
    return done, runs


def _until_save(process: int, workdir: Path, rng: random.Random) -> bool:
    """Waits for the moment in which a save of this process is open: its first, second or third."""
    folder, seen, wanted = workdir / "checkpoints", set(), rng.randint(1, 3)
    left = {path.name for path in folder.glob(TMP)}
    while _is_alive(process):
        seen |= {path.name for path in folder.glob(TMP)} - left
        if len(seen) >= wanted:
            return True
        left &= {path.name for path in folder.glob(TMP)}
        time.sleep(0.001)
    return False


def _until_training(process: int, workdir: Path, rng: random.Random) -> bool:
    """Waits until the process has taken a few batches, and a random time more."""
    file, wanted = workdir / "samples.jsonl", rng.randint(1, 6)
    size, grown = _size(file), 0
    while _is_alive(process):
        if _size(file) > size:
            size, grown = _size(file), grown + 1
        if grown >= wanted:
            time.sleep(rng.uniform(0, 0.1))
            return True
        time.sleep(0.001)
    return False


def _until_start(process: int, workdir: Path, rng: random.Random) -> bool:
    """Waits for a moment in which the process imports, compiles or restores."""
    end = time.monotonic() + rng.uniform(0, 3)
    while _is_alive(process) and time.monotonic() < end:
        time.sleep(0.01)
    return _is_alive(process)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _serve() -> None:
    import grain  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    import clip_jax.run.trainer  # noqa: F401

    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            log = os.open(line.strip() + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                train_recorded(Path(line.strip()))
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
