"""Pictures of answers: a contact sheet of what was found, and an image beside its labels or captions."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data.images import decode
from clip_jax.evals.figures import BLUE, GREY, new_figure, save
from clip_jax.search.query import Hit

_COLUMNS = 6
_MOST_HITS, _MOST_IMAGES, _MOST_BARS = 96, 50, 20
"""The layout's time grows with the square of what is drawn, and a PNG has at most 65,535 rows."""
_BAR_LABEL = 44


def draw_sheet(hits: Sequence[Hit], path: Path, *, title: str, query: np.ndarray | None = None) -> None:
    """Draws what was found as a grid, the 96 best first, each with its score and its caption or key.

    Args:
      hits: of one query.
      path: the PNG.
      title: of the figure.
      query: the image that was asked with, uint8 [h, w, 3]; it is drawn first.
    """
    hits = hits[:_MOST_HITS]
    cells = len(hits) + (query is not None)
    columns = min(_COLUMNS, max(cells, 1))
    rows = max(-(-cells // columns), 1)
    figure = new_figure(1.6 * columns + 0.4, 2.05 * rows + 0.6)
    figure.suptitle(_short(title, 26 * columns))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    places = iter(grid.flat)
    if query is not None:
        _draw(next(places), query, "the query", colour=BLUE)
    for axes, hit in zip(places, hits, strict=False):
        label = _short(hit.item.caption or hit.item.key, 40)
        _draw(axes, _pixels(hit), f"{hit.score:.3f}  {textwrap.fill(label, 22)}", colour=None)
    save(figure, path)


def draw_bars(
    images: Sequence[np.ndarray],
    names: Sequence[str],
    labels: Sequence[Sequence[str]],
    values: Sequence[Sequence[float]],
    path: Path,
    *,
    axis: str,
) -> None:
    """Draws each image beside its first 20 bars.

    Args:
      images: uint8 [h, w, 3] each; 50 are drawn.
      names: of the images.
      labels: of each image's bars, longest first.
      values: of each image's bars, from 0 to 1.
      path: the PNG.
      axis: what the values are.
    """
    drawn = min(len(images), _MOST_IMAGES)
    bars = min(max(map(len, labels)), _MOST_BARS)
    rows = (column[:drawn] for column in (images, names, labels, values))
    figure = new_figure(9.0, (0.9 + max(1.6, 0.3 * bars)) * drawn)
    grid = figure.subplots(drawn, 2, squeeze=False, width_ratios=[1, 2])
    for (left, right), image, name, texts, shares in zip(grid, *rows, strict=True):
        texts, shares = texts[:bars], shares[:bars]
        left.axis("off")
        _draw(left, image, _short(name, 40), colour=None)
        places = range(len(texts), 0, -1)
        right.barh(places, shares, color=BLUE, height=0.7)
        right.set_yticks(places, [_short(text, _BAR_LABEL) for text in texts], fontsize=8)
        right.set(xlim=(0, 1.12), ylim=(0.4, len(texts) + 0.6), xlabel=axis)
        right.spines[["top", "right"]].set_visible(False)
        for place, share in zip(places, shares, strict=True):
            right.text(max(share, 0) + 0.01, place, f"{share:.3f}", va="center", fontsize=8)
    save(figure, path)


def _draw(axes: Any, image: np.ndarray | None, text: str, *, colour: str | None) -> None:
    if image is None:
        axes.text(0.5, 0.5, "no picture kept", ha="center", va="center", color=GREY, fontsize=7)
    else:
        # Thumbnails smaller than their place, such as scans of 8 x 8 pixels, are shown as they are.
        axes.imshow(image, interpolation="nearest" if max(image.shape) <= 64 else "antialiased")
    if colour is not None:
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=3)
    axes.set_title(text, fontsize=7)


def _pixels(hit: Hit) -> np.ndarray | None:
    return None if hit.item.thumbnail is None else decode(hit.item.thumbnail)


def _short(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …") if " " in text else text[-width:]
