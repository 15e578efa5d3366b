"""Dense layers whose kernels' gradients are computed without transposed copies on CPUs too.

The gradient of a kernel is a sum over the tokens of all samples, which are two dimensions or three. XLA's compiler for
CPUs multiplies matrices over one, and makes one of several by a transposed copy, of the gradient of every layer's
result. In a program for CPUs the tokens are therefore laid in one row first, which moves nothing. Other platforms get
what JAX itself would give: on a TPU such a row could be another layout, and a copy. No value changes.
"""

import functools
from typing import Any

import flax.linen as nn
import jax

from clip_jax.array_types import Array, Float


def _multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@jax.custom_vjp
def product(x: Float[Array, "*rows d"], kernel: Float[Array, "d e"]) -> Float[Array, "*rows e"]:
    """Returns x·kernel, in their dtype. It has no forward-mode derivative."""
    return _multiply(x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    of_x = jax.lax.dot_general(gradient, kernel, (((gradient.ndim - 1,), (1,)), ((), ())))
    return of_x, jax.lax.platform_dependent(x, gradient, cpu=_in_one_row, default=_as_they_are)


def _in_one_row(x: jax.Array, gradient: jax.Array) -> jax.Array:
    x, gradient = (each.reshape(-1, each.shape[-1]) for each in (x, gradient))
    return jax.lax.dot_general(x, gradient, (((0,), (0,)), ((), ())))


def _as_they_are(x: jax.Array, gradient: jax.Array) -> jax.Array:
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(gradient, x, ((rows, rows), ((), ()))).T


product.defvjp(lambda x, kernel: (_multiply(x, kernel), (x, kernel)), _backward)


def _dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: None) -> jax.Array:
    return product(x, kernel)  # Flax's layer asks for no other dimensions


Dense = functools.partial(nn.Dense, dot_general=_dot_general)
"""Flax's layer of that name, with `product`."""
