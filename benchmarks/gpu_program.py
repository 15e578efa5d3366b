"""What a training step's program for H200 GPUs moves and holds, compiled without a GPU.

  python -m benchmarks.gpu_program --config=configs/vit_b32.py:batch=1024 [--config.key=value …] [--devices=4]
      [--compare=key=value]

Bytes that kernels read and write: matrix products, cuDNN's attention and convolutions, all else; and how many kernels
only transpose. A kernel inside a loop counts as often as it runs, and of a conditional's branches one. Nothing is tuned
by trial, as on a GPU, so a product may be another kernel there. Needs the compiler, which tests do not:
`pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt`, in the version of the JAX that is installed.
"""

import argparse
import os
import re
import sys
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # there is no GPU to start

import jax
from jax.experimental import topologies

from benchmarks.figures import Figure, report
from clip_jax.command_line import load_config, one_line_errors, take_overrides
from clip_jax.config import RunConfig
from clip_jax.errors import UserError
from clip_jax.hlo import collectives, instructions, result_bytes
from clip_jax.models import attention
from clip_jax.models.variants import variant_name
from clip_jax.plan import lower_step

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4814000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "NVIDIA H200"
"""
CUDNN = 91_002  # the version above, as JAX asks for it
KERNELS = ("fusion", "custom-call", "copy", "transpose", "copy-start")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)")


class Program(NamedTuple):
    """What a step's program does on one GPU.

    Attributes:
      moved: bytes that kernels read and write, by what they are.
      transposes: kernels that only transpose or copy so, how often they run.
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
        run = load_config(arguments.config, overrides, without_data=True)
        gpus = gpus_to_compile_for(arguments.devices)
        programs = [compile_for(run, gpus)]
        if arguments.compare:
            key, _, value = arguments.compare.partition("=")
            programs.append(
                compile_for(load_config(arguments.config, [*overrides, (key, value)], without_data=True), gpus)
            )
        title = f"{variant_name(run.model)}, {run.batch} pairs on {len(gpus)} x H200, {run.model.dtype}"
        report(
            f"Program of a training step, {title}; jax {jax.__version__}", figures(programs, arguments.compare or "")
        )


def gpus_to_compile_for(count: int) -> Sequence[Any]:
    """Returns GPUs that are not there.

    Raises:
      UserError: the compiler is not installed.
    """
    try:
        return topologies.get_topology_desc("", "cuda", target_config=H200, topology=f"1x{count}x1").devices
    except NotImplementedError:
        version = jax.__version__
        wanted = f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
        raise UserError(f"the compiler for GPUs is not installed: pip install --no-deps {wanted}") from None


def compile_for(run: RunConfig, gpus: Sequence[Any]) -> Program:
    """Returns what a run's step moves and holds on each GPU."""
    versions = types.SimpleNamespace(cudnn_get_version=lambda: CUDNN)
    with (
        mock.patch("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", versions),
        mock.patch.object(attention, "_capability", return_value=9.0),
    ):
        _, lowered = lower_step(run, gpus)
    compiled = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
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
    moved, transposes = Counter({"products": 0, "cuDNN": 0, "other kernels": 0}), 0
    for match, times in found:
        name, _, operation, operands = match.groups()
        if operation not in KERNELS:
            continue
        size = sizes[name] + sum(sizes.get(each.strip().lstrip("%"), 0) for each in operands.split(","))
        target = re.search(r'custom_call_target="([^"]*)"', match.string)
        by = (
            "products"
            if target and "cublas" in target[1]
            else "cuDNN"
            if target and "cudnn" in target[1]
            else "other kernels"
        )
        moved[by] += times * size
        transposes += times * (operation == "transpose" or "transpose" in name)
    return moved, transposes


if __name__ == "__main__":
    main()
