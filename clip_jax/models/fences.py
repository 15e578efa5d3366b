"""Walls in a program, for XLA's compilers for CPUs or GPUs.

These compilers merge what is computed twice, and so keep in memory what had rather be computed again: on CPUs from the
forward pass for the backward pass, on GPUs within a backward pass. A wall is XLA's optimization barrier. The CPU's
compiler takes it away before it fuses, so a program with walls is compiled with `compiler_options`. No value changes.
"""

import functools
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from jax.sharding import Mesh

Platform = Literal["cpu", "cuda"]
T = TypeVar("T")


def fence(values: T, platform: Platform = "cpu") -> T:
    """Returns arrays as they are. In a program for that platform what reads them is not merged with what reads the
    arguments themselves."""
    barrier = {platform: jax.lax.optimization_barrier}
    return jax.lax.platform_dependent(values, **barrier, default=lambda same: same)


def anew(function: Callable[[jax.Array], jax.Array], platform: Platform) -> Callable[[jax.Array], jax.Array]:
    """Returns a function of the same values, which keeps its argument for its derivative.

    In a program for that platform a wall keeps all else apart from the forward pass, so that it is computed again;
    other compilers choose for themselves. It has no forward-mode derivative.
    """
    kept = jax.custom_vjp(function)
    kept.defvjp(lambda x: (function(x), x), lambda x, gradient: jax.vjp(function, fence(x, platform))[1](gradient))
    return functools.wraps(function)(kept)


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns with which of XLA's options a program for a mesh keeps its walls."""
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if mesh.devices.flat[0].platform == "cpu" else {}
