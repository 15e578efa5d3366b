"""Gradient caching beside the same micro-batch without it: `python -m benchmarks.gradient_cache`.

Memory is XLA's account of the compiled step on one device. Throughput is of steps that take turns: a batch in cached
micro-batches, and a batch of one micro-batch. Four passes stand against three, so the theory is 0.75.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import in_turns
from clip_jax.config import DataConfig, OptimConfig, RunConfig
from clip_jax.models.clip import CLIP
from clip_jax.models.variants import ModelConfig, TextConfig, ViTConfig
from clip_jax.partition import make_mesh
from clip_jax.planning.plan import lower_step
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import create_state
from clip_jax.training.step import make_train_step

RUN = RunConfig(
    model=ModelConfig(
        embed_dim=128,
        vision=ViTConfig(image_size=64, patch=8, width=192, heads=3, layers=4),
        text=TextConfig(width=128, heads=2, layers=4, context=32, vocab_size=1024),
    ),
    data=DataConfig(source="synthetic"),
    optim=OptimConfig(warmup_steps=0),
    batch=1024,
    samples=10_240,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--micro", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cached = dataclasses.replace(RUN, batch=arguments.batch, micro_batch=arguments.micro)
    alone = dataclasses.replace(RUN, batch=arguments.micro)
    for name, run in (("in micro-batches", cached), ("one micro-batch", alone), ("at once", _at_once(cached))):
        analysis: Any = compiled_step(run, devices=1).memory_analysis()
        bytes_ = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
        print(f"{run.batch:6,} pairs {name:18} {bytes_ / 2**20:9,.1f} MiB", flush=True)
    speeds = _pairs_per_second([cached, alone], arguments.rounds)
    share = statistics.median(a / b for a, b in zip(*speeds, strict=True))
    for name, speed in zip(("in micro-batches", "one micro-batch"), speeds, strict=True):
        print(f"{name:18} {statistics.median(speed):9,.1f} pairs/s")
    print(f"share {share:.3f} (theory 0.75)")


def compiled_step(run: RunConfig, *, devices: int) -> jax.stages.Compiled:
    """Returns the compiled train step of a run on some of the devices; no array is made."""
    return lower_step(run, jax.devices()[:devices])[1].compile()


def _at_once(run: RunConfig) -> RunConfig:
    return dataclasses.replace(run, micro_batch=0)


def _pairs_per_second(runs: list[RunConfig], rounds: int) -> list[list[float]]:
    """Times equal numbers of pairs of each run, in turns."""
    most = max(run.batch for run in runs)
    seconds = in_turns({str(i): _steps(run, most // run.batch) for i, run in enumerate(runs)}, rounds)
    return [[most / each for each in found] for found in seconds.values()]


def _steps(run: RunConfig, count: int) -> Any:
    mesh = make_mesh(run.mesh, devices=jax.devices()[:1])
    model, optimizer = CLIP(run.model), make_optimizer(run.optim, steps=run.steps)
    state = create_state(model, optimizer, mesh=mesh, seed=0)
    step = make_train_step(model, optimizer, run, mesh=mesh, state=state)
    rng, size, text = np.random.default_rng(0), run.model.vision.image_size, run.model.text
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (run.batch, size, size, 3), np.uint8)),
        "tokens": jnp.asarray(rng.integers(1, text.vocab_size, (run.batch, text.context), np.int32)),
        "weight": jnp.ones(run.batch),
    }

    def run_steps() -> None:
        nonlocal state
        for _ in range(count):
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    return run_steps


if __name__ == "__main__":
    main()
