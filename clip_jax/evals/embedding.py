"""Unit features of many images or texts, computed in batches over all devices."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.images import Preprocess, normalize, preprocess_of
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
      preprocess: whose mean and deviation pixels are normalised with; CLIP's if None.
    """

    def __init__(
        self, model: CLIP, tokenize: Tokenize, *, mesh: Mesh, batch: int, preprocess: Preprocess | None = None
    ) -> None:
        self._model, self._tokenize, self._mesh, self._batch = model, tokenize, mesh, batch
        self._preprocess = preprocess or preprocess_of(model.config)
        self._encode_images = jax.jit(self._image_features, out_shardings=replicated(mesh))
        self._encode_pixels = jax.jit(self._pixel_features, out_shardings=replicated(mesh))
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
        tokens = self._tokenize(list(texts), context=self._model.config.text.context)
        return self._encode(self._encode_texts, variables, tokens)

    def pixels(self, variables: Variables, images: np.ndarray) -> np.ndarray:
        """Embeds images that are cut to size, uint8 [n, s, s, 3]: float [n, e], unit length.

        Every process of the mesh gives all of them.
        """
        return self._encode(self._encode_pixels, variables, images)

    def _encode(self, encode: Callable[..., jax.Array], variables: Variables, rows: np.ndarray) -> np.ndarray:
        """Encodes rows batch by batch; the last batch is padded with zeros."""
        parts = []
        for start in range(0, len(rows), self._batch):
            chunk = rows[start : start + self._batch]
            padding = np.zeros((self._batch - len(chunk), *rows.shape[1:]), rows.dtype)
            padded = self._rows_of_this_process(np.concatenate([chunk, padding]))
            features = encode(variables, place_rows({"rows": padded}, self._mesh)["rows"])
            parts.append(np.asarray(features)[: len(chunk)])
        return np.concatenate(parts)

    def _rows_of_this_process(self, rows: np.ndarray) -> np.ndarray:
        processes = sorted({device.process_index for device in self._mesh.devices.flat})
        share = len(rows) // len(processes)
        return rows[share * processes.index(jax.process_index()) :][:share]

    def _pixel_features(self, variables: Variables, images: jax.Array) -> jax.Array:
        dtype = self._model.config.dtype
        return image_features(self._model, variables, normalize(images, self._preprocess, dtype))

    def _image_features(self, variables: Variables, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            "features": self._pixel_features(variables, batch["image"]),
            "labels": batch["label"],
            "index": batch["index"].astype(jnp.int32),
            "weight": batch["weight"],
        }

    def _text_features(self, variables: Variables, tokens: jax.Array) -> jax.Array:
        return text_features(self._model, variables, tokens)
