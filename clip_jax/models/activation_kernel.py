"""What an MLP applies between its layers, with a backward pass for NVIDIA's GPUs: one kernel in Pallas.

The kernel reads the argument and the result's gradient, writes the argument's, and sums what it writes for the bias
before it. XLA's compiler makes one kernel of that as well, but of its kind for sums over rows, whose threads read and
write four neighbours two bytes at a time, and take more instructions for an element than its bytes take time
(`benchmarks/LOG.md`). The forward pass is XLA's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from clip_jax.array_types import Array, Float
from clip_jax.models.activations import ACTIVATIONS, FUNCTIONS, PALLAS_CHANNELS
from clip_jax.models.variants import Activation

AT_ONCE = 16  # rows
ROWS = 16 * AT_ONCE  # of a program


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def activate(
    product: Float[Array, "*rows d"], bias: Float[Array, " d"], activation: Activation, interpret: bool = False
) -> Float[Array, "*rows d"]:
    """Returns the activation of product + bias.

    It has no forward-mode derivative. It is not partitioned: rows on several devices are each device's own.

    Args:
      product: of so many channels that PALLAS_CHANNELS divide them.
      bias: float32 or wider; its gradient is summed so.
      activation: one of ACTIVATIONS, but not of what Pallas has no kernels for, which is `gelu`.
      interpret: without a GPU, slowly.
    """
    return _forward(product, bias, activation, interpret)[0]


def _forward(
    product: jax.Array, bias: jax.Array, activation: Activation, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    hidden = product + bias.astype(product.dtype)
    return ACTIVATIONS[activation](hidden), (hidden, bias)


def _backward(
    activation: Activation, interpret: bool, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    hidden, bias = kept
    width = hidden.shape[-1]
    rows = hidden.size // width
    wide, parts = jnp.promote_types(hidden.dtype, jnp.float32), pl.cdiv(rows, ROWS)
    reach = rows + ROWS  # what a mask hides may lie behind the last row
    array = pl.BlockSpec((reach, PALLAS_CHANNELS), lambda channels, part: (0, channels))
    of_hidden, sums = pl.pallas_call(
        functools.partial(_activation_backward, FUNCTIONS[activation], rows),
        grid=(width // PALLAS_CHANNELS, parts),
        in_specs=(array, array),
        out_specs=(array, pl.BlockSpec((None, PALLAS_CHANNELS), lambda channels, part: (part, channels))),
        out_shape=(jax.ShapeDtypeStruct((rows, width), hidden.dtype), jax.ShapeDtypeStruct((parts, width), wide)),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="activation_backward",
    )(hidden.reshape(rows, width), gradient.reshape(rows, width))
    return of_hidden.reshape(hidden.shape), sums.sum(axis=0).astype(bias.dtype)


activate.defvjp(_forward, _backward)


def _activation_backward(
    function: Any, rows: int, hidden_ref: Any, gradient_ref: Any, of_hidden_ref: Any, sums_ref: Any
) -> None:
    """Writes the argument's gradient in some rows and channels, and the sums of these channels."""
    first, wide = (pl.program_id(1) * ROWS).astype(int), sums_ref.dtype

    def pull(number: Any, sums: jax.Array) -> jax.Array:
        start = first + number * AT_ONCE
        at, mask = pl.ds(start, AT_ONCE), (start + jnp.arange(AT_ONCE) < rows)[:, None]
        hidden, gradient = (
            triton.load(ref.at[at, :], mask=mask, other=0).astype(wide) for ref in (hidden_ref, gradient_ref)
        )
        (of_hidden,) = jax.vjp(function, hidden)[1](gradient)
        triton.store(of_hidden_ref.at[at, :], of_hidden.astype(of_hidden_ref.dtype), mask=mask)
        return sums + of_hidden

    sums = jax.lax.fori_loop(0, ROWS // AT_ONCE, pull, jnp.zeros((AT_ONCE, PALLAS_CHANNELS), wide))
    sums_ref[:] = sums.sum(axis=0)
