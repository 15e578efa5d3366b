"""Walls between the blocks of a network, for XLA's compiler for CPUs.

That compiler fuses element-wise operations as far as it can, and computes again what several consumers read. The
gradient of a residual stream is a sum with one term a block, which every block below reads: unfenced, each block adds
up the terms of all blocks above it, which is quadratic in the depth (a third of the step of ViT-B/32,
`benchmarks/LOG.md`). A wall is XLA's optimization barrier, which the CPU's compiler also takes away before it fuses, so
a program with walls is compiled with `compiler_options`. No value changes. Other platforms have no walls: their
compilers weigh what they compute again.
"""

import jax
from jax.sharding import Mesh

from clip_jax.array_types import Array, Num


@jax.custom_vjp
def fence_gradient(x: Num[Array, "*any"]) -> Num[Array, "*any"]:
    """Returns the argument. In a program for CPUs its gradient is computed once for all that read it.

    It has no forward-mode derivative.
    """
    return x


def _fence(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.platform_dependent(gradient, cpu=jax.lax.optimization_barrier, default=lambda same: same),)


fence_gradient.defvjp(lambda x: (x, None), _fence)


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns with which of XLA's options a program for a mesh keeps its walls."""
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if mesh.devices.flat[0].platform == "cpu" else {}
