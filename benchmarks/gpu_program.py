"""What a training step's program for H200 GPUs moves and holds, compiled without a GPU.

  python -m benchmarks.gpu_program --config=configs/vit_b32.py:batch=1024 [--config.key=value …] [--devices=4]
      [--compare=key=value]

Bytes that kernels read and write: matrix products, cuDNN's attention and convolutions, ours in Pallas, all else; and
how many kernels only transpose. A kernel inside a loop counts as often as it runs, of a conditional's branches one
counts. Of an array that a fusion cuts, or writes a part of, that part counts; other kernels are taken to read all, also
ours for captions in groups. Nothing is tuned by trial, as on a GPU, so a product may be another kernel there. Needs the
compiler, as docs/plan.md says.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # there is no GPU to start

import jax

from benchmarks.figures import Figure, report
from benchmarks.step import load_runs
from benchmarks.turns import add_compare
from clip_jax.chips import parse_topology
from clip_jax.command_line import one_line_errors, take_overrides
from clip_jax.config import RunConfig
from clip_jax.errors import UserError
from clip_jax.models.variants import variant_name
from clip_jax.planning import gpu_compiler
from clip_jax.planning.hlo import collectives, computations, instructions, result_bytes
from clip_jax.planning.plan import lower_step

KERNELS = ("fusion", "custom-call", "copy", "transpose", "copy-start")
CUTS = ("slice", "dynamic-slice", "gather")
UPDATE = "dynamic-update-slice"  # of a part, in place
LIBRARIES = {"products": "cublas", "cuDNN": "cudnn", "Pallas": "triton"}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)")


class Program(NamedTuple):
    """What a step's program does on one GPU.

    Attributes:
      moved: bytes that kernels read and write, by what they are.
      transposes: kernels that only transpose, as often as they run.
      temporary: bytes held beside the state and the batch.
      sent: bytes to other GPUs.
    """

    moved: Counter[str]
    transposes: int
    temporary: int
    sent: int

    def numbers(self) -> dict[str, tuple[float, str]]:
        """Returns them as (value, unit) by what they are."""
        return {
            **{f"moved by {name}": (size / 1e9, "GB") for name, size in self.moved.items()},
            "kernels that transpose": (self.transposes, ""),
            "held beside the state": (self.temporary / 2**30, "GiB"),
            "sent to other GPUs": (self.sent / 2**20, "MiB"),
        }


def main() -> None:
    with one_line_errors():
        rest, overrides = take_overrides(sys.argv[1:])
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--config", required=True, help="config file, such as configs/vit_b32.py:batch=1024")
        add_compare(parser)
        parser.add_argument("--devices", type=int, default=1)
        arguments = parser.parse_args(rest)
        if not gpu_compiler.is_installed():
            raise UserError(f"the compiler for GPUs is not installed: {gpu_compiler.INSTALL}")
        runs = load_runs(arguments.config, overrides, compare=arguments.compare)
        gpus = gpu_compiler.gpus(parse_topology(f"h200:{arguments.devices}"))
        run = next(iter(runs.values()))
        what = f"{variant_name(run.model)}, {run.batch} pairs on {len(gpus)} x H200, {run.model.dtype}"
        programs = {name: compile_for(each, gpus).numbers() for name, each in runs.items()}
        report(f"Program of a training step, {what}; jax {jax.__version__}", figures(programs))


def compile_for(run: RunConfig, gpus: Sequence[Any]) -> Program:
    """Returns what a run's step moves and holds on each GPU."""
    compiled = lower_step(run, gpus)[1].compile()
    text = str(compiled.as_text())
    memory: Any = compiled.memory_analysis()
    moved, transposes = moved_by(text)
    sent = sum(each.sent for each in collectives(text, devices=len(gpus)))
    return Program(moved, transposes, int(memory.temp_size_in_bytes), sent)


def figures(programs: Mapping[str, Mapping[str, tuple[float, str]]]) -> list[Figure]:
    """Returns the first program's numbers, beside those of each other one if there is any."""
    (_, first), *others = programs.items()
    beside = [(name, numbers) for name, numbers in others] or [("", dict.fromkeys(first, (None, "")))]
    return [Figure(what, *number, name, each[what][0]) for name, each in beside for what, number in first.items()]


def moved_by(text: str) -> tuple[Counter[str], int]:
    """Returns bytes by what reads and writes them, and how many kernels only transpose or copy."""
    bodies = computations(text)
    found = [(each, times) for line, times in instructions(text) if (each := _parse(line))]
    sizes = {each.name: each.bytes for each, _ in found}
    moved, transposes = Counter(dict.fromkeys((*LIBRARIES, "other kernels"), 0)), 0
    for kernel, times in found:
        if kernel.operation not in KERNELS:
            continue
        target = re.search(r'custom_call_target="([^"]*)"', kernel.line)
        by = next((what for what, mark in LIBRARIES.items() if target and mark in target[1]), "other kernels")
        moved[by] += times * _moved(kernel, sizes, bodies)
        transposes += times * (kernel.operation == "transpose" or "transpose" in kernel.name)
    return moved, transposes


class _Instruction(NamedTuple):
    """A line of a program: what it gives, of so many bytes, and does to what."""

    line: str
    name: str
    bytes: int
    operation: str
    arguments: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)


def _parse(line: str) -> _Instruction | None:
    if (match := _INSTRUCTION.match(line)) is None:
        return None
    name, shape, operation, arguments = match.groups()
    return _Instruction(line, name, result_bytes(shape, operation), operation, arguments)


def _moved(kernel: _Instruction, sizes: Mapping[str, int], bodies: Mapping[str, Sequence[str]]) -> int:
    """Returns the bytes that a kernel reads and writes; sizes are those of all results."""
    whole = {name: sizes.get(name, 0) for name in kernel.operands}
    fused = re.search(r"calls=%?([\w.-]+)", kernel.line)
    if fused is None:
        return kernel.bytes + sum(whole.values())
    body = {each.name: each for line in bodies[fused[1]] if (each := _parse(line))}
    read: Counter[str] = Counter()
    for each in body.values():
        if each.operation == "parameter":
            name = kernel.operands[int(each.arguments)]
            read[name] += _read(each, body, whole[name])
    root = next(each for each in body.values() if each.line.lstrip().startswith("ROOT"))
    return _written(root, body) + sum(min(size, read[name]) for name, size in whole.items())


def _read(array: _Instruction, body: Mapping[str, _Instruction], whole: int) -> int:
    """Returns the bytes of an array that a fusion reads."""
    read = 0
    for user in body.values():
        if array.name not in user.operands:
            continue
        if user.operation == "bitcast":
            read += _read(user, body, whole)
        elif array.name in user.operands[1:] or user.operation not in (*CUTS, UPDATE):
            return whole
        elif user.operation in CUTS:
            read += user.bytes
    return read


def _written(result: _Instruction, body: Mapping[str, _Instruction]) -> int:
    """Returns the bytes of a result that a fusion writes."""
    if result.operation == "tuple":
        return sum(_written(body[name], body) for name in result.operands)
    return body[result.operands[1]].bytes if result.operation == UPDATE else result.bytes


if __name__ == "__main__":
    main()
