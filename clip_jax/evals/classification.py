"""Classification of a labelled dataset, zero-shot or by a linear probe: a model and a job to metrics."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clip_jax.data.labelled import LabelledSource, open_labelled
from clip_jax.data.photographs import Photographs
from clip_jax.data.tfds_source import TfdsSource
from clip_jax.errors import UserError
from clip_jax.evals import linear_probe, prompts
from clip_jax.evals.evaluator import Evaluator
from clip_jax.evals.job import EvalJob
from clip_jax.evals.zero_shot import ZeroShotResult, check_labels, class_weights, classify, named_classes

SHOWN_CONFUSIONS = 20


@dataclass(frozen=True)
class Found:
    """What a task gives; see `Result`."""

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def open_classes(job: EvalJob) -> tuple[LabelledSource, tuple[str, ...]]:
    """Opens a job's labelled dataset, and names its classes.

    Raises:
      UserError: as `evaluate`; or prompts would be made of ImageNet's numbers.
    """
    source = open_job(job)
    named = job.classes or prompts.default_classes(job.called)
    given = prompts.class_names(named, dataset=job.called, language=job.language) if named else ()
    classes = named_classes(given, source)
    numbers = r"n\d{8}|\d+" if len(classes) == 1_000 else r"n\d{8}"  # of ImageNet's folders, and of ImageNet-V2's
    if job.task != "linear_probe" and all(re.fullmatch(numbers, name) for name in classes):
        raise UserError(
            f"the classes of {source} are called {classes[0]}, {classes[-1]} and the like, of which no model knows; "
            "name them with --classes (config.eval.classes), open_clip for ImageNet's thousand, and their templates "
            "with --templates (config.eval.prompts)"
        )
    return source, classes


def open_job(job: EvalJob) -> LabelledSource:
    """Opens a job's labelled dataset, see `open_labelled`; where it names none, photographs that are at hand."""
    if not job.dataset:
        return Photographs()
    return open_labelled(
        job.dataset, split=job.split, data_dir=job.data_dir, image_key=job.image_key, label_key=job.label_key
    )


def open_templates(job: EvalJob, source: LabelledSource) -> tuple[str, ...]:
    """Returns a job's templates.

    Raises:
      UserError: as `evaluate`.
    """
    own: tuple[str, ...] = getattr(source, "templates", ())
    if own and not job.templates:
        return prompts.checked(own, str(source))
    named = job.templates or prompts.default_templates(job.called)
    return prompts.templates(named, dataset=job.called, language=job.language, where="templates")


def zero_shot_classification(evaluator: Evaluator, job: EvalJob) -> Found:
    """Returns the accuracy of a classifier made of class names and templates."""
    source, classes = open_classes(job)
    templates = open_templates(job, source)
    weights = class_weights(evaluator.texts, classes, templates)
    images = evaluator.images(source)
    found = classify(images.features, images.labels, weights, prompts=job.templates, classes=classes)
    return Found(*accuracy(found), details=about(found, source) | {"templates": list(templates)})


def accuracy(found: ZeroShotResult) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Returns top-1, top-5 and mean per class by CLIP_benchmark's names, and their 95 % intervals."""
    metrics = {"acc1": found.top1, "acc5": found.top5, "mean_per_class_recall": found.mean_per_class}
    ends = {
        "acc1": found.interval,
        "acc5": found.top5_interval,
        "mean_per_class_recall": found.mean_per_class_interval,
    }
    return metrics, {name: pair for name, pair in ends.items() if pair is not None}


def about(found: ZeroShotResult, source: LabelledSource) -> dict[str, Any]:
    """Returns what a result says of its dataset, and the classes that were taken for each other most often."""
    return {
        "images": found.images,
        "data": source.fingerprint,
        "classes": list(found.classes),
        "confusions": [list(row) for row in found.confusions()[:SHOWN_CONFUSIONS]],
    }


def linear_probe_classification(evaluator: Evaluator, job: EvalJob) -> Found:
    """Returns the accuracy of a logistic regression on features, fitted on other images of the same classes.

    Raises:
      UserError: as `evaluate`; or no class has two images, so that none can be held out to choose C.
    """
    source, classes = open_classes(job)
    fitted_on = job.train or "train"
    train = _embedded_beside(evaluator, job, fitted_on, source, classes=len(classes))
    test = evaluator.images(source, kind="probe")
    if job.validation:
        validation = _embedded_beside(evaluator, job, job.validation, source, classes=len(classes))
    else:
        features, labels = train
        held_out = linear_probe.split_off(labels)
        if not held_out.any():
            raise UserError(
                f"no class of --train={fitted_on} has two images, so none can be held out to choose C on; name some "
                "with --validation"
            )
        train, validation = (features[~held_out], labels[~held_out]), (features[held_out], labels[held_out])
    # Every process has all features, and fits by itself: L-BFGS asks for sums over the devices at every step.
    options: dict[str, Any] = {"classes": len(classes), "mesh": evaluator.own_mesh}
    chosen = linear_probe.choose_c(train, validation, **options)
    both = [np.concatenate(columns) for columns in zip(train, validation, strict=True)]
    probe = linear_probe.fit(*both, c=chosen.c, **options)
    ones = np.ones((len(test.labels), 1), test.features.dtype)
    features = np.concatenate([test.features, ones], axis=1)
    found = classify(features, test.labels, probe.with_biases(), prompts="", classes=classes)
    metrics, intervals = accuracy(found)
    details = {
        "c": chosen.c,
        "validation_accuracy": {f"{c:.6g}": share for c, share in chosen.tried.items()},
        "iterations": probe.iterations,
        "features": test.features.shape[1],
        "train_images": len(both[1]),
    }
    return Found(
        {f"lp_{name}": value for name, value in metrics.items()},
        {f"lp_{name}": ends for name, ends in intervals.items()},
        about(found, source) | details,
    )


def _embedded_beside(
    evaluator: Evaluator, job: EvalJob, where: str, source: LabelledSource, *, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns probe features and labels of another split of a TFDS dataset, or of another folder or other tar shards.

    Raises:
      UserError: nothing there, other classes, or a label that is none of theirs.
    """
    if isinstance(source, TfdsSource):
        beside = open_job(dataclasses.replace(job, split=where))
    else:
        beside = open_job(dataclasses.replace(job, dataset=where))
    if beside.classes != source.classes:
        raise UserError(f"{beside} has other classes than {source}; their labels would mean something else")
    found = evaluator.images(beside, kind="probe")
    check_labels(found.labels, classes)
    return found.features, found.labels
