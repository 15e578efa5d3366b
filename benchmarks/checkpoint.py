"""What checkpoints cost, and their checksums: `python -m benchmarks.checkpoint --model ViT-B/32`.

A state of random bits on one device is saved and read, in rounds, and every part is timed beside its counterpart: the
checksums beside the save that they are for, and a verified restore beside Orbax's alone.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clip_jax.checkpoints.checkpoint import Checkpoints
from clip_jax.checkpoints.checksum import checksums
from clip_jax.config import CheckpointConfig, DataConfig, MeshConfig, RunConfig
from clip_jax.models.clip import CLIP
from clip_jax.models.variants import model_config
from clip_jax.partition import make_mesh
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import abstract_state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    run = RunConfig(model=model_config(arguments.model), data=DataConfig(source="synthetic"))
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    target = abstract_state(CLIP(run.model), make_optimizer(run.optim, steps=run.steps), mesh=mesh)
    state = jax.tree.map(_random, target)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{arguments.model}: {size / 2**20:,.0f} MiB in {len(jax.tree.leaves(state))} leaves, {jax.devices()[0]}")
    times: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, seconds in _round(run, state, target, Path(folder)).items():
                times.setdefault(name, []).extend([seconds] if number or arguments.rounds == 1 else [])
    for name, seconds in times.items():
        print(f"{name:34} {statistics.median(seconds) * 1e3:10,.1f} ms")


def _round(run: RunConfig, state: Any, target: Any, folder: Path) -> dict[str, float]:
    """Returns seconds by what they were spent on; the first round compiles."""
    times = {}
    config = dataclasses.replace(run.checkpoint, every=1_000_000)
    with Checkpoints(folder, config) as checkpoints:
        arguments = {"position": 0, "config": run, "data": {}}
        checkpoints.save(1, state, **arguments)  # opens the folder
        times["ask whether a save is due"] = _timed(lambda: checkpoints.save(2, state, **arguments))
        times["checksums"] = _timed(lambda: checksums(state))
        times["save: training waits"] = _timed(lambda: checkpoints.save(3, state, **arguments, now=True))
        times["save: then until it is written"] = _timed(checkpoints.wait)
    read = Checkpoints(folder, CheckpointConfig())
    path = epath.Path(folder / "checkpoints" / "3" / "state")
    alone = ocp.args.StandardRestore(target)
    times["restore: Orbax alone"] = _timed(lambda: ocp.StandardCheckpointHandler().restore(path, args=alone))
    times["restore: verified"] = _timed(lambda: read.restore(3, target))
    return times


def _timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - began


def _random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    rng = np.random.default_rng(0)
    return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)


if __name__ == "__main__":
    main()
