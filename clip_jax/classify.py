"""Zero-shot classification of pictures with labels that a person writes (paper, §3.1)."""

from collections.abc import Sequence

import numpy as np

from clip_jax.data.images import Images
from clip_jax.errors import UserError
from clip_jax.evals.prompts import checked
from clip_jax.evals.zero_shot import class_weights
from clip_jax.pretrained import Pretrained

AS_WRITTEN = ("{}",)
"""Templates of labels that are whole prompts already."""


def label_weights(model: Pretrained, labels: Sequence[str], templates: Sequence[str] = AS_WRITTEN) -> np.ndarray:
    """Returns the labels' classifier, float [c, e] of unit length.

    Args:
      model: its text tower.
      labels: c texts.
      templates: prompts with `{}` for the label; a label's weight is the mean over them.

    Raises:
      UserError: no labels, a blank one, one twice, or a text that is not in a list; a template without its `{}`.
    """
    if isinstance(labels, str):
        raise UserError(f"the labels are one text, {labels!r}; give a list of texts")
    if not labels or not all(label.strip() for label in labels):
        raise UserError("there is no label, or a blank one; write texts such as 'a cat' 'a dog'")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"the label {twice!r} is there twice")
    return classifier(model, labels, templates)


def classifier(model: Pretrained, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Returns the zero-shot classifier of classes, float [c, e] of unit length; see `label_weights`.

    Args:
      model: its text tower, by which a few prompts are embedded at a time.
      names: of c classes; two may have the same, as of ImageNet's.
      templates: prompts with `{}` for the name.

    Raises:
      UserError: a template without its `{}`.
    """
    return class_weights(model.embed_texts, names, checked(tuple(templates), "templates"))


def probabilities(model: Pretrained, features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns float [n, c]: a softmax over the labels, or, of a model trained with the sigmoid loss, each label's own.

    Args:
      model: for temperature and bias.
      features: of images, unit length, [n, e].
      weights: as `label_weights` gives them.
    """
    logits = float(model.scale) * features @ weights.T
    if model.config.logit_bias:
        return 1 / (1 + np.exp(-(logits + float(model.params["logit_bias"]))))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def classify_images(
    model: Pretrained, images: Images, labels: Sequence[str], *, templates: Sequence[str] = AS_WRITTEN
) -> np.ndarray:
    """Returns the probability of every label for every image, float [n, c].

    Args:
      model: both of its towers.
      images: as `model.preprocess` takes them; a single one is a list of one. A few are decoded at a time.
      labels: as for `label_weights`.
      templates: the same.

    Raises:
      UserError: what is no image, or labels that cannot be told apart.

    Example:
      >>> classify_images(clip_jax.load("ViT-B/32"), ["pet.jpg"], ["a photo of a cat", "a photo of a dog"])
    """
    weights = label_weights(model, labels, templates)
    return probabilities(model, model.embed_images(images), weights)
