"""Dense layers whose kernels' gradients are computed without transposed copies on CPUs too, and whose biases' gradients
are added up in float32, as those of positions and class tokens.

The gradient of a kernel is a sum over the tokens of all samples, which are two dimensions or three. XLA's compiler for
CPUs multiplies matrices over one, and makes one of several by a transposed copy, of the gradient of every layer's
result. In a program for CPUs the tokens are therefore laid in one row first, which moves nothing. Other platforms get
what JAX itself would give: on a TPU such a row could be another layout, and a copy. No value changes.

The gradient of what is added to all rows is such a sum too, and JAX would add up in the dtype of the result: over 800
rows of bfloat16 it can be wrong by 3 % (`tests/test_dense.py`).

Where the rows lie on several devices, each has a part of a kernel's gradient, in the dtype of the product, and the
partitioner adds them up in that; with `reduce_dtype="float32"` they are widened before.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Float
from clip_jax.models.precision import wide_dtype
from clip_jax.models.variants import ModelConfig, ReduceDtype
from clip_jax.partition import sum_over_rows


def _multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x: Float[Array, "*rows d"], kernel: Float[Array, "d e"], reduce_dtype: ReduceDtype = "same"
) -> Float[Array, "*rows e"]:
    """Returns x·kernel, in the dtype of x. It has no forward-mode derivative.

    Args:
      x: rows.
      kernel: of any float dtype, which its gradient has too.
      reduce_dtype: in which devices add up that gradient, see `ModelConfig`.
    """
    return _forward(x, kernel, reduce_dtype)[0]


def _forward(x: jax.Array, kernel: jax.Array, _: ReduceDtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(x, kernel.astype(x.dtype)), (x, kernel)


def _backward(
    reduce_dtype: ReduceDtype, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    of_x = jax.lax.dot_general(gradient, kernel.astype(x.dtype), (((gradient.ndim - 1,), (1,)), ((), ())))
    return of_x, kernel_gradient(_of_kernel, x, gradient, reduce_dtype).astype(kernel.dtype)


def kernel_gradient(
    function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, gradient: jax.Array, reduce_dtype: ReduceDtype
) -> jax.Array:
    """Returns a kernel's gradient, which is `function(x, gradient)` of any rows, added up as `reduce_dtype` says."""
    if reduce_dtype == "same":
        return function(x, gradient)
    return sum_over_rows(function, x, gradient, dtype=wide_dtype(x.dtype))


def _of_kernel(x: jax.Array, gradient: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, gradient, cpu=_in_one_row, default=_as_they_are)


def _in_one_row(x: jax.Array, gradient: jax.Array) -> jax.Array:
    x, gradient = (each.reshape(-1, each.shape[-1]) for each in (x, gradient))
    return jax.lax.dot_general(x, gradient, (((0,), (0,)), ((), ())))


def _as_they_are(x: jax.Array, gradient: jax.Array) -> jax.Array:
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(gradient, x, ((rows, rows), ((), ()))).T


product.defvjp(_forward, _backward)


def add_parameter(
    x: Float[Array, "*rows e"], parameter: Float[Array | np.ndarray, "*some f"]
) -> Float[Array, "*rows e"]:
    """Returns x + parameter in the dtype of x: a bias, or what else is the same for all rows of the first axes.

    Its gradient is summed over them in float32 or wider. JAX itself would sum it in the dtype of x. It has no
    forward-mode derivative.

    Args:
      x: rows.
      parameter: of the last axes of x; where its own last one is shorter, of the first channels.
    """
    return _add(x, jnp.asarray(parameter, wide_dtype(x.dtype)))


@jax.custom_vjp
def _add(x: jax.Array, parameter: jax.Array) -> jax.Array:
    missing = x.shape[-1] - parameter.shape[-1]
    return x + jnp.pad(parameter.astype(x.dtype), [(0, 0)] * (parameter.ndim - 1) + [(0, missing)])


def _sum(parameter: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    first_axes = range(gradient.ndim - parameter.ndim)
    return gradient, gradient[..., : parameter.shape[-1]].sum(first_axes, dtype=parameter.dtype)


_add.defvjp(lambda x, parameter: (_add(x, parameter), parameter), _sum)


def dense_of(model: ModelConfig, **options: Any) -> functools.partial["Dense"]:
    """Returns `Dense` as a model computes it, which lacks its features and its name."""
    return functools.partial(Dense, dtype=model.dtype, reduce_dtype=model.reduce_dtype, **options)


class Dense(nn.Module):
    """Flax's layer of that name, with `product` and `add_parameter`.

    Attributes:
      features: width of the result.
      use_bias: add a bias.
      dtype: of the product and the result.
      reduce_dtype: in which devices add up the gradient of the kernel, see `ModelConfig`.
      param_dtype: of the weights.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    reduce_dtype: ReduceDtype = "same"
    param_dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows e"]:
        result, *bias = self.summands(x)
        return add_parameter(result, *bias) if bias else result

    @nn.compact
    def summands(self, x: Float[Array, "*rows d"]) -> list[jax.Array]:
        """Returns the product [*rows, e], and the bias [e] if there is one, for what adds them by itself."""
        kernel = self._weight("kernel", self.kernel_init, (x.shape[-1], self.features))
        result = product(x.astype(self.dtype), kernel, self.reduce_dtype)
        return [result, self._weight("bias", self.bias_init, (self.features,))] if self.use_bias else [result]

    def _weight(self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(self.param(name, init, shape, self.param_dtype))  # it may be NumPy's
