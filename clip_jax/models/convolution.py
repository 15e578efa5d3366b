"""A 3x3 convolution whose kernel's gradient devices can add up in float32, as that of a dense layer.

It is Flax's, but for that: `nn.Conv` narrows its kernel before anything can be said of the gradient.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Float
from clip_jax.models.dense import kernel_gradient
from clip_jax.models.layers import Initializer
from clip_jax.models.variants import ReduceDtype

PADDING = ((1, 1), (1, 1))  # on every side: "SAME" would pad a stride of 2 at the end only
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class Conv3x3(nn.Module):
    """Flax's `nn.Conv` of that size, padded by one pixel on every side, without bias.

    Attributes:
      features: channels of the result.
      stride: of rows and columns.
      dtype: of the result.
      reduce_dtype: in which devices add up the gradient of the kernel, see `ModelConfig`.
      kernel_init: initializer of the kernel, float32 [3, 3, c, features].
    """

    features: int
    stride: int
    dtype: DTypeLike
    reduce_dtype: ReduceDtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns c"]) -> Float[Array, "b rows_out columns_out features"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32)
        return convolve(x.astype(self.dtype), jnp.asarray(kernel), self.stride, self.reduce_dtype)  # it may be NumPy's


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x: Float[Array, "b rows columns c"], kernel: Float[Array, "3 3 c f"], stride: int, reduce_dtype: ReduceDtype
) -> Float[Array, "b rows_out columns_out f"]:
    """Returns a convolution in the dtype of x. It has no forward-mode derivative.

    Args:
      x: images.
      kernel: of any float dtype, which its gradient has too.
      stride: of rows and columns.
      reduce_dtype: in which devices add up that gradient, see `ModelConfig`.
    """
    return _forward(x, kernel, stride, reduce_dtype)[0]


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), PADDING, dimension_numbers=DIMENSIONS)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, _: ReduceDtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel.astype(x.dtype), stride), (x, kernel)


def _backward(
    stride: int, reduce_dtype: ReduceDtype, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    narrow = kernel.astype(x.dtype)

    def of_kernel(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: _convolve(x, kernel, stride), narrow)(gradient)[0]

    (of_x,) = jax.linear_transpose(lambda x: _convolve(x, narrow, stride), x)(gradient)
    return of_x, kernel_gradient(of_kernel, x, gradient, reduce_dtype).astype(kernel.dtype)


convolve.defvjp(_forward, _backward)
