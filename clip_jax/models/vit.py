"""The Vision Transformer image tower (paper, §2.4; openai/CLIP `clip/model.py`, VisionTransformer).

The patch convolution has stride = kernel, so it is written as a reshape and a dense layer, which is the same sum
and much faster on CPUs.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.array_types import Array, Float
from clip_jax.models.dense import add_parameter, dense_of
from clip_jax.models.layers import BlockInit, Transformer, record, symmetric_uniform
from clip_jax.models.norm import LayerNorm
from clip_jax.models.variants import ModelConfig, ViTConfig


class VisionTransformer(nn.Module):
    """Images to embeddings.

    Intermediates: `patches`, `transformer/block_i/output` for every block, `pooled` (the class token after
    `ln_post`, the features that linear probes use).

    Attributes:
      model: the tower's sizes, the embedding's, and how all of that is computed.
    """

    model: ModelConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b s s 3"], *, keys: jax.Array | None = None) -> Float[Array, "b e"]:
        """Embeds normalised images; with `keys`, one for each, patches are dropped as `patch_dropout` says."""
        config, model = cast(ViTConfig, self.model.vision), self.model
        width, dtype = config.width, model.dtype
        normal = nn.initializers.normal(width**-0.5)
        patches = patchify(images.astype(dtype), patch=config.patch)
        dense = dense_of(model, use_bias=False)
        x = dense(width, kernel_init=symmetric_uniform(patches.shape[-1] ** -0.5), name="patch_embedding")(patches)
        record(self, "patches", x)

        class_token = self.param("class_token", normal, (width,), jnp.float32)
        positions = self.param("positions", normal, (config.tokens, width), jnp.float32)
        class_tokens = add_parameter(jnp.zeros((x.shape[0], 1, width), dtype), class_token)
        x = add_parameter(jnp.concatenate([class_tokens, x], axis=1), positions)
        if model.patch_dropout and keys is not None:
            x = jnp.concatenate([x[:, :1], drop_patches(x[:, 1:], keys, share=model.patch_dropout)], axis=1)
        x = LayerNorm(dtype, name="ln_pre")(x)

        blocks = BlockInit.scaled(config) if model.init == "scaled" else BlockInit.torch_default(config)
        transformer = nn.remat(Transformer) if model.remat == "full" else Transformer
        first = jnp.zeros((x.shape[0], 1), jnp.int32)
        x = transformer(config, False, blocks, model, name="transformer")(x, first)
        pooled = LayerNorm(dtype, name="ln_post")(x[:, 0])
        record(self, "pooled", pooled)
        return dense(model.embed_dim, kernel_init=normal, name="projection")(pooled)


def drop_patches(patches: Float[Array, "b l d"], keys: jax.Array, *, share: float) -> Float[Array, "b kept d"]:
    """Returns a random subset of each image's patches, in their order; at least one (Li et al., 2023, §3).

    Args:
      patches: with their positions added.
      keys: a random key for each image [b], so that an image's subset does not depend on its batch.
      share: of patches to leave out; their number is rounded up.
    """
    count = patches.shape[1]
    kept = max(1, int(count * (1 - share)))
    noise = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    chosen = jnp.sort(jnp.argsort(noise, axis=1)[:, :kept], axis=1)
    return jnp.take_along_axis(patches, chosen[:, :, None], axis=1)


def patchify(images: Float[Array, "b s s c"], *, patch: int) -> Float[Array, "b l patch_pixels"]:
    """Cuts images into square patches: patches in row-major order, pixels within a patch as (row, column, channel)."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    grid = images.reshape(batch, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, rows * columns, patch * patch * channels)
