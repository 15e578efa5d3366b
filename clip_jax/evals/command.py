"""Evaluations one after another: tables for a person, files for programs, targets met or missed."""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from clip_jax.console import print_table
from clip_jax.errors import UserError, one_line
from clip_jax.evals.evaluator import Evaluator
from clip_jax.evals.figures import plot_typographic
from clip_jax.evals.job import EvalJob
from clip_jax.evals.results import CHECK_COLUMNS, COLUMNS, Check, Result, check, write_table
from clip_jax.evals.tasks import evaluate


def run_jobs(evaluator: Evaluator, jobs: Sequence[EvalJob], *, out: Path | None = None) -> bool:
    """Does evaluations, and returns whether all their targets are met; collective over processes.

    The first process prints, and writes every result as soon as it is there. In a single process, one of several that
    cannot be done is named at once, and the others are done.

    Args:
      evaluator: of the model.
      jobs: what to evaluate.
      out: folder for a JSON file of each, its figure where it has one, and a `results.csv` of all that lie there; None
        writes nothing.

    Raises:
      UserError: as `evaluate`, `check` and `Result.write`; of several, it names those that could not be done.
    """
    first = jax.process_index() == 0
    if first and out is not None:
        _make(out)  # now, so that it cannot fail after the work
    checks: list[Check] = []
    failed: list[str] = []
    for job in jobs:
        try:
            result = evaluate(evaluator, job)
            if first:
                _show(result, out)
            for target in job.targets:
                checks += check(result, target, model=evaluator.variant)
        except UserError as error:
            if len(jobs) == 1 or jax.process_count() > 1:  # other processes may be in the midst of it
                raise
            print(f"error: {job.called}: {one_line(error)}", file=sys.stderr)
            failed.append(job.called)
    if first and out is not None:
        write_table(out)
    if first and checks:
        print_table("Targets", CHECK_COLUMNS, [each.row() for each in checks])
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} evaluations failed: {', '.join(failed)}")
    return all(each.passed for each in checks)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def _show(result: Result, out: Path | None) -> None:
    """Prints a result, and writes it into a folder if there is one."""
    print_table(_title(result), COLUMNS, result.rows())
    if out is None:
        return
    print(file := result.write(out))
    if result.task == "typographic":
        figure = file.with_suffix(".png")
        plot_typographic(result.details["curve"], result.metrics["acc1"], figure, title=_title(result))
        print(figure)


def _title(result: Result) -> str:
    images = result.details.get("images")
    return f"{result.model} ({result.pretrained})" + (f", {images:,} images" if images else "")
