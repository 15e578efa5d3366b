"""What a run leaves to look at: tables on the console, `zero_shot.json`, and figures in the workdir."""

import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

from clip_jax.config import RunConfig
from clip_jax.console import print_table
from clip_jax.errors import one_line
from clip_jax.evals.evaluation import Evaluated, RetrievalSheet
from clip_jax.evals.figures import plot_confusion, plot_retrieval, plot_training
from clip_jax.evals.zero_shot import ZeroShotResult
from clip_jax.run import metrics
from clip_jax.training.losses import chance_loss

SHOWN_CONFUSIONS = 10
_LOG = logging.getLogger(__name__)


def report_training(workdir: Path, config: RunConfig) -> None:
    """Draws the run's metrics into `training.png`."""
    rows, chance = metrics.read(workdir), chance_loss(config.loss.kind, config.batch)
    if rows:
        _leave(workdir / "training.png", lambda path: plot_training(rows, path, chance_loss=chance, title=workdir.name))


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

    entries, last = [_entry(result, templates) for result in evaluated.results], evaluated.results[-1]
    _leave(workdir / "zero_shot.json", lambda path: path.write_text(json.dumps(entries, indent=2) + "\n"))
    title = f"Prompts: {last.prompts}, top-1 {last.top1:.1%}"
    _leave(workdir / "confusion.png", lambda path: plot_confusion(last.confusion, last.classes, path, title=title))
    _leave(workdir / "retrieval.png", functools.partial(_draw_retrieval, sheet))


def _draw_retrieval(sheet: RetrievalSheet, path: Path) -> None:
    plot_retrieval(sheet.captions, sheet.images(), sheet.hits, path, title="Images found for captions")


def _leave(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file; one that fails, or finds no matplotlib, must not fail a run that has trained for days."""
    try:
        write(path)
    except Exception as error:  # of any kind: of disks, of stores, of matplotlib
        _LOG.warning("%s was not written: %s: %s", path, type(error).__name__, one_line(error))


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
