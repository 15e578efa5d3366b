"""The evaluation that a run's config asks for: zero-shot classification of held-out images, and retrieval by prompt."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from clip_jax.config import RunConfig
from clip_jax.data.images import preprocess_of
from clip_jax.data.loader import check_same
from clip_jax.data.transforms import EvalTransform
from clip_jax.evals.embedding import Embedder, ImageFeatures
from clip_jax.evals.job import EvalJob
from clip_jax.evals.prompts import templates
from clip_jax.evals.retrieval import nearest
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
      images: reads them, uint8 [q, k, s, s, 3], best first; raises what their source does.
      hits: bool [q, k], whether the image is of the caption's class.
    """

    captions: tuple[str, ...]
    images: Callable[[], np.ndarray]
    hits: np.ndarray


class Evaluation:
    """Zero-shot evaluation on one labelled dataset.

    Args:
      config: the run's, with `config.eval.dataset` set.
      model: the towers.
      mesh: the devices.

    Raises:
      UserError: the dataset, its features or a template set is not there, or the batch does not fit the mesh; or the
        processes do not see the same images.
    """

    def __init__(self, config: RunConfig, model: CLIP, *, mesh: Mesh) -> None:
        # a run without evaluation may have no tokenizer installed
        from clip_jax.data.tokenizer import Tokenizer
        from clip_jax.evals.classification import open_classes

        check_batch("eval.batch", config.eval.batch, mesh)
        evaluation, job = config.eval, job_of(config)
        self.templates = {name: templates(name, dataset=job.called) for name in evaluation.template_sets}
        self._mesh = mesh
        preprocess = preprocess_of(config.model, config.data)
        self._transform = EvalTransform(preprocess)
        self._source, self._classes = open_classes(job)
        check_same("config.eval.dataset", [self._source])
        tokenize = functools.partial(Tokenizer(), context=config.model.text.context)
        self._embedder = Embedder(model, tokenize, mesh=mesh, batch=evaluation.batch, preprocess=preprocess)

    @classmethod
    def open(cls, config: RunConfig, model: CLIP, *, mesh: Mesh) -> "Evaluation | None":
        """Returns the evaluation that the config asks for, or None."""
        return cls(config, model, mesh=mesh) if config.eval.dataset else None

    def run(self, variables: Variables, *, progress: Callable[[], None] = lambda: None) -> Evaluated:
        """Embeds all images once and classifies them with each template set; collective over processes.

        Args:
          variables: of the model, on the mesh.
          progress: called before every batch, of images and of prompts.

        Raises:
          RecordError: an image cannot be read.
        """
        images = self._embedder.source(variables, self._source, progress=progress)
        embed = functools.partial(self._embedder.texts, variables, progress=progress)
        results = []
        for name, prompts in self.templates.items():
            weights = class_weights(embed, self._classes, prompts)
            results.append(classify(images.features, images.labels, weights, prompts=name, classes=self._classes))
        return Evaluated(tuple(results), images)

    def retrieve(self, variables: Variables, evaluated: Evaluated) -> RetrievalSheet:
        """Searches the images with one caption a class, in a wording of the last template set."""
        classes = self._classes[:SHEET_CAPTIONS]
        wordings = list(self.templates.values())[-1]
        captions = tuple(wordings[i % len(wordings)].format(name) for i, name in enumerate(classes))
        top = min(SHEET_IMAGES, len(evaluated.images.labels))
        texts = self._embedder.texts(variables, captions)
        found = nearest(texts, evaluated.images.features, top=top, mesh=self._mesh)
        index, labels = evaluated.images.index[found], evaluated.images.labels[found]

        def images() -> np.ndarray:
            return np.stack([[self._transform(self._source[int(i)])["image"] for i in row] for row in index])

        return RetrievalSheet(captions, images, labels == np.arange(len(classes))[:, None])


def job_of(config: RunConfig) -> EvalJob:
    """Returns what `config.eval` names, as `clip-jax eval` has it."""
    evaluation = config.eval
    return EvalJob(
        evaluation.dataset,
        split=evaluation.split,
        data_dir=config.data.data_dir,
        image_key=evaluation.image_key,
        label_key=evaluation.label_key,
        classes=evaluation.classes,
    )


def scalars(evaluated: Evaluated) -> dict[str, float]:
    """Returns the numbers that belong into the metrics, such as `zero_shot/photo/top1`."""
    return {f"zero_shot/{result.prompts}/top1": result.top1 for result in evaluated.results}
