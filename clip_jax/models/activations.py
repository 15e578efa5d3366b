"""What a transformer's MLPs apply between their layers.

Values and slopes are computed in float32 or wider and rounded once; 1.702 itself would be 1.703 in bfloat16. A
derivative is the gradient times the slope, which is computed from the argument alone. In a program for CPUs a wall
(`clip_jax.fences`) stands between the passes: without it that platform's compiler takes the sigmoid from the forward
pass, and so keeps it for every block. Other compilers choose for themselves.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from clip_jax.array_types import Array, Float
from clip_jax.fences import fence

Activation = Callable[[jax.Array], jax.Array]


def _rounded_once(function: Activation) -> Activation:
    """Makes an activation of a function of single numbers. It has no forward-mode derivative."""

    def apply(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)

    def pull(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
        (slope,) = jax.vjp(apply, fence(x))[1](jnp.ones_like(x))
        return (gradient * slope,)

    activation = jax.custom_vjp(apply)
    activation.defvjp(lambda x: (apply(x), x), pull)
    return functools.wraps(function)(activation)


@_rounded_once
def quick_gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns x·sigmoid(1.702x), CLIP's activation (openai/CLIP `clip/model.py`, QuickGELU)."""
    return x * jax.nn.sigmoid(1.702 * x)


@_rounded_once
def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns x·Φ(x), the exact GELU, as the models have that open_clip trained (Hendrycks & Gimpel, 2016)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
