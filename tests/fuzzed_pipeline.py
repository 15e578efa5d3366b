"""Shards through the real pipeline in a process of its own, so that a crash, a hang and a growing memory are seen.

Warnings are as in training, not errors as in the tests. Kept free of JAX, so that it starts in a second.
"""

import contextlib
import faulthandler
import multiprocessing
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

LIMIT_S = 60
MAX_BYTES = 2 << 30


class Rows(NamedTuple):
    """An epoch of a shard, in the order of its samples; or why there is none."""

    batch: dict[str, np.ndarray]
    error: str
    peak_bytes: int


class Child:
    """Reads shards; fails the test where the process dies, or takes longer than LIMIT_S."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def epoch(self, shard, index_dir, counts="") -> Rows:
        try:
            self._connection.send((str(shard), str(index_dir), str(counts)))
            if not self._connection.poll(LIMIT_S + 30):
                pytest.fail(f"no answer for {shard}")
            rows = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            pytest.fail(f"the process died or hung (exit code {self._process.exitcode}); its stderr says where")
        assert not rows.error, rows.error
        assert rows.peak_bytes <= MAX_BYTES
        return rows

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()


@contextlib.contextmanager
def child():
    process = Child()
    try:
        yield process
    finally:
        process.close()


def _serve(connection) -> None:
    warnings.simplefilter("ignore")
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        try:
            batch, error = _epoch(*asked), ""
        except Exception:
            batch, error = {}, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        connection.send(Rows(batch, error, _peak_bytes()))


def _peak_bytes() -> int:
    """Not `ru_maxrss`, which counts the memory of the process that this one was forked from."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def _epoch(shard, index_dir, counts) -> dict[str, np.ndarray]:
    """Returns one epoch as a batch, its rows in the order of the samples; images are also read as in evaluation."""
    from clip_jax.data.augment import Augment
    from clip_jax.data.images import ImageError, Preprocess, eval_image
    from clip_jax.data.order import WindowShuffle
    from clip_jax.data.pipeline import train_batches
    from clip_jax.data.reading import Part
    from clip_jax.data.records import RecordError
    from clip_jax.data.tar_source import TarSource
    from clip_jax.data.tokenizer import tokenize
    from clip_jax.data.transforms import TrainTransform

    tars = TarSource(shard, index_dir=index_dir, counts=counts)
    transform = TrainTransform(Preprocess(size=8), tokenize, context=16, augment=Augment())
    order = WindowShuffle(tars.counts, seed=0, streams=1, block=16, window=2)
    stream = train_batches([Part(tars, order)], transform=transform, batch=len(tars), seed=0, prefetch=1)
    try:
        batch = next(stream)
    finally:
        stream.close()
    for index in range(len(tars)):
        with contextlib.suppress(RecordError, ImageError):
            eval_image(tars[index].image, transform.preprocess)
    rows = np.argsort(batch["index"])
    return {name: values[rows] for name, values in batch.items()}
