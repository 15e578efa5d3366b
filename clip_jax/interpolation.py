"""Weights between two models of one shape: WiSE-FT (Wortsman et al., 2022), and the curve of what lies between.

A model fine-tuned from another is often better in between than at either end, and keeps more of what the first could do
elsewhere. Every parameter is interpolated, logit_scale and a ResNet's running statistics too.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from clip_jax.config import RunConfig
from clip_jax.errors import UserError
from clip_jax.evals.evaluation import Evaluation, scalars
from clip_jax.evals.figures import SERIES, new_figure, save
from clip_jax.interop.names import WeightsError
from clip_jax.interop.read import check_same_model
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP
from clip_jax.partition import make_mesh, replicated

Curve = dict[float, dict[str, float]]
"""By α, the evaluation's numbers by name."""


def interpolate(first: Weights, second: Weights, alpha: float) -> Weights:
    """Returns (1 - alpha) · first + alpha · second; an alpha of 0 or 1 gives the very bits of that model.

    Args:
      first: the model that `second` was fine-tuned from.
      second: of the same sizes.
      alpha: from 0 to 1, or beyond to go on in a line.

    Raises:
      WeightsError: models of other sizes, activation or pixels.
    """
    check_same_model(second.config, first.config, "the second model")
    if second.preprocess != first.preprocess:
        raise WeightsError(f"the models see other pixels: {first.preprocess}, {second.preprocess}")

    def mixed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray((1 - alpha) * np.asarray(a, np.float64) + alpha * np.asarray(b, np.float64), np.float32)

    return dataclasses.replace(first, variables=jax.tree.map(mixed, first.variables, second.variables))


def evaluate_curve(first: Weights, second: Weights, alphas: Sequence[float], config: RunConfig) -> Curve:
    """Evaluates the models at each alpha as a run of that config would, with the pixels that they were trained with.

    Args:
      first: as in `interpolate`.
      second: as in `interpolate`.
      alphas: where to evaluate.
      config: for its `eval`, `data.data_dir`, `mesh` and `model.dtype`; the model's sizes are those of the weights.

    Raises:
      UserError: the config names no evaluation, or its dataset is not there.
    """
    model = dataclasses.replace(first.config, dtype=config.model.dtype)
    data = dataclasses.replace(config.data, mean=first.preprocess.mean, std=first.preprocess.std)
    config, mesh = dataclasses.replace(config, model=model, data=data), make_mesh(config.mesh)
    evaluation = Evaluation.open(config, CLIP(model), mesh=mesh)
    if evaluation is None:
        raise UserError("config.eval.dataset is empty; a curve needs what the models are evaluated on")
    curve: Curve = {}
    for alpha in alphas:
        variables = jax.device_put(interpolate(first, second, alpha).variables, replicated(mesh))
        curve[alpha] = scalars(evaluation.run(variables))
    return curve


def curve_rows(curve: Curve) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows of a table; the best of each column is marked with a star."""
    names = list(next(iter(curve.values())))
    best = {name: max(values[name] for values in curve.values()) for name in names}
    rows = [
        [f"{alpha:g}", *(f"{values[name]:.4f}{' *' if values[name] == best[name] else ''}" for name in names)]
        for alpha, values in curve.items()
    ]
    return ["alpha", *names], rows


def write_curve(curve: Curve, out: Path, *, sources: Mapping[str, str]) -> None:
    """Writes `interpolation.json` and `interpolation.png` into a folder.

    Args:
      curve: as `evaluate_curve` gives it.
      out: made if it is not there.
      sources: where the two models came from, by name.

    Raises:
      UserError: they cannot be written.
    """
    values = {"models": dict(sources), "curve": [{"alpha": alpha, **found} for alpha, found in curve.items()]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "interpolation.json").write_text(json.dumps(values, indent=2) + "\n")
        _plot(curve, out / "interpolation.png", title=" to ".join(sources.values()))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None


def _plot(curve: Curve, path: Path, *, title: str) -> None:
    figure = new_figure(5.5, 4.0)
    axes = figure.subplots()
    for number, name in enumerate(next(iter(curve.values()))):
        values = [found[name] for found in curve.values()]
        axes.plot(list(curve), values, marker="o", markersize=4, color=SERIES[number % len(SERIES)], label=name)
    axes.set(xlabel="alpha", title=title)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
