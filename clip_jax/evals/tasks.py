"""The tasks of `clip-jax eval`: a model and a job to a result."""

import dataclasses
from collections.abc import Callable
from typing import Any

import clip_jax
from clip_jax.config import RunConfig
from clip_jax.evals.captioned import embed_captioned, open_captioned
from clip_jax.evals.classification import Found, linear_probe_classification, zero_shot_classification
from clip_jax.evals.evaluator import Evaluator
from clip_jax.evals.job import EvalJob
from clip_jax.evals.limits import groups, phrasing, typographic, word_order
from clip_jax.evals.results import Result
from clip_jax.evals.retrieval import recalls
from clip_jax.evals.zero_shot import wilson_interval


def evaluate(evaluator: Evaluator, job: EvalJob) -> Result:
    """Does one evaluation; collective over processes, each of which gets the result.

    Raises:
      UserError: the dataset, its classes or the templates are not what the job says.
    """
    found = _TASKS[job.task](evaluator, job)
    model, pretrained = evaluator.names
    details: dict[str, Any] = {
        "job": dataclasses.asdict(job),
        "model": {"fingerprint": evaluator.fingerprint, "dtype": evaluator.config.dtype},
        "preprocess": evaluator.preprocess.to_dict(),
        "clip_jax": clip_jax.__version__,
    }
    return Result(
        job.called,
        model,
        pretrained,
        job.task,
        job.language,
        found.metrics,
        found.intervals,
        details | dict(found.details),
    )


def zero_shot_retrieval(evaluator: Evaluator, job: EvalJob) -> Found:
    """Returns how often images are found by their captions, and captions by their images."""
    source = open_captioned(job, RunConfig(evaluator.config))
    found = embed_captioned(evaluator, source)
    metrics = recalls(found.images, found.texts, found.image_of_text, mesh=evaluator.mesh)
    counts = {"image": len(found.texts), "text": len(found.images)}
    intervals = {name: wilson_interval(value, counts[name.partition("_")[0]]) for name, value in metrics.items()}
    details = {"images": len(found.images), "texts": len(found.texts), "data": source.fingerprint}
    return Found(metrics, intervals, details)


_TASKS: dict[str, Callable[[Evaluator, EvalJob], Found]] = {
    "zeroshot_classification": zero_shot_classification,
    "zeroshot_retrieval": zero_shot_retrieval,
    "linear_probe": linear_probe_classification,
    "typographic": typographic,
    "word_order": word_order,
    "groups": groups,
    "phrasing": phrasing,
}
