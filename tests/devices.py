"""Simulated devices, for this process and for those that tests start."""

import os
import subprocess
import sys
from pathlib import Path


def xla_flags(*, devices: int) -> str:
    """Returns what XLA_FLAGS must be for so many CPU devices, with the tests' way of compiling (see conftest)."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    quick = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    if quick:  # a program in one piece: dividing it among compiler threads costs more than tests' programs have to gain
        flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    return flags


def simulating(devices: int) -> dict[str, str]:
    """Returns the environment of a process that sees so many."""
    return os.environ | {"XLA_FLAGS": xla_flags(devices=devices)}


def start_script(code: str, *arguments: object, devices: int) -> subprocess.Popen:
    """Starts Python code in a process that sees so many, in the project's folder; its outputs can be read as text."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        env=simulating(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
