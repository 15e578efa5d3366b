"""Training data from an HTTP store beside the same shards on the local disk: `python -m benchmarks.input_remote`.

The store answers after 40 ms, and 1 % of its answers are 503; it is a process of its own, and the reader keeps to one
core where there are several, so that neither takes the other's time. Both ways decode, crop and tokenise, and run in
turn; the first batches of each turn, which wait for the first window, are not timed. At the end the store is down for
20 s, and the batches are compared with the local ones, bit for bit.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.photographs import write_shards
from clip_jax.console import print_table
from clip_jax.data.augment import Augment
from clip_jax.data.images import Preprocess
from clip_jax.data.order import WindowShuffle
from clip_jax.data.pipeline import train_batches
from clip_jax.data.reading import Part
from clip_jax.data.tar_source import TarSource
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.data.transforms import TrainTransform

BATCH = 256
TRANSFORM = TrainTransform(Preprocess(), Tokenizer(), augment=Augment())


def main() -> None:
    """Prints speeds, requests, and how the outage went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.04, help="seconds before each answer")
    parser.add_argument("--failing", type=float, default=0.01, help="share of the answers that are 503")
    parser.add_argument("--outage", type=float, default=20.0, help="seconds for which the store is down")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--samples", type=int, default=1_024, help="in each shard")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pattern = write_shards(
            Path(folder, "shards"), shards=arguments.shards, samples=arguments.samples, size=(256, 256)
        )
        with store_process(Path(folder, "shards"), latency=arguments.latency, failing=arguments.failing) as store:
            here = part(pattern, folder)
            there = part(pattern.replace(f"{folder}/shards", store.url), f"{folder}/remote")
            compare(here, there, store, rounds=arguments.rounds)
            outage(here, there, store, seconds=arguments.outage)


class RemoteStore:
    """A store in another process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.url: str = pipe.recv()

    def requests(self) -> int:
        """Returns the requests so far."""
        self._pipe.send(("requests", None))
        return self._pipe.recv()

    def be_down(self, seconds: float) -> None:
        """Answers every request with 503 for so long, from now on."""
        self._pipe.send(("down", seconds))
        self._pipe.recv()


@contextlib.contextmanager
def store_process(folder: Path, **options: Any) -> Iterator[RemoteStore]:
    """Runs a store; on a core that this process then leaves alone, where there are several."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, folder, options), daemon=True)
    cores = sorted(os.sched_getaffinity(0))
    process.start()
    os.sched_setaffinity(0, cores[:1])
    try:
        yield RemoteStore(mine)
    finally:
        os.sched_setaffinity(0, cores)
        process.terminate()
        process.join()


def _serve(pipe: Connection, folder: Path, options: dict[str, Any]) -> None:
    from tests.http_store import serving

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    with serving(folder, **options) as store:
        pipe.send(store.url)
        while True:
            what, value = pipe.recv()
            if what == "down":
                store.down_until = time.monotonic() + value
            pipe.send(store.requests)


def part(pattern: str, index_dir: str) -> Part:
    """Returns shards in windows of 8 blocks of 256, in 2 streams."""
    source = TarSource(pattern, index_dir=index_dir)
    return Part(source, WindowShuffle(source.counts, seed=0, streams=2, block=256, window=8))


def compare(here: Part, there: Part, store: RemoteStore, *, rounds: int) -> None:
    """Prints the speed of both, and the requests of the remote one."""
    records = len(here.source)
    warm, timed = 16, records // BATCH - 16
    speeds: dict[str, list[tuple[float, float]]] = {"local": [], "remote": []}
    before = store.requests()
    for number in range(rounds):
        for name, each in (("local", here), ("remote", there)):
            speeds[name].append(speed(each, position=number * records // BATCH * BATCH, warm=warm, timed=timed))
    requests = store.requests() - before
    rows = []
    for name, found in speeds.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append([name, f"{1 / wall:,.0f}", f"{1e6 * cpu:,.0f}"])
    print_table("Pairs from an HTTP store and from the disk", ["", "pairs/s", "CPU microseconds a pair"], rows)
    shares = [near[0] / far[0] for near, far in zip(speeds["local"], speeds["remote"], strict=True)]
    print(
        f"speed of local: {statistics.median(shares):.1%} (goal 85 %; rounds {', '.join(f'{x:.0%}' for x in shares)})"
    )
    print(f"requests a sample: {requests / (rounds * (warm + timed) * BATCH):.4f} (goal 0.1)")


def speed(part: Part, *, position: int, warm: int, timed: int) -> tuple[float, float]:
    """Returns wall and CPU seconds a pair."""
    stream = train_batches([part], transform=TRANSFORM, batch=BATCH, seed=0, position=position)
    for _ in itertools.islice(stream, warm):
        pass
    began, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(stream, timed):
        pass
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    stream.close()
    return wall / timed / BATCH, cpu / timed / BATCH


def outage(here: Part, there: Part, store: RemoteStore, *, seconds: float) -> None:
    """Lets the store be down while batches are read, and compares them."""
    batches = len(here.source) // BATCH
    local, remote = (train_batches([each], transform=TRANSFORM, batch=BATCH, seed=0) for each in (here, there))
    bad, longest = 0, 0.0
    for number in range(batches):
        if number == batches // 4:
            store.be_down(seconds)
        expected, began = next(local), time.perf_counter()
        found = next(remote)
        longest = max(longest, time.perf_counter() - began)
        bad += int((found["bad"] > 0).sum())
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
    local.close()
    remote.close()
    print(
        f"{seconds:.0f} s outage: {batches * BATCH:,} pairs, the bits of local ones, {bad} bad; "
        f"longest wait {longest:.1f} s"
    )


if __name__ == "__main__":
    main()
