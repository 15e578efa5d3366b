"""Training steps on this machine's devices, on synthetic pairs: both towers, loss, AdamW, clamp.

  python -m benchmarks.step --config=configs/vit_b32.py:batch=1024 [--config.key=value …] [--compare=key=value]

Pairs a second, operations a second, their share of the peak, memory, compile time. Shares are of the data sheet's
peak, where it is known, and of a large matrix product's speed in the same process; `clip_jax.planning.utilization`
says what is counted. `--compare=model.dead_tokens=compute` measures the same run with that key changed as well, in
turns, and another such option with both. Needs jax, flax, optax, ml_collections and numpy only.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.figures import Figure, report
from benchmarks.turns import add_compare, in_turns
from clip_jax.chips import peak_of
from clip_jax.command_line import load_config, one_line_errors, take_overrides
from clip_jax.config import RunConfig
from clip_jax.data.synthetic import synthetic_batches
from clip_jax.errors import UserError
from clip_jax.models.variants import variant_name
from clip_jax.planning.utilization import StepFlops
from clip_jax.training.program import Program, make_program
from clip_jax.training.state import TrainState
from clip_jax.training.step import place_batch

BATCHES = 4


def main() -> None:
    with one_line_errors():
        rest, overrides = take_overrides(sys.argv[1:])
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--config", required=True, help="config file, such as configs/vit_b32.py:batch=1024")
        add_compare(parser)
        parser.add_argument("--rounds", type=int, default=10, help="turns; the median counts")
        parser.add_argument("--steps", type=int, default=1, help="timed steps in a turn, after one that is not")
        parser.add_argument("--matmul", type=int, help="side of the matrix product (default: 8192; 2048 on CPUs)")
        arguments = parser.parse_args(rest)
        runs = load_runs(arguments.config, overrides, compare=arguments.compare)
        measure(runs, rounds=arguments.rounds, steps=arguments.steps, side=arguments.matmul)


def load_runs(config: str, overrides: list[tuple[str, str]], *, compare: Sequence[str]) -> dict[str, RunConfig]:
    """Returns the run that a command line names, and the same with ever more keys changed, by their names.

    Args:
      config: file.
      overrides: (key, value) of the command line.
      compare: `key=value` of each of these keys.

    Raises:
      UserError: one of `compare` is not of that form, or the configs are not valid.
    """
    runs = {"as configured": load_config(config, overrides, without_data=True)}
    for number, each in enumerate(compare, start=1):
        key, equals, value = each.partition("=")
        if not equals:
            raise UserError(f"--compare={each}: it must be key=value")
        overrides = [*overrides, (key, value)]
        runs[" ".join(compare[:number])] = load_config(config, overrides, without_data=True)
    return runs


def measure(runs: dict[str, RunConfig], *, rounds: int, steps: int, side: int | None) -> None:
    """Prints the figures of each run.

    Args:
      runs: by their names; measured in turns.
      rounds: turns that count, after one that does not.
      steps: timed in a turn, after one that is not.
      side: of the matrix product.
    """
    device = jax.devices()[0]
    product = matmul_speed(device, side)
    kind = f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}"
    print(f"{kind}; a matrix product: {product / 1e12:.3f} TFLOP/s", flush=True)
    steps_of, state = compile_steps(runs)
    train = trainers(steps_of, state)
    calls = {name: functools.partial(each, steps) for name, each in train.items()}
    turns = in_turns(calls, rounds, settle=lambda name: train[name](1))
    seconds = {name: [each / steps for each in found] for name, found in turns.items()}
    peak, figures = peak_of(device.device_kind), list(_summarize(seconds))
    for name, each in steps_of.items():
        print(f"{name}: {each.describe(statistics.median(seconds[name]), product, peak)}")
        figures += each.figures(name, statistics.median(seconds[name]), peak or product)
    what = next(iter(steps_of.values())).what
    report(f"Training step, {what}; {kind}; median of {rounds} turns", figures)
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if used:
        print(f"peak memory of device 0, all runs together: {used / 2**30:.2f} GiB")


def _summarize(seconds: dict[str, list[float]]) -> Iterator[Figure]:
    """Yields the time of a step of the first run, beside each other one if there is any."""
    medians = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
    first, *others = seconds
    if not others:
        yield Figure(first, medians[first], "ms")
    for other in others:
        ratio = statistics.median(b / a for a, b in zip(seconds[first], seconds[other], strict=True))
        yield Figure(first, medians[first], "ms", other, medians[other], ratio)


def compile_steps(runs: Mapping[str, RunConfig]) -> tuple[dict[str, "CompiledStep"], TrainState]:
    """Returns runs' steps, by their names, and the first one's fresh state; all of these compile at the same time."""
    programs = {name: make_program(config) for name, config in runs.items()}
    with ThreadPoolExecutor() as pool:
        state = pool.submit(next(iter(programs.values())).fresh)
        steps = dict(zip(runs, pool.map(CompiledStep, runs.values(), programs.values()), strict=True))
    return steps, state.result()


def trainers(steps: Mapping[str, "CompiledStep"], state: TrainState) -> dict[str, Callable[[int], None]]:
    """Returns functions that take a number of steps, by the runs' names; all of them train that state.

    Raises:
      UserError: the runs' states differ.
    """
    first, *others = steps.values()
    if any(other.target != first.target for other in others):
        raise UserError("--compare: the runs' states differ in shape or layout; measure each by itself")

    def train(step: CompiledStep, count: int) -> None:
        nonlocal state
        state = step.run(state, count)

    return {name: functools.partial(train, step) for name, step in steps.items()}


class CompiledStep:
    """A run's compiled step with some batches on the devices.

    Args:
      config: the run's.
      program: what follows from it.

    Attributes:
      target: shapes, dtypes and shardings of the state.
      what: model, batch, devices and dtype in words.
    """

    def __init__(self, config: RunConfig, program: Program) -> None:
        self._config, self._devices, self.target = config, program.mesh.size, program.target
        name = variant_name(config.model)
        self.what = f"{name}, {config.batch} pairs on {self._devices} device(s), {config.model.dtype}"
        stream = synthetic_batches(
            batch=config.batch,
            image_size=config.model.vision.image_size,
            context=config.model.text.context,
            vocab_size=config.model.text.vocab_size,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self._batches = [place_batch(next(stream), program.mesh) for _ in range(BATCHES)]
        train_step: Any = program.train_step
        began = time.perf_counter()
        self._step = train_step.lower(self.target, self._batches[0]).compile()
        self._compile_seconds = time.perf_counter() - began
        self._done, self._in_groups = 0, []

    def run(self, state: TrainState, steps: int) -> TrainState:
        """Trains for some steps, and waits for them."""
        for _ in range(steps):
            state, metrics = self._step(state, self._batches[self._done % BATCHES])
            self._done += 1
            self._in_groups.append(metrics.get("text_groups"))
        return jax.block_until_ready(state)

    def figures(self, name: str, seconds: float, peak: float) -> list[Figure]:
        """Returns speed and utilisation of a step of that time; the peak is a data sheet's, or a matrix product's."""
        rates = StepFlops.of(self._config, devices=self._devices).rates(seconds, devices=self._devices, peak=peak)
        return [
            Figure(f"{name}: pairs", self._config.batch / seconds, "pairs/s"),
            Figure(
                f"{name}: share of the peak",
                1e2 * rates["mfu"],
                "%",
                "dead tokens left out",
                1e2 * rates["mfu_effective"],
            ),
        ]

    def describe(self, seconds: float, product: float, peak: float) -> str:
        """Returns the figures of a step of that time, beside what a device can do by a matrix product and by its data
        sheet."""
        config, flops = self._config, StepFlops.of(self._config, devices=self._devices)
        rates = flops.rates(seconds, devices=self._devices, peak=product)
        memory: Any = self._step.memory_analysis()
        parts = [
            self.what,
            f"{seconds:.4f} s a step",
            f"{config.batch / seconds:,.1f} pairs/s",
            f"{rates['tflops']:.3f} TFLOP/s a device",
            f"{rates['mfu']:.1%} of the matrix product (effective {rates['mfu_effective']:.1%})",
        ]
        if peak:
            rates = flops.rates(seconds, devices=self._devices, peak=peak)
            parts.append(f"MFU {rates['mfu']:.1%} (effective {rates['mfu_effective']:.1%})")
        if None not in self._in_groups:
            parts.append(f"captions in groups in {float(sum(self._in_groups)) / self._done:.0%} of the steps")
        parts += [
            f"{(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30:.2f} GiB a device",
            f"compiled in {self._compile_seconds:.0f} s",
        ]
        return "; ".join(parts)


def matmul_speed(device: jax.Device, side: int | None) -> float:
    """Returns operations a second of a square matrix product, the best of ten: bfloat16, float32 on CPUs."""
    cpu = device.platform == "cpu"
    side = side or (2048 if cpu else 8192)
    shape, dtype = (2, side, side), jnp.float32 if cpu else jnp.bfloat16
    left, right = jax.random.normal(jax.random.key(0), shape, dtype)  # of equal numbers, a GPU is an eighth faster
    multiply = jax.jit(jnp.matmul)
    multiply(left, right).block_until_ready()
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        multiply(left, right).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


if __name__ == "__main__":
    main()
