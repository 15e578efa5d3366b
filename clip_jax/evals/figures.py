"""Figures of a run, as PNG files. Written under another name and renamed, so a reader never sees half a file.

Matplotlib is used through its objects, never pyplot: no global state, no display. It is imported when a figure is
drawn.
"""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.files import appearing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any

# Distinguishable without colour vision (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#777777"
SERIES = (ORANGE, GREEN, RED, BLUE)
CAPTION_LINES = 5  # as many as are as high as an image


def plot_training(rows: Sequence[Mapping[str, Any]], path: Path, *, chance_loss: float, title: str) -> None:
    """Draws loss (left) and accuracies (right) over the steps.

    Args:
      rows: as `metrics.read` returns them; a key may be missing anywhere.
      path: the PNG.
      chance_loss: drawn as a line.
      title: of the figure.
    """
    figure = new_figure(10.0, 4.0)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    steps, loss = _curve(rows, "loss")
    left.plot(steps, loss, color=BLUE, linewidth=0.8, alpha=0.4)
    left.plot(steps, smooth(loss), color=BLUE, marker=_marker(loss), label="loss")
    steps, loss = _curve(rows, "held_out/loss")
    if len(steps):
        left.plot(steps, loss, color=ORANGE, marker="o", markersize=4, label="held-out pairs")
    left.axhline(chance_loss, color=GREY, linestyle="--", label=f"chance, {chance_loss:.2f}")
    left.set(xlabel="step", ylabel="contrastive loss")

    steps, accuracy = _curve(rows, "accuracy")
    right.plot(steps, smooth(accuracy), color=BLUE, marker=_marker(accuracy), label="in the batch")
    names = sorted({key for row in rows for key in row if key.startswith("zero_shot/") and key.endswith("/top1")})
    for i, name in enumerate(names):
        steps, values = _curve(rows, name)
        label = "zero-shot, prompts " + name.removeprefix("zero_shot/").removesuffix("/top1")
        right.plot(steps, values, color=SERIES[i % len(SERIES)], marker="osD^"[i % 4], markersize=4, label=label)
    right.set(xlabel="step", ylabel="accuracy", ylim=(-0.03, 1.03))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def plot_retrieval(captions: Sequence[str], images: np.ndarray, hits: np.ndarray, path: Path, *, title: str) -> None:
    """Draws a row for each caption with the images found for it, best first; a wrong one is framed and crossed.

    Args:
      captions: q texts.
      images: uint8 [q, k, h, w, 3].
      hits: bool [q, k], whether the image is right.
      path: the PNG.
      title: of the figure.
    """
    rows, columns = hits.shape
    figure = new_figure(3.2 + 0.75 * columns, 0.6 + 0.75 * rows)
    figure.suptitle(title)
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[4, *[1] * columns])
    for i, caption in enumerate(captions):
        text = figure.add_subplot(grid[i, 0])
        text.axis("off")
        shown = textwrap.fill(caption, 38, max_lines=CAPTION_LINES, placeholder=" …")
        text.text(1, 0.5, shown, ha="right", va="center", fontsize=9)
        for j in range(columns):
            _draw_found(figure.add_subplot(grid[i, j + 1]), images[i, j], right=bool(hits[i, j]))
    save(figure, path)


def plot_confusion(matrix: np.ndarray, classes: Sequence[str], path: Path, *, title: str) -> None:
    """Draws how often each class was taken for which; counts are written in where they fit.

    Args:
      matrix: int [c, c], by (true class, class found).
      classes: c names.
      path: the PNG.
      title: of the figure.
    """
    count = len(classes)
    side = min(12.0, 2 + 0.42 * count)
    figure = new_figure(side + 0.6, side)
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="class found", ylabel="true class")
    if count <= 30:
        axes.set_xticks(range(count), classes, rotation=45, ha="right")
        axes.set_yticks(range(count), classes)
        for (true, found), number in np.ndenumerate(matrix):
            if number:
                colour = "white" if share[true, found] > 0.5 else "black"
                axes.text(found, true, str(number), ha="center", va="center", color=colour, fontsize=8)
    save(figure, path)


def plot_typographic(curve: Sequence[Mapping[str, float]], clean: float, path: Path, *, title: str) -> None:
    """Draws accuracy over the size of what is written on the images, beside an empty strip of the same size.

    Args:
      curve: by size, shares of images: `blank` and `wrong` right, `wrong_taken` taken for what is written.
      clean: accuracy on the images as they are.
      path: the PNG.
      title: of the figure.
    """
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    sizes = [point["size"] for point in curve]
    lines = (
        ("blank", BLUE, "s", "right, with an empty strip"),
        ("wrong", RED, "o", "right, with a wrong word on it"),
        ("wrong_taken", ORANGE, "^", "taken for that word"),
    )
    axes.axhline(clean, color=GREY, linestyle="--", label="right, as they are")
    for name, colour, marker, label in lines:
        axes.plot(sizes, [point[name] for point in curve], color=colour, marker=marker, label=label)
    axes.set(title=title, xlabel="height of the strip / height of the image", ylabel="share of images")
    axes.set(ylim=(-0.03, 1.03), xticks=sizes)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _draw_found(axes: Any, image: np.ndarray, *, right: bool) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    if not right:
        axes.plot([0, 1], [0, 1], color=RED, linewidth=1.5, transform=axes.transAxes)
    for spine in axes.spines.values():
        spine.set(color=GREEN if right else RED, linewidth=2, linestyle="-" if right else ":")


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the points, narrower at the ends."""
    half = len(values) // 40
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _marker(values: np.ndarray) -> str | None:
    return "o" if len(values) == 1 else None  # a line through one point has no length


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=120, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG.

    Raises:
      UserError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a caption with two dollars is no formula
        text.set_parse_math(False)
    try:
        with appearing(path) as temporary, warnings.catch_warnings():
            # Letters that the font lacks are drawn as boxes; a line for each of them on stderr says no more.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            FigureCanvasAgg(figure).print_png(temporary)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
