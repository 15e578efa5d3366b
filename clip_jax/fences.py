"""Walls in a program, for XLA's compiler for CPUs.

That compiler merges what is computed twice, and so keeps from the forward pass what the backward pass would rather
compute again. A wall is XLA's optimization barrier, which the CPU's compiler also takes away before it fuses, so a
program with walls is compiled with `compiler_options`. No value changes. Other platforms have no walls: their compilers
weigh what they keep.
"""

import jax
from jax.sharding import Mesh

from clip_jax.array_types import Array, Num


def fence(x: Num[Array, "*any"]) -> Num[Array, "*any"]:
    """Returns the argument. In a program for CPUs what reads it is not merged with what reads the argument itself."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda same: same)


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns with which of XLA's options a program for a mesh keeps its walls."""
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if mesh.devices.flat[0].platform == "cpu" else {}
