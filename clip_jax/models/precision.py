"""The dtype in which sums, statistics, activations and features are computed: float32, or float64 in proofs."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns float32, or a dtype that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """Returns an array in float32, or as it is where it is wider."""
    return x.astype(wide_dtype(x.dtype))
