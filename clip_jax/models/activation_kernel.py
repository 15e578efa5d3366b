"""QuickGELU between an MLP's layers on NVIDIA's GPUs: kernels in Pallas for both passes.

The backward pass reads the argument and the result's gradient, writes the argument's, and sums what it writes for the
bias before it. XLA's compiler makes one kernel of that as well, but of its kind for sums over rows, whose threads read
and write four neighbours two bytes at a time. Both of its kernels take about as long to issue their instructions as
their bytes take (`benchmarks/LOG.md`); here a power is of two, which a GPU computes at once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from clip_jax.array_types import Array, Float
from clip_jax.models.activations import PALLAS_CHANNELS
from clip_jax.models.precision import wide_dtype

AT_ONCE = 8  # rows
ROWS = 16 * AT_ONCE  # of a program


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quick_gelu(
    product: Float[Array, "*rows d"], bias: Float[Array, " d"], interpret: bool = False
) -> Float[Array, "*rows d"]:
    """Returns x·sigmoid(1.702x) of x = product + bias, computed in float32 or wider.

    It has no forward-mode derivative. It is not partitioned: rows on several devices are each device's own.

    Args:
      product: of so many channels that PALLAS_CHANNELS divide them.
      bias: float32 or wider; its gradient is summed so.
      interpret: without a GPU, slowly.
    """
    return _forward(product, bias, interpret)[0]


@functools.partial(jax.jit, static_argnums=(2,))  # so that a tower's blocks lower them once
def _forward(product: jax.Array, bias: jax.Array, interpret: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = product + bias.astype(product.dtype)
    return _run(_quick_gelu_forward, x, interpret=interpret)[0], (x, bias)


@functools.partial(jax.jit, static_argnums=(0,))
def _backward(interpret: bool, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, bias = kept
    of_x, sums = _run(_quick_gelu_backward, x, gradient, summed=True, interpret=interpret)
    return of_x, sums.sum(axis=0).astype(bias.dtype)


quick_gelu.defvjp(_forward, _backward)


def _quick_gelu_forward(x: jax.Array) -> jax.Array:
    return x * _gate(x)


def _quick_gelu_backward(x: jax.Array, gradient: jax.Array) -> jax.Array:
    gate = _gate(x)
    return gradient * (gate * (1 + 1.702 * x * (1 - gate)))


def _gate(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp2(-1.702 * math.log2(math.e) * x))


def _run(function: Callable[..., jax.Array], *arrays: jax.Array, interpret: bool, summed: bool = False) -> Any:
    """Returns a function of the arrays' numbers, and if asked for its sums over the rows of each program."""
    shape, width = arrays[0].shape, arrays[0].shape[-1]
    rows, dtype = arrays[0].size // width, arrays[0].dtype
    wide, programs = wide_dtype(dtype), pl.cdiv(rows, ROWS)

    def kernel(*refs: Any) -> None:
        first = (pl.program_id(1) * ROWS).astype(int)
        given, (result_ref, *sums_ref) = refs[: len(arrays)], refs[len(arrays) :]

        def visit(number: Any, sums: tuple) -> tuple:
            start = first + number * AT_ONCE
            at, mask = pl.ds(start, AT_ONCE), (start + jnp.arange(AT_ONCE) < rows)[:, None]
            values = function(*(triton.load(ref.at[at, :], mask=mask, other=0).astype(wide) for ref in given))
            triton.store(result_ref.at[at, :], values.astype(dtype), mask=mask)
            return tuple(each + values for each in sums)

        zeros = (jnp.zeros((AT_ONCE, PALLAS_CHANNELS), wide),) if summed else ()
        for ref, sums in zip(sums_ref, jax.lax.fori_loop(0, ROWS // AT_ONCE, visit, zeros), strict=True):
            ref[:] = sums.sum(axis=0)

    # What a mask hides may lie behind the last row.
    whole = pl.BlockSpec((rows + ROWS, PALLAS_CHANNELS), lambda channels, program: (0, channels))
    of_program = pl.BlockSpec((None, PALLAS_CHANNELS), lambda channels, program: (program, channels))
    result, *sums = pl.pallas_call(
        kernel,
        grid=(width // PALLAS_CHANNELS, programs),
        in_specs=[whole] * len(arrays),
        out_specs=[whole, *[of_program] * summed],
        out_shape=[
            jax.ShapeDtypeStruct((rows, width), dtype),
            *[jax.ShapeDtypeStruct((programs, width), wide)] * summed,
        ],
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name=function.__name__.strip("_"),
    )(*(array.reshape(rows, width) for array in arrays))
    return result.reshape(shape), *sums
