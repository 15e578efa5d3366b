"""Several runs side by side: what differs in their configs, what they reached, and whether that is more than noise.

Runs that differ in nothing but their seeds are one arm. Losses and evaluations are compared only between arms of which
they mean the same.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.ablations.runs import FinishedRun, RunArm, compared_config, find_runs, group_by_arm
from clip_jax.ablations.statistics import Difference, mean_and_error, paired_difference
from clip_jax.ablations.sweep import as_text, short_key
from clip_jax.config import HELD_OUT_METRICS, RunConfig, held_out_source, pairs_named
from clip_jax.console import clock, plain_table
from clip_jax.errors import UserError, did_you_mean
from clip_jax.models.flops import pair_flops
from clip_jax.typed import flatten

LOSS = "loss"


@dataclass(frozen=True)
class ComparedArm:
    """An arm's figures.

    Attributes:
      arm: its runs.
      settings: by config key, what the arms differ in.
      results: by metric and seed.
      samples: pairs seen by each seed, their mean.
      seconds: of training for each seed, their mean.
      flops: operations of training for each seed, their mean, by arithmetic.
    """

    arm: RunArm
    settings: Mapping[str, Any]
    results: Mapping[str, Mapping[int, float]]
    samples: float
    seconds: float
    flops: float


@dataclass(frozen=True)
class Comparison:
    """Arms, and each one's differences from the baseline by (arm's name, metric).

    Attributes:
      arms: in order of appearance.
      baseline: name of the arm that the others are compared with.
      metrics: names.
      differences: as `paired_difference` gives them; a metric that means something else has none.
      left_out: runs that have not come to their end, each with what it lacks.
    """

    arms: tuple[ComparedArm, ...]
    baseline: str
    metrics: tuple[str, ...]
    differences: Mapping[tuple[str, str], Difference]
    left_out: tuple[str, ...]


def compare(folders: Sequence[Path], *, baseline: str = "", metrics: Sequence[str] = ()) -> Comparison:
    """Reads runs and compares them.

    Args:
      folders: workdirs, or folders above them, such as a sweep's.
      baseline: name of an arm; empty means the first.
      metrics: names, such as `zero_shot/photo/top1`; empty means all that any run has.

    Raises:
      UserError: no finished run, the same run twice, or no such arm or metric; the line lists what exists.
    """
    runs = find_runs(folders)
    finished = [run for run in runs if not run.missing]
    left_out = tuple(f"{run.workdir}: {run.missing}" for run in runs if run.missing)
    if not finished:
        raise UserError(f"no run has come to its end: {'; '.join(left_out)}")
    arms = group_by_arm(finished)
    settings = differing_settings([arm.config for arm in arms])
    compared = tuple(_compared(arm, values) for arm, values in zip(arms, settings, strict=True))
    names = [arm.name for arm in arms]
    base = compared[names.index(_known("arm", baseline, names))] if baseline else compared[0]
    found = list(dict.fromkeys(name for each in compared for name in each.results))
    chosen = tuple(_known("metric", name, found) for name in metrics) or tuple(found)
    differences = {
        (each.arm.name, name): paired_difference(base.results.get(name, {}), each.results.get(name, {}))
        for each in compared
        for name in chosen
        if each is not base and _mean_the_same(name, base.arm.config, each.arm.config)
    }
    return Comparison(compared, base.arm.name, chosen, differences, left_out)


def differing_settings(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Returns for each config the values of the dotted keys in which they are not all alike; absent ones are None."""
    flat = [flatten(dataclasses.asdict(compared_config(config))) for config in configs]
    keys = sorted({key for values in flat for key in values})
    differing = [key for key in keys if any(values.get(key) != flat[0].get(key) for values in flat)]
    return [{key: values.get(key) for key in differing} for values in flat]


def report(comparison: Comparison) -> str:
    """Returns the comparison as text for a terminal."""
    title, columns, rows = _arms_table(comparison)
    parts = [plain_table(title, columns, rows)]
    if comparison.differences:
        parts.append(plain_table(*_differences_table(comparison)))
    return "\n\n".join([*parts, *_notes(comparison)])


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Writes `compare.md`, `compare.json` and the curves, `compare.png`.

    Raises:
      UserError: they cannot be written.
    """
    from clip_jax.ablations.figure import plot_comparison

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(as_values(comparison), indent=2) + "\n")
        (out / "compare.md").write_text(_markdown(comparison))
        plot_comparison(comparison, out / "compare.png")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None


def as_values(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison as JSON holds it; what is not a number is null."""
    return {
        "baseline": comparison.baseline,
        "arms": [
            {
                "name": each.arm.name,
                "config": {
                    key: list(value) if isinstance(value, tuple) else value for key, value in each.settings.items()
                },
                "runs": {str(seed): str(run.workdir) for seed, run in each.arm.runs.items()},
                "results": {
                    name: dict(
                        zip(
                            ("mean", "standard_error"), map(_finite, mean_and_error(list(values.values()))), strict=True
                        )
                    )
                    | {"by_seed": {str(seed): _finite(value) for seed, value in values.items()}}
                    for name, values in each.results.items()
                    if name in comparison.metrics
                },
                "samples": each.samples,
                "seconds": each.seconds,
                "flops": each.flops,
            }
            for each in comparison.arms
        ],
        "differences": [
            {"arm": arm, "metric": name}
            | {key: _finite(value) if isinstance(value, float) else value for key, value in found._asdict().items()}
            for (arm, name), found in comparison.differences.items()
        ],
        "left_out": list(comparison.left_out),
    }


