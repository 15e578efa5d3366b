"""Simulated devices, for this process and for those that tests start, and what these print."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any


def xla_flags(*, devices: int) -> str:
    """Returns what XLA_FLAGS must be for so many CPU devices, with the tests' way of compiling (see conftest)."""
    quick = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    return f"--xla_force_host_platform_device_count={devices} {quick_flags() if quick else ''}".strip()


def quick_flags() -> str:
    """Returns with which of XLA's flags a program for CPUs compiles quickly, besides those that JAX has a setting for.

    In one piece: dividing it among compiler threads costs more than a small program has to gain. And by the older
    emitters, which only JAX 0.10 still has; XLA ends a process for a flag that it does not know.
    """
    older = " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
    return f"--xla_cpu_parallel_codegen_split_count=1{older}"


def simulating(devices: int) -> dict[str, str]:
    """Returns the environment of a process that sees so many."""
    return os.environ | {"XLA_FLAGS": xla_flags(devices=devices)}


def tracing_for(kind: str) -> AbstractContextManager:
    """Within it, programs are traced and lowered as for GPUs of a kind that JAX names so."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh  # after conftest, which needs this module

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


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


def outputs(processes: Sequence[subprocess.Popen], *, timeout: float = 60) -> list[tuple[Any, Any]]:
    """Returns what processes print, when all have ended: (stdout, stderr) of each.

    All are read at once: a process whose pipe is full waits, and its peers wait for it.

    Raises:
      TimeoutExpired: one has not ended; all are killed.
    """
    with ThreadPoolExecutor(len(processes)) as pool:
        reading = [pool.submit(process.communicate, timeout=timeout) for process in processes]
        try:
            return [each.result() for each in reading]
        finally:
            for process in processes:
                process.kill()  # nothing where it has ended
