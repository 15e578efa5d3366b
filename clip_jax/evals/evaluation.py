"""The evaluation that a run's config asks for: zero-shot classification of held-out images, and retrieval by prompt."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clip_jax.config import RunConfig
from clip_jax.data.images import preprocess_of
from clip_jax.data.pipeline import EvalTransform, eval_batches
from clip_jax.data.tfds_source import TfdsSource
from clip_jax.evals.embedding import Embedder, ImageFeatures
from clip_jax.evals.prompts import templates
from clip_jax.evals.retrieval import find_images
from clip_jax.evals.zero_shot import ZeroShotResult, class_weights, classify
from clip_jax.models.clip import CLIP, Variables
from clip_jax.partition import check_batch

SHEET_CAPTIONS, SHEET_IMAGES = 12, 8


class Evaluated(NamedTuple):
    """What an evaluation found: a result for each template set, and the images' features."""

    results: tuple[ZeroShotResult, ...]
    images: ImageFeatures


class RetrievalSheet(NamedTuple):
    """Captions and the images found for them.

    Attributes:
      captions: q texts.
      images: uint8 [q, k, s, s, 3], best first.
      hits: bool [q, k], whether the image is of the caption's class.
    """

    captions: tuple[str, ...]
    images: np.ndarray
    hits: np.ndarray


class Evaluation:
    """Zero-shot evaluation on one labelled dataset.

    Args:
      config: the run's, with `config.eval.dataset` set.
      model: the towers.
      mesh: the devices.

    Raises:
      UserError: the dataset, its features or a template set is not there, or the batch does not fit the mesh.
    """

    def __init__(self, config: RunConfig, model: CLIP, *, mesh: Mesh) -> None:
        from clip_jax.data.tokenizer import Tokenizer  # a run without evaluation may have no tokenizer installed

        check_batch("eval.batch", config.eval.batch, mesh)
        self.templates = {name: templates(name) for name in config.eval.prompts}
        self._batch = config.eval.batch
        self._transform = EvalTransform(preprocess_of(config.model))
        self._source = TfdsSource(
            config.eval.dataset,
            config.eval.split,
            data_dir=config.data.data_dir,
            image_key=config.eval.image_key,
            caption_key="",
            label_key=config.eval.label_key,
        )
        self._embedder = Embedder(model, Tokenizer(), mesh=mesh, batch=config.eval.batch)

    @classmethod
    def open(cls, config: RunConfig, model: CLIP, *, mesh: Mesh) -> "Evaluation | None":
        """Returns the evaluation that the config asks for, or None."""
        return cls(config, model, mesh=mesh) if config.eval.dataset else None

    def run(self, variables: Variables, *, progress: Callable[[], None] = lambda: None) -> Evaluated:
        """Embeds all images once and classifies them with each template set; collective over processes.

        Images that cannot be read raise an exception in all processes, at the same place.

        Args:
          variables: of the model, on the mesh.
          progress: called after every batch.
        """
        reading = InStep(self._batches(), self._blank(), count=-(-len(self._source) // self._batch))
        images = self._embedder.images(variables, reading.batches(progress))
        reading.check()
        classes = self._source.classes
        results = []
        for name, prompts in self.templates.items():
            weights = class_weights(lambda texts: self._embedder.texts(variables, texts), classes, prompts)
            results.append(classify(images.features, images.labels, weights, prompts=name, classes=classes))
        return Evaluated(tuple(results), images)

    def retrieve(self, variables: Variables, evaluated: Evaluated) -> RetrievalSheet:
        """Searches the images with one caption a class, in a wording of the last template set."""
        classes = self._source.classes[:SHEET_CAPTIONS]
        wordings = list(self.templates.values())[-1]
        captions = tuple(wordings[i % len(wordings)].format(name) for i, name in enumerate(classes))
        top = min(SHEET_IMAGES, len(evaluated.images.labels))
        found = find_images(evaluated.images.features, self._embedder.texts(variables, captions), top=top)
        index, labels = evaluated.images.index[found], evaluated.images.labels[found]
        pixels = np.stack([[self._transform(self._source[int(i)])["image"] for i in row] for row in index])
        return RetrievalSheet(captions, pixels, labels == np.arange(len(classes))[:, None])

    def _blank(self) -> dict[str, np.ndarray]:
        rows, size = self._batch // jax.process_count(), self._transform.preprocess.size
        return {
            "image": np.zeros((rows, size, size, 3), np.uint8),
            "label": np.zeros(rows, np.int32),
            "weight": np.zeros(rows, np.float32),
            "index": np.full(rows, -1, np.int64),
        }

    def _batches(self):
        return eval_batches(
            self._source,
            transform=self._transform,
            batch=self._batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
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
        """Raises what went wrong, in every process."""
        failed = self._error is not None
        if jax.process_count() > 1:
            failed = bool(multihost_utils.process_allgather(np.asarray(failed)).any())
        if failed:
            raise self._error or RuntimeError("another process could not read its images")


def scalars(evaluated: Evaluated) -> dict[str, float]:
    """Returns the numbers that belong into the metrics, such as `zero_shot/photo/top1`."""
    return {f"zero_shot/{result.prompts}/top1": result.top1 for result in evaluated.results}