def _compared(arm: RunArm, settings: Mapping[str, Any]) -> ComparedArm:
    runs = list(arm.runs.values())
    results: dict[str, dict[int, float]] = {}
    for seed, run in arm.runs.items():
        for name, value in run.results().items():
            results.setdefault(name, {})[seed] = value
    samples = _mean(runs, lambda run: run.samples)
    return ComparedArm(
        arm, settings, results, samples, _mean(runs, lambda run: run.seconds), samples * _pair_flops(arm.config)
    )


def _mean(runs: Sequence[FinishedRun], value: Any) -> float:
    return sum(map(value, runs)) / len(runs)


def _pair_flops(config: RunConfig) -> int:
    """Operations of a pair; an image tower counts as frozen when a regex of `optim.freeze` covers it by its name."""
    frozen_image = any(re.search(regex, "image/") for regex in config.optim.freeze)
    tiled = config.loss.form != "reference"
    return pair_flops(config.model, config.batch, tiled=tiled, frozen_image=frozen_image)


def _mean_the_same(name: str, *configs: RunConfig) -> bool:
    """Whether these runs' values of a metric can be compared: a loss depends on its kind, and on how many pairs it is
    over, and an evaluation on its data."""
    first, *others = [_meaning(name, config) for config in configs]
    return all(other == first for other in others)


def _meaning(name: str, config: RunConfig) -> tuple[Any, ...]:
    evaluation = config.eval
    if name == LOSS:
        return config.loss.kind, config.batch
    if name in HELD_OUT_METRICS:
        pairs = pairs_named(held_out_source(config.data, evaluation)) if evaluation.held_out else {}
        return config.loss.kind, pairs, evaluation.held_out_pairs or config.batch
    return evaluation.dataset, evaluation.split, evaluation.label_key, evaluation.classes


def _known(what: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise UserError(f"no {what} {name!r}{did_you_mean(name, known)} ({what}s: {', '.join(known)})")
    return name


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _arms_table(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    keys = list(comparison.arms[0].settings)
    leaves = list(flatten(dataclasses.asdict(comparison.arms[0].arm.config)))
    columns = ["arm", *(short_key(key, leaves) for key in keys), "seeds", *comparison.metrics]
    columns += ["pairs seen", "time", "FLOPs"]
    rows = [
        [each.arm.name, *("–" if value is None else as_text(value) for value in each.settings.values())]
        + [str(len(each.arm.runs)), *(_shown(each.results.get(name, {})) for name in comparison.metrics)]
        + [f"{each.samples:,.0f}", clock(each.seconds), f"{each.flops:.3g}"]
        for each in comparison.arms
    ]
    return "Arms: mean ± standard error over seeds", columns, rows


def _differences_table(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    columns = ["arm", "metric", "difference", "95 % interval", "seeds", "is it"]
    rows = []
    for (arm, name), found in comparison.differences.items():
        interval = f"{found.low:+.4g} to {found.high:+.4g}" if math.isfinite(found.low) else "–"
        verdict = found.verdict + (f" ({found.reason})" if found.reason else "")
        rows.append([arm, name, f"{found.mean:+.4g}", interval, str(found.seeds), verdict])
    return f"Differences from {comparison.baseline}, seed by seed", columns, rows


def _notes(comparison: Comparison) -> list[str]:
    told = sum(math.isfinite(found.low) for found in comparison.differences.values())
    notes = []
    if told > 1:
        notes.append(
            f"Of {told} such intervals, {told / 20:.1f} exclude 0 by chance where arms do not differ. They hold the "
            "noise of seeds, not that of the evaluation's images."
        )
    compared = [arm.arm.name for arm in comparison.arms if arm.arm.name != comparison.baseline]
    if any((arm, name) not in comparison.differences for arm in compared for name in comparison.metrics):
        notes.append(
            "Losses of another kind or batch, and evaluations of other data, are not compared with the baseline's: "
            "they mean something else."
        )
    revisions: dict[str, list[str]] = {}
    for run in (run for each in comparison.arms for run in each.arm.runs.values()):
        revisions.setdefault(run.revision, []).append(str(run.workdir))
    revisions.pop("", None)
    if len(revisions) > 1:
        shown = "; ".join(f"{revision[:9]} {', '.join(folders)}" for revision, folders in revisions.items())
        notes.append(f"Trained with several revisions of the code, which may differ too: {shown}")
    if comparison.left_out:
        notes.append("Left out, not at their end: " + "; ".join(comparison.left_out))
    return notes


def _shown(values: Mapping[int, float]) -> str:
    if not values:
        return "–"
    mean, error = mean_and_error(list(values.values()))
    return f"{mean:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def _markdown(comparison: Comparison) -> str:
    tables = [_arms_table(comparison)]
    if comparison.differences:
        tables.append(_differences_table(comparison))
    parts = [f"{title}\n\n{_markdown_table(columns, rows)}" for title, columns, rows in tables]
    return "\n\n".join([*parts, *_notes(comparison), "![Loss and accuracy over the steps](compare.png)"]) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
