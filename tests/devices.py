"""Simulated devices, for this process and for those that tests start."""

import os


def xla_flags(*, devices: int) -> str:
    """Returns what XLA_FLAGS must be for so many CPU devices, with the tests' way of compiling (see conftest)."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    quick = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    return f"{flags} --xla_cpu_use_fusion_emitters=false" if quick else flags


def simulating(devices: int) -> dict[str, str]:
    """Returns the environment of a process that sees so many."""
    return os.environ | {"XLA_FLAGS": xla_flags(devices=devices)}
