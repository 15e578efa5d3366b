"""The causal text tower (paper, §2.4; openai/CLIP `clip/model.py`, CLIP.encode_text).

There is no padding mask: padding follows EOT, and attention is causal, so no row that is read can see it.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Float, Int
from clip_jax.models.layers import BlockInit, Transformer, layer_norm, record
from clip_jax.models.variants import Activation, Remat, TextConfig


class TextTransformer(nn.Module):
    """Token ids to embeddings, read at the first EOT.

    EOT has the largest id of the vocabulary, so its first position is the row's argmax.

    Intermediates: `transformer/block_i/output` for every block, `pooled` (the EOT row after `ln_final`).
    """

    config: TextConfig
    embed_dim: int
    dtype: DTypeLike
    activation: Activation = "quick_gelu"
    remat: Remat = "none"
    scan: bool = False

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
        config, dtype = self.config, self.dtype
        width = config.width
        embedding = nn.Embed(
            config.vocab_size,
            width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=dtype,
            name="token_embedding",
        )
        positions = self.param("positions", nn.initializers.normal(0.01), (config.context, width))
        x = embedding(tokens) + positions[: tokens.shape[1]].astype(dtype)
        blocks = BlockInit.scaled(width, config.layers)
        transformer = nn.remat(Transformer) if self.remat == "full" else Transformer
        x = transformer(
            config.layers,
            config.heads,
            True,
            self.activation,
            blocks,
            dtype,
            self.remat,
            self.scan,
            name="transformer",
        )(x)

        end = jnp.argmax(tokens, axis=-1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        pooled = layer_norm(dtype, name="ln_final")(x)
        record(self, "pooled", pooled)
        return nn.Dense(
            self.embed_dim,
            use_bias=False,
            kernel_init=nn.initializers.normal(width**-0.5),
            dtype=dtype,
            name="projection",
        )(pooled)
