"""The causal text tower (paper, §2.4; openai/CLIP `clip/model.py`, CLIP.encode_text).

There is no padding mask: padding follows EOT, and attention is causal, so no row that is read can see it. For the same
reason nothing that follows EOT need be computed. So captions can be packed: on each device they are ordered by length
and cut into groups of fixed numbers and lengths, the shortest captions into the shortest group. All groups lie in one
row of tokens a device, so that every weight is used once, as without groups, and nothing crosses devices.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.array_types import Array, Bool, Float, Int
from clip_jax.models.dense import add_parameter, dense_of
from clip_jax.models.embedding import Embed
from clip_jax.models.layers import BlockInit, Transformer, pick, record
from clip_jax.models.norm import LayerNorm
from clip_jax.models.text_groups import Groups
from clip_jax.models.variants import ModelConfig
from clip_jax.partition import constrain_rows, devices_of_rows, traced_for

ALIGNMENT = 8  # tokens: XLA's compiler for GPUs would fill up the operands of every product to a multiple, by a copy


class TextTransformer(nn.Module):
    """Token ids to embeddings, read at the first EOT.

    EOT has the largest id of the vocabulary, so its first position is the row's argmax.

    Intermediates: `transformer/block_i/output` for every block, `pooled` (the EOT row after `ln_final`).

    Attributes:
      model: the tower's sizes, the embedding's, and how all of that is computed.
    """

    model: ModelConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], *, groups: Groups = ()) -> Float[Array, "b e"]:
        """Embeds rows of token ids.

        Args:
          tokens: ids.
          groups: of each device's rows, into which they must fit (`fit`), shortest first; none means that every row is
            computed in its whole length.
        """
        config, model = self.model.text, self.model
        width, dtype = config.width, model.dtype
        embedding = Embed(
            config.vocab_size,
            width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=dtype,
            reduce_dtype=model.reduce_dtype,
            name="token_embedding",
        )
        positions = self.param("positions", nn.initializers.normal(0.01), (config.context, width), jnp.float32)
        ends = jnp.argmax(tokens, axis=-1)
        order = None
        if groups:
            tokens, ends = (_by_device(x) for x in (tokens, ends))
            order = jnp.argsort(ends, axis=1)
            tokens, ends = pick(tokens, order), jnp.take_along_axis(ends, order, axis=1)
            x = embedding(_packed(tokens, groups)) + _packed_positions(positions, len(tokens), groups).astype(dtype)
            rows = ends + _starts(groups)
        else:
            x = add_parameter(embedding(tokens), positions[: tokens.shape[1]])
            rows = ends[:, None]
        transformer = nn.remat(Transformer) if model.remat == "full" else Transformer
        x = transformer(config, True, BlockInit.scaled(config), model, groups, name="transformer")(x, rows)
        x = x[:, 0] if order is None else pick(x, jnp.argsort(order, axis=1)).reshape(-1, width)

        pooled = LayerNorm(dtype, name="ln_final")(x)
        record(self, "pooled", pooled)
        dense = dense_of(model, use_bias=False, kernel_init=nn.initializers.normal(width**-0.5))
        return dense(model.embed_dim, name="projection")(pooled)


def fit(tokens: Int[Array, "b l"], groups: Groups) -> Bool[Array, ""]:
    """Returns whether the captions of every device fit into its groups; the same on all devices.

    Args:
      tokens: ids of all devices' rows.
      groups: as `TextTransformer` takes them.
    """
    lengths = _by_device(jnp.argmax(tokens, axis=-1)) + 1
    counts, limits = zip(*groups, strict=True)
    room = [sum(counts[i:]) for i in range(1, len(counts) + 1)]  # in the groups behind each
    longer = (lengths[:, :, None] > jnp.array(limits)).sum(axis=1)
    return jnp.all(longer <= jnp.array(room))


def _by_device(rows: jax.Array) -> jax.Array:
    """[b, …] to [devices, b / devices, …]; slices of the second axis then move nothing between devices."""
    devices = devices_of_rows()
    return constrain_rows(rows.reshape(devices, len(rows) // devices, *rows.shape[1:]))


def _packed(tokens: Int[Array, "p n l"], groups: Groups) -> Int[Array, "p t"]:
    """Returns every device's captions one after the other, each in the length of its group."""
    devices = len(tokens)
    stops = itertools.accumulate(count for count, _ in groups)
    parts = [
        tokens[:, stop - count : stop, :length].reshape(devices, count * length)
        for stop, (count, length) in zip(stops, groups, strict=True)
    ]
    return jnp.concatenate([*parts, jnp.zeros((devices, _filling(groups)), tokens.dtype)], axis=1)


def _packed_positions(positions: Float[Array, "l d"], devices: int, groups: Groups) -> Float[Array, "p t d"]:
    """Returns the positions of `_packed` tokens.

    Copied to the devices first: so the gradient is summed on each device, and once between them, not once a group.
    """
    copies = constrain_rows(jnp.broadcast_to(positions, (devices, *positions.shape)))
    parts = [jnp.tile(copies[:, :length], (1, count, 1)) for count, length in groups]
    behind = jnp.zeros((devices, _filling(groups), positions.shape[1]), positions.dtype)
    return jnp.concatenate([*parts, behind], axis=1)


def _filling(groups: Groups) -> int:
    """Returns how many tokens follow the last caption, which nothing reads, in a program for GPUs."""
    return -sum(count * length for count, length in groups) % ALIGNMENT if traced_for() == "gpu" else 0


def _starts(groups: Groups) -> Int[Array, " n"]:
    """Returns where each caption begins in a device's `_packed` tokens."""
    lengths = [length for count, length in groups for _ in range(count)]
    return jnp.array([0, *itertools.accumulate(lengths[:-1])])
