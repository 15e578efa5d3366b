"""Exports that prove themselves: written aside, read back, compared with the original, and only then put in place.

The comparison runs both sides on one fixed input: ours as read back and, where it is installed, the library that the
layout is for. The folder appears whole, with its model card, or not at all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.data.images import normalize
from clip_jax.errors import UserError, did_you_mean, one_line
from clip_jax.files import new_folder
from clip_jax.interop import judges
from clip_jax.interop.hugging_face import read_hugging_face, write_hugging_face
from clip_jax.interop.model_card import write_model_card
from clip_jax.interop.names import WeightsError
from clip_jax.interop.open_clip import read_open_clip, write_open_clip
from clip_jax.interop.openai import read_openai, write_openai
from clip_jax.interop.stablehlo import read_stablehlo, write_stablehlo
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, forward

BOUND = 1e-4
"""The largest difference of unit features with which an export is kept."""

_OPENAI_FILE = "model.pt"

Features = tuple[np.ndarray, np.ndarray]
Comparison = tuple[str, float]


class _Layout(NamedTuple):
    """How a layout is written into a folder, what we compute from the folder, and what its own library does."""

    write: Callable[[Path, Weights, "Classes | None"], None]
    run: Callable[[Path, "_Input"], Features]
    judge: judges.Judge


class Classes(NamedTuple):
    """Names, and for each a row of the zero-shot classifier: float [c, e], unit length."""

    names: tuple[str, ...]
    weights: np.ndarray


class _Input(NamedTuple):
    """The fixed input: pixels uint8 [b, s, s, 3], tokens int32 [b, l]."""

    pixels: np.ndarray
    tokens: np.ndarray


def export(
    weights: Weights, folder: Path, layout: str, *, source: str, classes: Classes | None = None
) -> list[Comparison]:
    """Writes a model in another project's layout, with a model card.

    Args:
      weights: the model.
      folder: must not exist; it appears only when all is written and compared.
      layout: one of LAYOUTS.
      source: where the weights came from, for the card.
      classes: what a `stablehlo` export can tell apart by itself.

    Returns:
      (what read the export, the largest difference of its unit features from the original's).

    Raises:
      UserError: the folder exists or cannot be written, the layout cannot hold this model or these classes, or a
        difference is above BOUND.
    """
    if layout not in LAYOUTS:
        raise UserError(f"no layout {layout!r}{did_you_mean(layout, LAYOUTS)} (layouts: {', '.join(LAYOUTS)})")
    if classes is not None and layout != "stablehlo":
        raise UserError(f"the layout {layout} has no place for classes; only stablehlo has")
    with new_folder(folder) as partial:
        LAYOUTS[layout].write(partial, weights, classes)
        comparisons = _compare(weights, partial, LAYOUTS[layout])
        write_model_card(partial, weights, layout=layout, source=source, comparisons=comparisons)
    return comparisons


def features_of(weights: Weights, given: _Input) -> Features:
    """Returns the unit features of the images and the texts, in float32 at the highest precision."""
    images = jnp.asarray(normalize(given.pixels, weights.preprocess))
    with jax.default_matmul_precision("highest"):
        output = jax.jit(forward, static_argnums=0)(
            CLIP(weights.config), weights.variables, images, jnp.asarray(given.tokens)
        )
    return np.asarray(output.image), np.asarray(output.text)


def _compare(weights: Weights, folder: Path, layout: _Layout) -> list[Comparison]:
    given = _fixed_input(weights)
    original = features_of(weights, given)
    comparisons = [("clip_jax", _difference(original, layout.run(folder, given)))]
    verdict = _judged(weights, folder, layout, given)
    if verdict is not None:
        comparisons.append((verdict.library, _difference(original, (verdict.image, verdict.text))))
    for reader, difference in comparisons:
        if not difference <= BOUND:
            raise WeightsError(
                f"the export is not the original: read by {reader}, its unit features differ by {difference:.1e}, more "
                f"than {BOUND:.0e}; nothing was kept"
            )
    return comparisons


def _judged(weights: Weights, folder: Path, layout: _Layout, given: _Input) -> judges.Verdict | None:
    images = np.asarray(normalize(given.pixels, weights.preprocess))
    try:
        return layout.judge(folder, images, given.tokens)
    except Exception as error:  # of whatever kind the other library raises
        raise WeightsError(
            f"the library that this layout is for cannot read the export: {one_line(error)}; nothing was kept"
        ) from error


def _difference(a: Features, b: Features) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def _fixed_input(weights: Weights, *, batch: int = 2) -> _Input:
    """Noise images, and texts of random ids that end at different places."""
    rng = np.random.default_rng(0)
    size, text = weights.config.vision.image_size, weights.config.text
    tokens = rng.integers(1, text.vocab_size - 2, (batch, text.context), np.int32)
    tokens[:, 0] = text.vocab_size - 2
    for row, end in zip(tokens, rng.integers(1, text.context, batch), strict=True):
        row[end], row[end + 1 :] = text.vocab_size - 1, 0
    return _Input(rng.integers(0, 256, (batch, size, size, 3), np.uint8), tokens)


def _write_stablehlo(folder: Path, weights: Weights, classes: Classes | None) -> None:
    names, rows = classes or (None, None)
    model = CLIP(weights.config)
    write_stablehlo(folder, model, weights.variables, preprocess=weights.preprocess, classes=names, class_weights=rows)


def _run_stablehlo(folder: Path, given: _Input) -> Features:
    exported = read_stablehlo(folder)
    return np.asarray(exported.encode_image(given.pixels)), np.asarray(exported.encode_text(given.tokens))


LAYOUTS = {
    "openai": _Layout(
        lambda folder, weights, _: write_openai(folder / _OPENAI_FILE, weights),
        lambda folder, given: features_of(read_openai(folder / _OPENAI_FILE), given),
        lambda folder, images, tokens: judges.judge_openai(folder / _OPENAI_FILE, images, tokens),
    ),
    "open_clip": _Layout(
        lambda folder, weights, _: write_open_clip(folder, weights),
        lambda folder, given: features_of(read_open_clip(folder), given),
        judges.judge_open_clip,
    ),
    "hugging_face": _Layout(
        lambda folder, weights, _: write_hugging_face(folder, weights),
        lambda folder, given: features_of(read_hugging_face(folder), given),
        judges.judge_hugging_face,
    ),
    "stablehlo": _Layout(
        _write_stablehlo,
        _run_stablehlo,
        lambda folder, images, tokens: None,
    ),
}
