"""What a transformer's MLPs apply between their layers.

Values and slopes are computed in float32 or wider and rounded once; 1.702 itself would be 1.703 in bfloat16. A
derivative is the gradient times the slope, which is computed from the argument alone. In a program for CPUs a wall
(`clip_jax.models.fences`) stands between the passes: without it that platform's compiler takes the sigmoid from the
forward pass, and so keeps it for every block. Other compilers choose for themselves.

On NVIDIA's GPUs a training step can have both from kernels of ours.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Float
from clip_jax.models import gpu_kernels
from clip_jax.models.fences import fence
from clip_jax.models.precision import widen
from clip_jax.models.variants import Activation, MLPKind
from clip_jax.partition import on_each_device

PALLAS_CHANNELS = 128  # that a program takes
Function = Callable[[jax.Array], jax.Array]


def _rounded_once(function: Function) -> Function:
    """Makes an activation of a function of single numbers. It has no forward-mode derivative."""

    def apply(x: jax.Array) -> jax.Array:
        return function(widen(x)).astype(x.dtype)

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


def activate(product: Float[Array, "b l d"], bias: Float[Array, " d"], activation: Activation) -> Float[Array, "b l d"]:
    """Returns the activation of product + bias, by our kernels; call it where `activates_by_kernels`.

    Raises:
      ConfigError: the kernels cannot be used.
    """
    if lacking := _lacking(product.dtype, product.shape[-1], activation):
        raise gpu_kernels.refusal("mlp", "pallas", lacking)
    from clip_jax.models import activation_kernel  # Pallas takes a while to import, and other devices do without

    return on_each_device(activation_kernel.quick_gelu, product, bias)


def _lacking(dtype: DTypeLike, width: int, activation: Activation) -> str:
    """Returns what kernels want and a training step with such an MLP does not have; empty if nothing."""
    if activation != "quick_gelu":
        return f"config.model.activation is {activation}, not quick_gelu"
    if width % PALLAS_CHANNELS:
        return f"the MLP is {width} wide, not a multiple of {PALLAS_CHANNELS}"
    return gpu_kernels.lacking(dtype)


def activates_by_kernels(kind: MLPKind, dtype: DTypeLike, width: int, activation: Activation) -> bool:
    """Whether the activation of such an MLP, of so many channels, is computed by our kernels, which it is in a step."""
    return gpu_kernels.are_used(kind, best=not _lacking(dtype, width, activation))
