"""LayerNorm whose backward pass keeps its argument and two numbers a row.

Unlike Linen's defaults, epsilon is 1e-5, the variance is taken in two passes (E[x²]-E[x]² errs by 1e-3 on channels
whose mean is 100, and ViT residual streams have such channels), statistics are float32 or wider, and the result has the
compute dtype.

Where JAX differentiates the layer, a program for CPUs keeps the deviations too, and the gains once for every row, to
multiply before it adds; and every block adds up again what all blocks above it gave to the stream's gradient, which is
quadratic in the depth (`benchmarks/LOG.md`). Here sums with the gains are products of a matrix and a vector in such a
program. On a TPU a product would be of bfloat16 numbers: other platforms add up.

XLA's compiler for GPUs would write the argument's normalised rows times the gradient out in float32, for three sums to
read. In a program for GPUs a wall (`clip_jax.models.fences`) makes the sums over rows compute them again, from what is
there.

A block's norms are each read by one dense layer, which can take up their gains: `clip_jax.models.layers.take_up`.
What is left reads and writes rows alone, and of that XLA's compiler for GPUs makes one kernel a pass.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Float
from clip_jax.models.fences import anew, fence
from clip_jax.models.precision import widen

EPSILON = 1e-5


class LayerNorm(nn.Module):
    """The layer, with Flax's names of its parameters: `scale` and `bias`; its result has `dtype`.

    Where its parameters are None, the layer behind it has taken them up, and it is `standardize`.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        if self.has_variable("params", "scale") and self.get_variable("params", "scale") is None:
            return standardize(x).astype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return normalize(x, jnp.asarray(scale), jnp.asarray(bias), self.dtype)  # they may be NumPy's


@functools.partial(anew, platform="cuda")
def standardize(x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """Returns each row less its mean, over its standard deviation, in float32 or wider; keeps its argument alone.

    It has no forward-mode derivative.
    """
    wide = widen(x)
    deviations = wide - wide.mean(axis=-1, keepdims=True)
    return deviations * jax.lax.rsqrt(jnp.square(deviations).mean(axis=-1, keepdims=True) + EPSILON)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: Float[Array, "*rows d"], scale: Float[Array, " d"], bias: Float[Array, " d"], dtype: DTypeLike
) -> Float[Array, "*rows d"]:
    """Returns each row less its mean, over its standard deviation, times `scale`, plus `bias` (Ba et al., 2016).

    It has no forward-mode derivative.

    Args:
      x: rows.
      scale: gains, float32 or wider.
      bias: as wide as the gains.
      dtype: of the result.
    """
    return _forward(x, scale, bias, dtype)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, tuple]:
    wide = widen(x)
    mean = wide.mean(axis=-1, keepdims=True)
    deviations = wide - mean
    inverse = jax.lax.rsqrt(jnp.square(deviations).mean(axis=-1, keepdims=True) + EPSILON)
    return (deviations * (inverse * scale) + bias).astype(dtype), (x, mean, inverse, scale)


def _backward(dtype: DTypeLike, kept: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = kept
    again = fence((x, gradient), "cuda")
    gradient = gradient.astype(mean.dtype)
    unit = (x - mean) * inverse
    of_gains = gradient * unit
    offset, slope = (
        jax.lax.platform_dependent(numbers, scale, cpu=_by_product, default=_by_sum) / x.shape[-1]
        for numbers in (gradient, of_gains)
    )
    of_x = inverse * (gradient * scale - offset - unit * slope)
    rows = tuple(range(x.ndim - 1))
    of_x = of_x.astype(x.dtype)
    x, gradient = again
    gradient = gradient.astype(mean.dtype)
    return of_x, (gradient * ((x - mean) * inverse)).sum(rows), gradient.sum(rows)


def _by_product(numbers: jax.Array, scale: jax.Array) -> jax.Array:
    return (numbers @ scale)[..., None]


def _by_sum(numbers: jax.Array, scale: jax.Array) -> jax.Array:
    return (numbers * scale).sum(axis=-1, keepdims=True)


normalize.defvjp(_forward, _backward)
