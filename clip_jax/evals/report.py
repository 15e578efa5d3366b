"""What a run leaves to look at: tables on the console, `zero_shot.json`, and figures in the workdir."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip_jax.config import RunConfig
from clip_jax.console import print_table
from clip_jax.evals.evaluation import Evaluated, RetrievalSheet
from clip_jax.evals.figures import plot_confusion, plot_retrieval, plot_training
from clip_jax.evals.zero_shot import ZeroShotResult
from clip_jax.run import metrics
from clip_jax.training.losses import chance_loss

SHOWN_CONFUSIONS = 10
_LOG = logging.getLogger(__name__)


def report_training(workdir: Path, config: RunConfig) -> None:
    """Draws the run's metrics into `training.png`."""
    rows = metrics.read(workdir)
    if rows:
        chance = chance_loss(config.loss.kind, config.batch)
        _draw(plot_training, rows, workdir / "training.png", chance_loss=chance, title=workdir.name)


def report_zero_shot(workdir: Path, evaluated: Evaluated, sheet: RetrievalSheet, *, templates: dict) -> None:
    """Prints the results, and writes `zero_shot.json`, `confusion.png` and `retrieval.png`.

    Args:
      workdir: the run's.
      evaluated: as `Evaluation.run` gives it.
      sheet: as `Evaluation.retrieve` gives it.
      templates: template set to its templates.
    """
    rows = [_row(result, templates) for result in evaluated.results]
    title = f"Zero-shot classification of {evaluated.results[0].images} held-out images"
    print_table(title, ["prompts", "templates", "top-1", "95 % interval", "mean per class"], rows)
    for result in evaluated.results:
        _print_confusions(result)

    entries = [_entry(result, templates) for result in evaluated.results]
    (workdir / "zero_shot.json").write_text(json.dumps(entries, indent=2) + "\n")
    last = evaluated.results[-1]
    _draw(
        plot_confusion,
        last.confusion,
        last.classes,
        workdir / "confusion.png",
        title=f"Prompts: {last.prompts}, top-1 {last.top1:.1%}",
    )
    _draw(
        plot_retrieval,
        sheet.captions,
        sheet.images,
        sheet.hits,
        workdir / "retrieval.png",
        title="Images found for captions",
    )


def _draw(plot: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Draws a figure; one that fails, or finds no matplotlib, must not fail a run that has trained for days."""
    try:
        plot(*arguments, **options)
    except Exception as error:
        _LOG.warning("%s: no figure was drawn: %s: %s", plot.__name__, type(error).__name__, error)


def _row(result: ZeroShotResult, templates: dict) -> list[str]:
    low, high = result.interval
    count = str(len(templates[result.prompts]))
    return [result.prompts, count, f"{result.top1:.2%}", f"{low:.1%} to {high:.1%}", f"{result.mean_per_class:.2%}"]


def _entry(result: ZeroShotResult, templates: dict) -> dict:
    return {
        "prompts": result.prompts,
        "templates": list(templates[result.prompts]),
        "images": result.images,
        "acc1": result.top1,
        "acc1_interval": list(result.interval),
        "acc5": None if math.isnan(result.top5) else result.top5,
        "mean_per_class_recall": result.mean_per_class,
        "confusion": result.confusion.tolist(),
        "classes": list(result.classes),
    }


def _print_confusions(result: ZeroShotResult) -> None:
    confusions = result.confusions()
    if not confusions:
        return
    shown = [[true, found, str(count)] for true, found, count in confusions[:SHOWN_CONFUSIONS]]
    print_table(f"Most confused with the prompts {result.prompts}", ["class", "taken for", "images"], shown)
