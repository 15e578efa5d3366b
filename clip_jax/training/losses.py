"""The contrastive losses over all pairs of a batch, as they are defined.

These are the reference forms: one matrix of logits, whose rows are sharded like the batch.
`clip_jax.training.tiled_loss` has the same losses without that matrix. A pair's weight says whether it counts: bad
samples and the padding of a last batch have weight 0 and are then also nobody's negative.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from clip_jax.array_types import Array, Float


class LossOutput(NamedTuple):
    """The loss, and how often the right partner has a higher logit than every other one of the batch.

    A caption that occurs twice is therefore found by neither of its images.
    """

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
    """Returns the mean of image-to-text and text-to-image cross-entropy (paper, figure 3).

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
    logits = _logits(image, text, scale, logits_sharding)
    by_image, by_text = _kept(logits, weight)
    sides = jax.nn.logsumexp(by_image, axis=1) + jax.nn.logsumexp(by_text, axis=0)
    positive = jnp.sum(image * text, axis=-1) * scale
    return _output(0.5 * sides - positive, by_image, by_text, weight)


def sigmoid_loss(
    image: Float[Array, "b e"],
    text: Float[Array, "b e"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    weight: Float[Array, " b"],
    *,
    logits_sharding: Sharding | None = None,
) -> LossOutput:
    """Returns the sum over all pairings of an image's and a text's binary cross-entropy, a pair (Zhai et al., 2023).

    With s = scale · image · textᵀ + bias, K and w as in `softmax_loss`, and z_ik = 1 for i = k, else -1:
    loss = Σ_{i,k∈K} ½ (wᵢ + w_k) log(1 + exp(-z_ik s_ik)).

    Args:
      image: unit features of the images; float32 or wider.
      text: unit features of the texts, in the same order and of the same dtype.
      scale: exp(logit_scale).
      bias: logit_bias.
      weight: per pair, not negative. All zero gives a loss of 0 with zero gradients.
      logits_sharding: how the [b, b] logits lie on the mesh; None leaves it to the compiler.

    Returns:
      As `softmax_loss`.
    """
    logits = _logits(image, text, scale, logits_sharding) + bias
    by_image, by_text = _kept(logits, weight)
    sides = jax.nn.softplus(by_image).sum(axis=1) + jax.nn.softplus(by_text).sum(axis=0)
    positive = jnp.sum(image * text, axis=-1) * scale + bias
    return _output(0.5 * sides - positive, by_image, by_text, weight)


def chance_loss(kind: Literal["softmax", "sigmoid"], batch: int) -> float:
    """Returns the loss of a model that gives every pairing the same logit: for the sigmoid, the best such one."""
    if kind == "softmax" or batch == 1:
        return math.log(batch)
    return math.log(batch) - (batch - 1) * math.log1p(-1 / batch)


def least_loss(kind: Literal["softmax", "sigmoid"], batch: int, *, scale: float, bias: float = 0.0) -> float:
    """Returns the loss where unit features are told apart as well as can be: cosine 1 within pairs, -1 / (batch - 1)
    between them.

    Args:
      kind: of the loss.
      batch: pairs, all of them different.
      scale: exp(logit_scale).
      bias: logit_bias.
    """
    own, rival, rivals = scale, -scale / max(batch - 1, 1), batch - 1
    if kind == "softmax":
        return math.log1p(rivals * math.exp(rival - own))
    return math.log1p(math.exp(-own - bias)) + rivals * math.log1p(math.exp(rival + bias))


def mean_cosine(features: Float[Array, "b e"], weight: Float[Array, " b"]) -> Float[Array, ""]:
    """Returns the mean cosine between the features of different pairs that count.

    Σ_{i≠k} u_i·u_k = ‖Σ u_i‖² - Σ ‖u_i‖²: exact, in O(b·e), without the matrix of cosines.

    Args:
      features: unit rows; float32 or wider.
      weight: per pair; those of weight 0 are left out. Fewer than two others give 0.
    """
    kept = jnp.where(weight[:, None] > 0, features, 0)
    count = jnp.sum(weight > 0).astype(features.dtype)
    return (jnp.square(kept.sum(0)).sum() - jnp.square(kept).sum()) / jnp.maximum(count * (count - 1), 1)


def shares_of(weight: Float[Array, " b"]) -> Float[Array, " b"]:
    """Returns weight / Σ weight; zeros where no pair counts."""
    total = jnp.sum(weight)
    return weight / jnp.where(total > 0, total, 1)


def _logits(image: jax.Array, text: jax.Array, scale: jax.Array, sharding: Sharding | None) -> jax.Array:
    logits = scale * jnp.matmul(image, text.T, precision=jax.lax.Precision.HIGHEST)
    return logits if sharding is None else jax.lax.with_sharding_constraint(logits, sharding)


def _kept(logits: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the logits without the texts, and without the images, of pairs that do not count."""
    kept, lowest = weight > 0, jnp.finfo(logits.dtype).min
    return jnp.where(kept[None, :], logits, lowest), jnp.where(kept[:, None], logits, lowest)


def _output(losses: jax.Array, by_image: jax.Array, by_text: jax.Array, weight: jax.Array) -> LossOutput:
    own = jnp.eye(len(losses), dtype=bool)
    lowest = jnp.finfo(by_image.dtype).min
    found = [
        jnp.diagonal(logits) > jnp.where(own, lowest, logits).max(axis)
        for logits, axis in ((by_image, 1), (by_text, 0))
    ]
    return LossOutput(*(_weighted_mean(values, weight) for values in (losses, *found)))


def _weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean over the pairs that count; 0 where none does, whatever `values` holds there."""
    kept = jnp.where(weight > 0, values, 0).astype(jnp.result_type(values, weight))
    return jnp.sum(kept * shares_of(weight))
