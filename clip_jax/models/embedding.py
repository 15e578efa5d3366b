"""A table of embeddings whose gradient is summed in float32 or wider.

Where activations are bfloat16, JAX adds up the gradients of a row in bfloat16, one after the other: 4,096 ones give
256. What a batch of thousands gives to the row of a common token would so be lost; and on a GPU, where such additions
are atomic, they took 16 of the 109 ms of a step (`benchmarks/LOG.md`). In a program for TPUs the sum stays bfloat16,
unless `reduce_dtype` says otherwise: there it is also what chips exchange, and what their compiler makes of it within a
chip the program does not show.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Float, Int
from clip_jax.models.layers import Initializer
from clip_jax.models.variants import ReduceDtype


class Embed(nn.Module):
    """Flax's layer of that name, with `look_up`; its result has `dtype`. See `ModelConfig` for `reduce_dtype`."""

    num_embeddings: int
    features: int
    embedding_init: Initializer
    dtype: DTypeLike
    reduce_dtype: ReduceDtype = "same"

    @nn.compact
    def __call__(self, rows: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
        """Returns the rows of the table that `rows` name."""
        table = self.param("embedding", self.embedding_init, (self.num_embeddings, self.features), jnp.float32)
        return look_up(jnp.asarray(table), rows, self.dtype, self.reduce_dtype)  # it may be NumPy's


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(
    table: Float[Array, "n d"], rows: Int[Array, "*rows"], dtype: DTypeLike, reduce_dtype: ReduceDtype
) -> Float[Array, "*rows d"]:
    """Returns rows of a table, in that dtype. It has no forward-mode derivative."""
    return jnp.take(table.astype(dtype), rows, axis=0)


def _forward(
    table: jax.Array, rows: jax.Array, dtype: DTypeLike, reduce_dtype: ReduceDtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return look_up(table, rows, dtype, reduce_dtype), (table, rows)


def _backward(
    dtype: DTypeLike, reduce_dtype: ReduceDtype, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    table, rows = kept

    def summed(in_dtype: DTypeLike, rows: jax.Array, gradient: jax.Array) -> jax.Array:
        pull = jax.linear_transpose(lambda table: jnp.take(table.astype(in_dtype), rows, axis=0), table)
        return pull(gradient.astype(in_dtype))[0]

    wide, narrow = (functools.partial(summed, each) for each in (jnp.promote_types(table.dtype, dtype), dtype))
    if reduce_dtype != "same":
        return wide(rows, gradient), None
    return jax.lax.platform_dependent(rows, gradient, tpu=narrow, default=wide), None


look_up.defvjp(_forward, _backward)
