"""Figures: what must be seen is in the pixels, and a figure that fails leaves nothing."""

import numpy as np
import pytest
from PIL import Image

from clip_jax.evals.figures import GREEN, RED, plot_confusion, plot_retrieval, plot_training


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def share_of(path, colour) -> float:
    """Share of the pixels with a colour, given as #rrggbb or (r, g, b)."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)] if isinstance(colour, str) else colour
    return float((np.abs(pixels(path).astype(int) - rgb).max(axis=-1) <= 2).mean())


def rows(steps: int, names=("loss", "accuracy")) -> list[dict]:
    found = [{"step": step} | dict.fromkeys(names, 1 / step) for step in range(1, steps + 1)]
    return [*found, {"step": steps, "zero_shot/photo/top1": 0.5}]


@pytest.mark.parametrize("data", [rows(300), rows(1), rows(5, names=("loss",)), [{"step": 1, "other": 3.0}]])
def test_training_draws_whatever_is_there(tmp_path, data):
    plot_training(data, tmp_path / "training.png", chance_loss=3.0, title="a run with $ign")
    height, width, _ = pixels(tmp_path / "training.png").shape
    assert (height, width) == (480, 1200)
    assert [path.name for path in tmp_path.iterdir()] == ["training.png"]


def test_curves_are_where_the_numbers_are(tmp_path):
    """A falling loss: its blue is higher in the left part of the left panel than in the right part."""
    plot_training(rows(200, names=("loss",)), tmp_path / "t.png", chance_loss=3.0, title="")
    blue = np.argwhere((np.abs(pixels(tmp_path / "t.png").astype(int) - [0, 0x72, 0xB2]).max(axis=-1) <= 2)[150:])
    left, right = blue[blue[:, 1] < 150, 0], blue[(blue[:, 1] > 400) & (blue[:, 1] < 560), 0]
    assert left.min() < np.median(right)


def test_retrieval_shows_the_images_and_tells_right_from_wrong(tmp_path):
    colours = np.array([[[200, 30, 40], [10, 20, 220]], [[90, 90, 10], [15, 160, 170]]], np.uint8)
    images = np.broadcast_to(colours[:, :, None, None, :], (2, 2, 8, 8, 3))
    captions = ["a red square", "a caption with $math$ and _much_ more to say than fits on one line of the sheet"]
    path = tmp_path / "retrieval.png"
    plot_retrieval(captions, images, np.array([[True, False], [True, True]]), path, title="found")
    for colour in colours.reshape(-1, 3):
        assert share_of(path, colour) > 0.01
    mixed = share_of(path, RED)
    plot_retrieval(captions, images, np.ones((2, 2), bool), path, title="found")
    assert share_of(path, GREEN) > 0
    assert share_of(path, RED) == 0 < mixed


def test_confusion_is_dark_where_images_are(tmp_path):
    path = tmp_path / "confusion.png"
    plot_confusion(np.diag([3, 4]), ["ant", "bee"], path, title="t")
    diagonal = share_of(path, (8, 48, 107))  # the map's darkest blue
    plot_confusion(np.array([[3, 0], [4, 0]]), ["ant", "bee"], path, title="t")
    assert share_of(path, (8, 48, 107)) == pytest.approx(diagonal, rel=0.1)
    plot_confusion(np.array([[1, 1], [2, 2]]), ["ant", "bee"], path, title="t")
    assert share_of(path, (8, 48, 107)) == 0
    plot_confusion(np.eye(100, dtype=int), [str(i) for i in range(100)], path, title="many classes")


def test_a_figure_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        plot_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "no" / "c.png", title="t")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(OSError, match="c.png"):
        plot_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "c.png", title="t")
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
