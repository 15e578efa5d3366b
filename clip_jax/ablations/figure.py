"""Curves of several arms in one figure: the mean over seeds, and its standard error as a band."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.ablations.compare import LOSS, ComparedArm, Comparison
from clip_jax.evals.figures import BLUE, GREEN, GREY, ORANGE, RED, new_figure, save, smooth
from clip_jax.training.losses import chance_loss

COLOURS = (BLUE, ORANGE, GREEN, RED, "#cc79a7", "#56b4e9", "#000000", GREY)
STYLES = ("-", "--", ":", "-.")


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draws each arm's loss as a share of chance (left), and the first evaluation that is compared (right).

    Args:
      comparison: as `compare` gives it.
      path: the PNG.
    """
    evaluations = [name for name in comparison.metrics if name != LOSS]
    figure = new_figure(11.0, 4.4 + 0.2 * len(comparison.arms))
    axes = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    for number, each in enumerate(comparison.arms):
        look = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}
        chance = chance_loss(each.arm.config.loss.kind, each.arm.config.batch)
        steps, values = curves(each, LOSS)
        _draw(axes[0], steps, np.array([smooth(row) for row in values]) / chance, look, each.arm.name)
        if evaluations:
            _draw(axes[1], *curves(each, evaluations[0]), look, each.arm.name)
    axes[0].axhline(1, color=GREY, linewidth=0.8)
    axes[0].set(xlabel="step", ylabel="loss / loss of a model that knows nothing")
    if evaluations:
        axes[1].set(xlabel="step", ylabel=evaluations[0])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save(figure, path)


def curves(arm: ComparedArm, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps [n] at which all seeds have a number, and the numbers [seeds, n]."""
    by_seed = [_points(run.rows, name) for run in arm.arm.runs.values()]
    steps = sorted(set.intersection(*(set(points) for points in by_seed)))
    return np.array(steps), np.array([[points[step] for step in steps] for points in by_seed], float)


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows if name in row}


def _draw(axes: Any, steps: np.ndarray, values: np.ndarray, look: Mapping[str, str], label: str) -> None:
    """Draws [seeds, n] as a line and a band."""
    if not len(steps):
        return
    mean = values.mean(axis=0)
    marker = "o" if len(steps) < 20 else None
    axes.plot(steps, mean, label=label, marker=marker, markersize=3, linewidth=1.2, **look)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axes.fill_between(steps, mean - error, mean + error, color=look["color"], alpha=0.15, linewidth=0)
