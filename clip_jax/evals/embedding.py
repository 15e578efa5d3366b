"""Unit features of many images or texts, computed in batches over all devices."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.images import normalize, preprocess_of
from clip_jax.models.clip import CLIP, Variables, image_features, text_features
from clip_jax.partition import place_rows, replicated

Tokenize = Callable[..., np.ndarray]


class ImageFeatures(NamedTuple):
    """Embedded images in the order of their dataset.

    Attributes:
      features: float [n, e], unit length.
      labels: int32 [n].
      index: int64 [n], positions in the dataset.
    """

    features: np.ndarray
    labels: np.ndarray
    index: np.ndarray


class Embedder:
    """A model's two encoders, jitted once for a mesh; every process gets all features.

    Args:
      model: the towers.
      tokenize: (texts, context=…) to int32 [n, context].
      mesh: the devices.
      batch: rows a step, over all devices; the mesh's size divides it.
    """

    def __init__(self, model: CLIP, tokenize: Tokenize, *, mesh: Mesh, batch: int) -> None:
        self._model, self._tokenize, self._mesh, self._batch = model, tokenize, mesh, batch
        self._encode_images = jax.jit(self._image_features, out_shardings=replicated(mesh))
        self._encode_texts = jax.jit(self._text_features, out_shardings=replicated(mesh))

    def images(self, variables: Variables, batches: Iterable[dict[str, np.ndarray]]) -> ImageFeatures:
        """Embeds the images of `eval_batches`; rows of weight 0 are dropped.

        Args:
          variables: of the model, on the mesh.
          batches: this process's rows, as `eval_batches` yields them.
        """
        parts = []
        for batch in batches:
            found = jax.device_get(self._encode_images(variables, place_rows(batch, self._mesh)))
            kept = found["weight"] > 0
            parts.append(tuple(found[name][kept] for name in ImageFeatures._fields))
        return ImageFeatures(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def texts(self, variables: Variables, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float [n, e], unit length."""
        parts = []
        for start in range(0, len(texts), self._batch):
            chunk = list(texts[start : start + self._batch])
            padded = chunk + [""] * (self._batch - len(chunk))
            rows = self._rows_of_this_process(self._tokenize(padded, context=self._model.config.text.context))
            features = self._encode_texts(variables, place_rows({"tokens": rows}, self._mesh)["tokens"])
            parts.append(np.asarray(features)[: len(chunk)])
        return np.concatenate(parts)

    def _rows_of_this_process(self, rows: np.ndarray) -> np.ndarray:
        share = len(rows) // jax.process_count()
        return rows[share * jax.process_index() :][:share]

    def _image_features(self, variables: Variables, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        config = self._model.config
        images = normalize(batch["image"], preprocess_of(config), config.dtype)
        return {
            "features": image_features(self._model, variables, images),
            "labels": batch["label"],
            "index": batch["index"].astype(jnp.int32),
            "weight": batch["weight"],
        }

    def _text_features(self, variables: Variables, tokens: jax.Array) -> jax.Array:
        return text_features(self._model, variables, tokens)
