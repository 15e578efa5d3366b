"""Evaluations one after another: tables for a person, files for programs, targets met or missed."""

from collections.abc import Sequence
from pathlib import Path

import jax

from clip_jax.console import print_table
from clip_jax.evals.evaluator import Evaluator
from clip_jax.evals.figures import plot_typographic
from clip_jax.evals.job import EvalJob
from clip_jax.evals.results import CHECK_COLUMNS, COLUMNS, Check, Result, check, write_table
from clip_jax.evals.tasks import evaluate


def run_jobs(evaluator: Evaluator, jobs: Sequence[EvalJob], *, out: Path | None = None) -> bool:
    """Does evaluations, and returns whether all their targets are met; collective over processes.

    The first process prints, and writes every result as soon as it is there.

    Args:
      evaluator: of the model.
      jobs: what to evaluate.
      out: folder for a JSON file of each, its figure where it has one, and a `results.csv` of all that lie there; None
        writes nothing.

    Raises:
      UserError: as `evaluate`, `check` and `Result.write`.
    """
    first = jax.process_index() == 0
    checks: list[Check] = []
    for job in jobs:
        result = evaluate(evaluator, job)
        if first:
            print_table(_title(result), COLUMNS, result.rows())
        if first and out is not None:
            print(file := result.write(out))
            if result.task == "typographic":
                figure = file.with_suffix(".png")
                plot_typographic(result.details["curve"], result.metrics["acc1"], figure, title=_title(result))
                print(figure)
        for target in job.targets:
            checks += check(result, target, model=evaluator.variant)
    if first and out is not None:
        write_table(out)
    if first and checks:
        print_table("Targets", CHECK_COLUMNS, [each.row() for each in checks])
    return all(each.passed for each in checks)


def _title(result: Result) -> str:
    images = result.details.get("images")
    return f"{result.model} ({result.pretrained})" + (f", {images:,} images" if images else "")
