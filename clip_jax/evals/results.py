"""What an evaluation found, in CLIP_benchmark's fields and file names, and its comparison with a target.

Everything beyond that format is under one more key, `details`.
"""

import functools
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.errors import UserError, did_you_mean
from clip_jax.evals.published import published
from clip_jax.files import appearing, json_object

FILE_NAME = "benchmark_{dataset}_{pretrained}_{model}_{language}_{task}.json"
_LONGEST_NAME = 200  # bytes; file systems take 255, of which a temporary name needs some


@dataclass(frozen=True)
class Result:
    """One evaluation.

    Attributes:
      dataset: what it is called.
      model: open_clip's name of the architecture, or `custom`.
      pretrained: where the weights came from.
      task: as in `clip_jax.evals.tasks.TASKS`.
      language: of class names and templates.
      metrics: name to a share of 1; NaN where it has no meaning.
      intervals: name of a metric to its 95 % confidence interval.
      details: what else is worth keeping, as JSON holds it.
    """

    dataset: str
    model: str
    pretrained: str
    task: str
    language: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON holds it: CLIP_benchmark's keys, and `details`."""
        return {
            "dataset": self.dataset,
            "model": self.model,
            "pretrained": self.pretrained,
            "task": self.task,
            "metrics": {name: None if math.isnan(value) else value for name, value in self.metrics.items()},
            "language": self.language,
            "details": {"intervals": {name: list(ends) for name, ends in self.intervals.items()}, **self.details},
        }

    @property
    def file_name(self) -> str:
        """Returns the name of its file, where no other evaluation has it; see `write`.

        A dataset that is called by many words, such as `source=tars,tars=…`, is cut to what a file system takes.
        """
        dataset = self.dataset.strip("/").replace("/", "_")
        about = {"model": self.model, "language": self.language, "task": self.task}
        named = functools.partial(FILE_NAME.format, pretrained=Path(self.pretrained).name, **about)
        too_long = max(0, len(os.fsencode(named(dataset=dataset))) - _LONGEST_NAME)
        return named(dataset=dataset[too_long:])

    def write(self, folder: Path) -> Path:
        """Writes it into a folder, whole or not at all, and returns the file.

        The same evaluation of the same model is replaced. One that differs in what the name does not say, such as the
        split, the templates or the folder of the weights, is kept, and this one has a number behind its name.

        Raises:
          UserError: it cannot be written.
        """
        file = self._file_in(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with appearing(file) as temporary:
                temporary.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from None
        return file

    def _file_in(self, folder: Path) -> Path:
        """Returns the file that holds the same evaluation, or the first of its names that is free."""
        plain, own = folder / self.file_name, _evaluation_of(self.to_dict())
        numbered = (plain.with_stem(f"{plain.stem}_{number}") for number in itertools.count(2))
        files = itertools.chain([plain], numbered)
        return next(file for file in files if not file.exists() or _evaluation_of(_read(file)) == own)

    def rows(self) -> list[list[str]]:
        """Returns a row of a table for each metric."""
        return [
            [self.dataset, self.task, name, _percent(value), _interval(self.intervals.get(name))]
            for name, value in self.metrics.items()
        ]


COLUMNS = ("dataset", "task", "metric", "value", "95 % interval")


class Target(NamedTuple):
    """What a metric must be.

    Attributes:
      metric: its name.
      value: the target; None means the published one.
      tolerance: how far from it is well.
    """

    metric: str | None
    value: float | None
    tolerance: float


class Check(NamedTuple):
    """A metric beside its target."""

    dataset: str
    metric: str
    found: float
    target: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is no further from its target than the tolerance."""
        return abs(self.found - self.target) <= self.tolerance + 1e-12

    def row(self) -> list[str]:
        """Returns a row of a table."""
        verdict = "met" if self.passed else "MISSED"
        return [self.dataset, self.metric, f"{self.found:.4f}", f"{self.target:.4f} ± {self.tolerance:g}", verdict]


CHECK_COLUMNS = ("dataset", "metric", "found", "target", "")


def parse_target(text: str) -> Target:
    """Returns what `--check` says: `target=0.633,tol=0.001`, with `metric=acc5` if it is not the first one; or
    `published,tol=0.002`.

    Raises:
      UserError: something else.
    """
    wrong = UserError(
        f"--check={text}: it must be target=…,tol=…, with metric=… if it is not about the first metric, or "
        "published,tol=…; targets and tolerances are shares of 1"
    )
    values = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in ("target", "tol", "metric", "published") or key in values:
            raise wrong
        values[key] = value
    try:
        tolerance = float(values.get("tol", "nan"))
        target = None if "published" in values else float(values.get("target", "nan"))
    except ValueError:
        raise wrong from None
    named = "metric" in values and bool(values["metric"])
    if not 0 <= tolerance < 1 or ("published" in values and ("target" in values or values["published"])):
        raise wrong
    if target is not None and not math.isfinite(target):
        raise wrong
    return Target(values["metric"] if named else None, target, tolerance)


def check(result: Result, target: Target, *, model: str) -> list[Check]:
    """Compares a result with a target; with the published one, every metric that has one.

    Args:
      result: what was found.
      target: as `parse_target` gives it.
      model: the paper's name, for published figures.

    Raises:
      UserError: no such metric, or nothing published.
    """
    metrics = result.metrics
    if target.metric is not None and target.metric not in metrics:
        guess = did_you_mean(target.metric, metrics)
        raise UserError(f"--check: {result.task} gives no metric {target.metric!r}{guess} ({', '.join(metrics)})")
    if target.value is None:
        wanted = tuple(metrics) if target.metric is None else (target.metric,)
        targets = {row.metric: row.value for row in published(model, result.dataset, wanted)}
    else:
        targets = {target.metric or next(iter(metrics)): target.value}
    return [Check(result.dataset, name, metrics[name], value, target.tolerance) for name, value in targets.items()]


def write_table(folder: Path) -> None:
    """Writes all results that lie in a folder into its `results.csv`, a row each, as CLIP_benchmark's `build` does.

    Raises:
      UserError: it cannot be written.
    """
    import csv

    found = [_read(file) for file in sorted(folder.glob("benchmark_*.json"))]
    results = [values for values in found if values]
    names = list(dict.fromkeys(name for values in results for name in values["metrics"]))
    path = folder / "results.csv"
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "dataset", "model", "pretrained", "task", "language", "model_fullname"])
            for values in results:
                about = [values.get(key) for key in ("dataset", "model", "pretrained", "task", "language")]
                full_name = f"{values.get('model')} {values.get('pretrained')}"
                writer.writerow([*(values["metrics"].get(name) for name in names), *about, full_name])
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _read(file: Path) -> dict[str, Any]:
    """Returns a result as JSON holds it; empty where the file holds none."""
    try:
        return json_object(file.read_bytes(), {"metrics": {}})
    except (OSError, ValueError):
        return {}


def _evaluation_of(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns of which weights a result is, in which dtype, and of what; whatever was found or should have been."""
    details = _object(values.get("details"))
    job = {key: value for key, value in _object(details.get("job")).items() if key != "check"}
    return values.get("pretrained"), _object(details.get("model")).get("dtype"), job


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _percent(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.2%}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"
