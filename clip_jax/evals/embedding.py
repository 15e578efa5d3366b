"""Features of many images or texts, computed in batches over all devices and hosts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.images import Preprocess, normalize, preprocess_of
from clip_jax.data.pipeline import eval_batches
from clip_jax.data.records import Records
from clip_jax.data.transforms import EvalTransform
from clip_jax.errors import OutageError, UserError
from clip_jax.models.clip import CLIP, Variables, image_features, probe_features, text_features
from clip_jax.partition import place_rows, replicated
from clip_jax.processes.distributed import any_process

Tokenize = Callable[[Sequence[str]], np.ndarray]


class ImageFeatures(NamedTuple):
    """Embedded images in the order of their dataset.

    Attributes:
      features: float [n, e].
      labels: int32 [n].
      index: int32 [n], positions in the dataset.
    """

    features: np.ndarray
    labels: np.ndarray
    index: np.ndarray


class Embedder:
    """A model's two encoders, jitted once for a mesh; every process gets all features.

    Args:
      model: the towers.
      tokenize: texts to int32 [n, context].
      mesh: the devices.
      batch: rows a step, over all devices; the mesh's size divides it.
      preprocess: how images are cut, and whose mean and deviation pixels are normalised with; CLIP's if None.
      kind: of the images' features: `unit`, embeddings of unit length, or `probe`, see `probe_features`.
      threads: that read and decode.
    """

    def __init__(
        self,
        model: CLIP,
        tokenize: Tokenize,
        *,
        mesh: Mesh,
        batch: int,
        preprocess: Preprocess | None = None,
        kind: Literal["unit", "probe"] = "unit",
        threads: int = 4,
    ) -> None:
        self._model, self._tokenize, self._mesh, self._batch = model, tokenize, mesh, batch
        self._preprocess = preprocess or preprocess_of(model.config)
        self._apply, self._threads = {"unit": image_features, "probe": probe_features}[kind], threads
        self._encode_images = jax.jit(self._image_features, out_shardings=replicated(mesh))
        self._encode_pixels = jax.jit(self._pixel_features, out_shardings=replicated(mesh))
        self._encode_texts = jax.jit(self._text_features, out_shardings=replicated(mesh))

    def source(
        self, variables: Variables, source: Records, *, progress: Callable[[], None] = lambda: None
    ) -> ImageFeatures:
        """Embeds every image of a source once, in order; collective over processes, of which each reads its slice.

        Images that cannot be read raise an exception in all processes, at the same place.

        Args:
          variables: of the model, on the mesh.
          source: the same in every process.
          progress: called before every batch.

        Raises:
          RecordError: names an image that cannot be read.
        """
        batches = eval_batches(
            source,
            transform=EvalTransform(self._preprocess),
            batch=self._batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=self._threads,
        )
        reading = InStep(batches, self._blank(), count=-(-len(source) // self._batch))
        images = self.images(variables, reading.batches(progress))
        reading.check()
        return images

    def images(self, variables: Variables, batches: Iterable[dict[str, np.ndarray]]) -> ImageFeatures:
        """Embeds the images of `eval_batches`; rows of weight 0 are dropped.

        Args:
          variables: of the model, on the mesh.
          batches: this process's rows, as `eval_batches` yields them.

        Raises:
          UserError: features that are no numbers.
        """
        parts = []
        for batch in batches:
            found = jax.device_get(self._encode_images(variables, place_rows(batch, self._mesh)))
            kept = found["weight"] > 0
            parts.append(tuple(found[name][kept] for name in ImageFeatures._fields))
        found = ImageFeatures(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        _check_finite(found.features)
        return found

    def texts(
        self, variables: Variables, texts: Sequence[str], *, progress: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """Embeds texts: float [n, e], unit length; `progress` is called before every batch."""
        return self._encode(self._encode_texts, variables, self.tokenize(texts), progress=progress)

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Returns texts as the text tower reads them: int32 [n, context]."""
        return self._tokenize(texts)

    def tokens(self, variables: Variables, tokens: np.ndarray) -> np.ndarray:
        """Embeds rows of token ids, int32 [n, context]: float [n, e], unit length.

        Every process of the mesh gives all of them.
        """
        return self._encode(self._encode_texts, variables, tokens)

    def pixels(self, variables: Variables, images: np.ndarray) -> np.ndarray:
        """Embeds images that are cut to size, uint8 [n, s, s, 3]: float [n, e], unit length.

        Every process of the mesh gives all of them.
        """
        return self._encode(self._encode_pixels, variables, images)

    def _encode(
        self,
        encode: Callable[..., jax.Array],
        variables: Variables,
        rows: np.ndarray,
        *,
        progress: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Encodes rows batch by batch; the last batch is padded with zeros."""
        parts = []
        for start in range(0, len(rows), self._batch):
            progress()
            chunk = rows[start : start + self._batch]
            padding = np.zeros((self._batch - len(chunk), *rows.shape[1:]), rows.dtype)
            padded = self._rows_of_this_process(np.concatenate([chunk, padding]))
            features = encode(variables, place_rows({"rows": padded}, self._mesh)["rows"])
            parts.append(np.asarray(features)[: len(chunk)])
        found = np.concatenate(parts)
        _check_finite(found)
        return found

    def _rows_of_this_process(self, rows: np.ndarray) -> np.ndarray:
        processes = sorted({device.process_index for device in self._mesh.devices.flat})
        share = len(rows) // len(processes)
        return rows[share * processes.index(jax.process_index()) :][:share]

    def _blank(self) -> dict[str, np.ndarray]:
        rows, size = self._batch // jax.process_count(), self._preprocess.size
        return {
            "image": np.zeros((rows, size, size, 3), np.uint8),
            "label": np.zeros(rows, np.int32),
            "weight": np.zeros(rows, np.float32),
            "index": np.full(rows, -1, np.int64),
        }

    def _pixel_features(self, variables: Variables, images: jax.Array) -> jax.Array:
        dtype = self._model.config.dtype
        return self._apply(self._model, variables, normalize(images, self._preprocess, dtype))

    def _image_features(self, variables: Variables, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            "features": self._pixel_features(variables, batch["image"]),
            "labels": batch["label"],
            "index": batch["index"].astype(jnp.int32),
            "weight": batch["weight"],
        }

    def _text_features(self, variables: Variables, tokens: jax.Array) -> jax.Array:
        return text_features(self._model, variables, tokens)


def _check_finite(features: np.ndarray) -> None:
    """Refuses features [n, e] that are no numbers: no class is higher than another then, and each is among the best."""
    wrong = len(features) - int(np.isfinite(features).all(axis=1).sum())
    if wrong:
        raise UserError(
            f"{wrong:,} of {len(features):,} features that the model gives are not finite numbers; it has diverged, or "
            "its weights are damaged"
        )


class InStep:
    """Batches that keep the processes in step where one of them cannot read its own: blank ones stand in for these.

    Args:
      batches: this process's.
      blank: of their shapes, without a row that counts.
      count: of every process.
    """

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], blank: dict[str, np.ndarray], *, count: int) -> None:
        self._batches, self._blank, self._count = batches, blank, count
        self._error: Exception | None = None

    def batches(self, progress: Callable[[], None]) -> Iterator[dict[str, np.ndarray]]:
        """Yields them, calling `progress` before each."""
        for _ in range(self._count):
            progress()
            try:
                batch = self._blank if self._error else next(self._batches)
            except Exception as error:  # of any kind: all that is known is that this process has no batch
                self._error, batch = error, self._blank
            yield batch

    def check(self) -> None:
        """Raises what went wrong, in every process; where it was an outage, one in every process."""
        if any_process(self._error is not None):
            lasting = any_process(self._error is not None and not isinstance(self._error, OutageError))
            raise self._error or (RuntimeError if lasting else OutageError)("another process could not read its images")
