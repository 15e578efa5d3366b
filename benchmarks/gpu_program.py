"""What a training step's program for H200 GPUs moves and holds, compiled without a GPU.

  python -m benchmarks.gpu_program --config=configs/vit_b32.py:batch=1024 [--config.key=value …] [--devices=4]
      [--compare=key=value]

Bytes that kernels read and write: matrix products, cuDNN's attention and convolutions, ours in Pallas, all else; and
how many kernels only transpose. A kernel inside a loop counts as often as it runs, of a conditional's branches one
counts, and an array is counted whole also where a kernel reads a part, as those for captions in groups do. Nothing is
tuned by trial, as on a GPU, so a product may be another kernel there. Needs the compiler, as docs/plan.md says.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # there is no GPU to start

import jax

from benchmarks.figures import Figure, report
from benchmarks.step import load_runs
from clip_jax import gpu_compiler
from clip_jax.chips import parse_topology
from clip_jax.command_line import one_line_errors, take_overrides
from clip_jax.config import RunConfig
from clip_jax.errors import UserError
from clip_jax.hlo import collectives, instructions, result_bytes
from clip_jax.models.variants import variant_name
from clip_jax.plan import lower_step

KERNELS = ("fusion", "custom-call", "copy", "transpose", "copy-start")
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
        parser.add_argument("--compare", metavar="KEY=VALUE", help="also with this key changed")
        parser.add_argument("--devices", type=int, default=1)
        arguments = parser.parse_args(rest)
        if not gpu_compiler.is_installed():
            raise UserError(f"the compiler for GPUs is not installed: {gpu_compiler.INSTALL}")
        runs = load_runs(arguments.config, overrides, compare=arguments.compare)
        gpus = gpu_compiler.gpus(parse_topology(f"h200:{arguments.devices}"))
        run = next(iter(runs.values()))
        what = f"{variant_name(run.model)}, {run.batch} pairs on {len(gpus)} x H200, {run.model.dtype}"
        programs = [compile_for(each, gpus) for each in runs.values()]
        report(f"Program of a training step, {what}; jax {jax.__version__}", figures(programs, arguments.compare or ""))


def compile_for(run: RunConfig, gpus: Sequence[Any]) -> Program:
    """Returns what a run's step moves and holds on each GPU."""
    compiled = lower_step(run, gpus)[1].compile(compiler_options=gpu_compiler.COMPILER_OPTIONS)
    text = str(compiled.as_text())
    memory: Any = compiled.memory_analysis()
    moved, transposes = moved_by(text)
    sent = sum(each.sent for each in collectives(text, devices=len(gpus)))
    return Program(moved, transposes, int(memory.temp_size_in_bytes), sent)


def figures(programs: Sequence[Program], compared: str) -> list[Figure]:
    """Returns a program's numbers, beside those of a second one if there is one."""
    first, *others = (program.numbers() for program in programs)
    counterparts = others[0] if others else dict.fromkeys(first, (None, ""))
    return [Figure(what, *number, compared, counterparts[what][0]) for what, number in first.items()]


def moved_by(text: str) -> tuple[Counter[str], int]:
    """Returns bytes by what reads and writes them, and how many kernels only transpose or copy."""
    found = [(match, times) for line, times in instructions(text) if (match := _INSTRUCTION.match(line))]
    sizes = {match[1]: result_bytes(match[2], match[3]) for match, _ in found}
    moved, transposes = Counter(dict.fromkeys((*LIBRARIES, "other kernels"), 0)), 0
    for match, times in found:
        name, _, operation, operands = match.groups()
        if operation not in KERNELS:
            continue
        read = set(re.findall(r"%([\w.-]+)", operands))  # what occurs more than once is read in parts
        target = re.search(r'custom_call_target="([^"]*)"', match.string)
        by = next((what for what, mark in LIBRARIES.items() if target and mark in target[1]), "other kernels")
        moved[by] += times * (sizes[name] + sum(sizes.get(each, 0) for each in read))
        transposes += times * (operation == "transpose" or "transpose" in name)
    return moved, transposes


if __name__ == "__main__":
    main()
