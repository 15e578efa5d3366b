"""The softmax contrastive loss over all pairs of a batch (paper, figure 3).

This is the reference form: one matrix of logits, whose rows are sharded like the batch. A pair's weight says whether
it counts: bad samples and the padding of a last batch have weight 0 and are then also nobody's negative.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from clip_jax.array_types import Array, Float


class LossOutput(NamedTuple):
    """The loss, and how often the right partner has the highest logit in the batch."""

    loss: Float[Array, ""]
    image_accuracy: Float[Array, ""]
    text_accuracy: Float[Array, ""]


def softmax_loss(
    image: Float[Array, "b e"],
    text: Float[Array, "b e"],
    scale: Float[Array, ""],
    weight: Float[Array, " b"],
    *,
    logits_sharding: Sharding | None = None,
) -> LossOutput:
    """Returns the mean of image-to-text and text-to-image cross-entropy.

    With s = scale · image · textᵀ, kept pairs K = {i: weight_i > 0} and w = weight / Σ weight:
    loss = ½ Σᵢ wᵢ [logΣ_{k∈K} exp s_ik + logΣ_{k∈K} exp s_ki - 2 s_ii].

    Args:
      image: unit features of the images; float32 or wider.
      text: unit features of the texts, in the same order and of the same dtype.
      scale: exp(logit_scale).
      weight: per pair, not negative. All zero gives a loss of 0 with zero gradients.
      logits_sharding: how the [b, b] logits lie on the mesh; None leaves it to the compiler.

    Returns:
      Scalars of the features' dtype; `image_accuracy` is over images choosing a text, `text_accuracy` the converse.
    """
    kept = weight > 0
    logits = scale * jnp.matmul(image, text.T, precision=jax.lax.Precision.HIGHEST)
    if logits_sharding is not None:
        logits = jax.lax.with_sharding_constraint(logits, logits_sharding)
    lowest = jnp.finfo(logits.dtype).min
    by_image = jnp.where(kept[None, :], logits, lowest)
    by_text = jnp.where(kept[:, None], logits, lowest)

    positive = jnp.sum(image * text, axis=-1) * scale
    rows = jax.nn.logsumexp(by_image, axis=1) - positive
    columns = jax.nn.logsumexp(by_text, axis=0) - positive
    index = jnp.arange(logits.shape[0])
    return LossOutput(
        loss=0.5 * _weighted_mean(rows + columns, weight),
        image_accuracy=_weighted_mean(jnp.argmax(by_image, axis=1) == index, weight),
        text_accuracy=_weighted_mean(jnp.argmax(by_text, axis=0) == index, weight),
    )


def _weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean over the pairs that count; 0 where none does, whatever `values` holds there."""
    kept = jnp.where(weight > 0, values, 0).astype(jnp.result_type(values, weight))
    total = jnp.sum(weight)
    return jnp.sum(kept * weight) / jnp.where(total > 0, total, 1)
