"""The ResNet image tower (paper, §2.4; openai/CLIP `clip/model.py`, ModifiedResNet).

Unlike torchvision's ResNet it has three convolutions in the stem, average pools instead of strided convolutions, and
attention instead of the last average pool. 1x1 convolutions are written as dense layers: the same sum, with gradients
about three times as fast on CPUs.
"""

import functools
from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.array_types import Array, Bool, Float
from clip_jax.models.attention import attend
from clip_jax.models.batch_norm import BatchNorm
from clip_jax.models.convolution import Conv3x3
from clip_jax.models.dense import Dense, add_parameter, dense_of
from clip_jax.models.fences import fence
from clip_jax.models.layers import apply_blocks, record, symmetric_uniform
from clip_jax.models.variants import ModelConfig, ResNetConfig
from clip_jax.partition import constrain_rows

EXPANSION = 4  # output channels of a bottleneck over its inner channels


class ModifiedResNet(nn.Module):
    """Images to embeddings.

    Variables: `params`, and `batch_stats` (running mean and variance of every BatchNorm), both float32. With `train`,
    `batch_stats` must be mutable: `model.apply(variables, images, train=True, mutable=["batch_stats"])`.

    Intermediates: `stem` [b, s/4, s/4, width] and `stage_i/output` [b, s/2^(i+1), s/2^(i+1), 2^(i+1)·width], i = 1..4.

    Attributes:
      model: the tower's sizes, the embedding's, and how all of that is computed.
    """

    model: ModelConfig

    @nn.compact
    def __call__(
        self, images: Float[Array, "b s s 3"], kept: Bool[Array, " b"] | None = None, *, train: bool = False
    ) -> Float[Array, "b e"]:
        """Embeds images.

        Args:
          images: normalised.
          kept: which images count for BatchNorm's statistics; None means all.
          train: normalise with the batch's statistics and update the running ones.

        Raises:
          UserError: `train`, and `bn_group` does not divide the batch or leaves one value a channel.
        """
        config, model, dtype = cast(ResNetConfig, self.model.vision), self.model, self.model.dtype
        norm = functools.partial(BatchNorm, train=train, group=model.bn_group, dtype=dtype)
        x = images.astype(dtype)
        for i, (features, stride) in enumerate(((config.width // 2, 2), (config.width // 2, 1), (config.width, 1)), 1):
            x = conv_3x3(features, stride=stride, inputs=x.shape[-1], model=model, name=f"stem_conv_{i}")(x)
            x = norm(relu=True, name=f"stem_bn_{i}")(x, kept)
        x = average_pool(x, 2)
        record(self, "stem", x)

        stage = nn.remat(Stage) if model.remat == "full" else Stage
        for i, blocks in enumerate(config.layers):
            width, stride = config.width * 2**i, 1 if i == 0 else 2
            x = stage(blocks, width, stride, norm, model, name=f"stage_{i + 1}")(x, kept)
        return AttentionPool(config.heads, model, name="attention_pool")(x)


class Stage(nn.Module):
    """Bottlenecks of one width, of which the first strides; the intermediate `output` is the last one's."""

    blocks: int
    width: int
    stride: int
    norm: Callable[..., BatchNorm]
    model: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b rows columns c"], kept: Bool[Array, " b"] | None
    ) -> Float[Array, "b rows_out columns_out c_out"]:
        for stride, numbers in ((self.stride, range(1)), (1, range(1, self.blocks))):
            block = functools.partial(Bottleneck, self.width, stride, self.norm, self.model)
            x = apply_blocks(self, block, numbers, x, self.model, kept)
        record(self, "output", x)
        return x


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; a stride is an average pool, before the last convolution.

    The last BatchNorm's scale starts at 0, so that a block starts as its shortcut.
    """

    width: int
    stride: int
    norm: Callable[..., BatchNorm]
    model: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b rows columns c"], kept: Bool[Array, " b"] | None
    ) -> Float[Array, "b rows_out columns_out c_out"]:
        norm, model, width = self.norm, self.model, self.width
        channels, outputs = x.shape[-1], EXPANSION * width
        branch = conv_1x1(width, inputs=channels, model=model, name="conv_1")(x)
        branch = norm(relu=True, name="bn_1")(branch, kept)
        branch = conv_3x3(width, stride=1, inputs=width, model=model, name="conv_2")(branch)
        branch = average_pool(norm(relu=True, name="bn_2")(branch, kept), self.stride)
        branch = conv_1x1(outputs, inputs=width, model=model, name="conv_3")(branch)
        branch = norm(scale_init=nn.initializers.zeros, name="bn_3")(branch, kept)
        if self.stride > 1 or channels != outputs:
            x = average_pool(x, self.stride)
            x = norm(name="shortcut_bn")(conv_1x1(outputs, inputs=channels, model=model, name="shortcut_conv")(x), kept)
        return constrain_rows(relu(x + branch))


class AttentionPool(nn.Module):
    """Multi-head attention whose only query is the mean of the feature map.

    Keys and values are the mean and the map's positions in row-major order, with learnt positions added to all. The
    output projection goes to the embedding.
    """

    heads: int
    model: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns d"]) -> Float[Array, "b e"]:
        batch, rows, columns, width = x.shape
        normal, uniform = nn.initializers.normal(width**-0.5), symmetric_uniform(width**-0.5)
        dense = dense_of(self.model, kernel_init=normal, bias_init=uniform)
        tokens = x.reshape(batch, rows * columns, width)
        tokens = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
        tokens = add_parameter(tokens, self.param("positions", normal, (tokens.shape[1], width), jnp.float32))
        query, key, value = (
            dense(width, name=name)(of).reshape(batch, -1, self.heads, width // self.heads)
            for name, of in (("query", tokens[:, :1]), ("key", tokens), ("value", tokens))
        )
        pooled = attend(query, key, value, causal=False).reshape(batch, width)
        return dense(self.model.embed_dim, name="out")(pooled)


def conv_3x3(features: int, *, stride: int, inputs: int, model: ModelConfig, name: str) -> Conv3x3:
    """Returns a 3x3 convolution with torch's default initialisation."""
    init = symmetric_uniform((9 * inputs) ** -0.5)
    return Conv3x3(features, stride, model.dtype, model.reduce_dtype, kernel_init=init, name=name)


def conv_1x1(features: int, *, inputs: int, model: ModelConfig, name: str) -> Dense:
    """Returns a 1x1 convolution without bias, as a dense layer, with torch's default initialisation."""
    return dense_of(model, use_bias=False, kernel_init=symmetric_uniform(inputs**-0.5))(features, name=name)


@jax.custom_vjp
def relu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns max(x, 0); its derivative reads the result, which the next layer keeps anyway, not the argument.

    It has no forward-mode derivative.
    """
    return jnp.maximum(x, 0)


def _relu_backward(result: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    result, gradient = fence((result, gradient), "cuda")
    return (jnp.where(result > 0, gradient, 0),)


relu.defvjp(lambda x: (relu(x),) * 2, _relu_backward)


def average_pool(
    x: Float[Array, "b rows columns c"], stride: int
) -> Float[Array, "b rows//{stride} columns//{stride} c"]:
    """Averages squares of `stride` x `stride` pixels; sides are multiples of `stride`."""
    if stride == 1:
        return x
    batch, rows, columns, channels = x.shape
    return x.reshape(batch, rows // stride, stride, columns // stride, stride, channels).mean(axis=(2, 4))
