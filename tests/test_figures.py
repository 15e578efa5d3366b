"""Figures: what must be seen is in the pixels, and a figure that fails leaves nothing."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image
from tiny import TINY

from clip_jax.config import LossConfig
from clip_jax.errors import OutageError, UserError
from clip_jax.evals.evaluation import Evaluated, RetrievalSheet
from clip_jax.evals.figures import BLUE, GREEN, RED, plot_confusion, plot_retrieval, plot_training
from clip_jax.evals.zero_shot import ZeroShotResult, wilson_interval
from clip_jax.run import report


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def share_of(path, colour) -> float:
    """Share of the pixels with a colour, given as #rrggbb or (r, g, b)."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)] if isinstance(colour, str) else colour
    return float((np.abs(pixels(path).astype(int) - rgb).max(axis=-1) <= 2).mean())


def near(path, colour) -> np.ndarray:
    """Positions [n, 2] of the pixels of a colour."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere(np.abs(pixels(path).astype(int) - rgb).max(axis=-1) <= 2)


def rows(steps: int, names=("loss", "accuracy")) -> list[dict]:
    found = [{"step": step} | dict.fromkeys(names, 1 / step) for step in range(1, steps + 1)]
    return [*found, {"step": steps, "zero_shot/photo/top1": 0.5}]


@pytest.mark.parametrize("data", [rows(300), rows(1), rows(5, names=("loss",)), [{"step": 1, "other": 3.0}]])
def test_training_draws_whatever_is_there(tmp_path, data):
    plot_training(data, tmp_path / "training.png", chance_loss=3.0, title="a run with $ign")
    height, width, _ = pixels(tmp_path / "training.png").shape
    assert (height, width) == (480, 1200)
    assert [path.name for path in tmp_path.iterdir()] == ["training.png"]


def test_a_runs_figure_has_the_chance_loss_of_its_kind(tmp_path, monkeypatch):
    """The best that one logit for all 32² terms can give: ln 32, or of the sigmoid's -ln 1/32 - 31 ln 31/32."""
    drawn = []
    monkeypatch.setattr(report, "plot_training", lambda *_, chance_loss, **__: drawn.append(chance_loss))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for kind in ("softmax", "sigmoid"):
        report.report_training(tmp_path, dataclasses.replace(TINY, loss=LossConfig(kind=kind)))
    assert drawn == pytest.approx([math.log(32), math.log(32) - 31 * math.log(31 / 32)])


def test_what_zero_shot_json_holds():
    matrix = np.array([[3, 1, 0, 0, 0], *np.eye(5, dtype=np.int64)[1:]])
    result = ZeroShotResult("photo", tuple("abcde"), matrix, 0.9, np.ones(8, bool), np.arange(8))
    assert report._entry(result, {"photo": ("a {}",), "other": ("{}",)}) == {
        "prompts": "photo",
        "templates": ["a {}"],
        "images": 8,
        "acc1": 0.875,
        "acc1_interval": list(wilson_interval(0.875, 8)),
        "acc5": 0.9,
        "mean_per_class_recall": pytest.approx(0.95),
        "confusion": matrix.tolist(),
        "classes": list("abcde"),
    }


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    """A folder in a file's place, as a full disk; a store that does not answer any more."""

    def images():
        raise OutageError("the store does not answer")

    (tmp_path / "zero_shot.json").mkdir()
    result = ZeroShotResult("photo", ("a", "b"), np.eye(2, dtype=np.int64), math.nan, np.ones(2, bool), np.arange(2))
    sheet = RetrievalSheet(("a", "b"), images, np.ones((2, 1), bool))
    report.report_zero_shot(tmp_path, Evaluated((result,), None), sheet, templates={"photo": ("{}",)})
    assert {path.name for path in tmp_path.iterdir()} == {"zero_shot.json", "confusion.png"}
    assert "zero_shot.json was not written: IsADirectoryError" in caplog.text
    assert "retrieval.png was not written: OutageError: the store does not answer" in caplog.text


def test_a_single_step_can_be_seen(tmp_path):
    """In the middle of each panel, beside the legends, whose samples have the same colour."""
    plot_training([{"step": 1, "loss": 1.0, "accuracy": 0.5}], tmp_path / "t.png", chance_loss=3.0, title="")
    columns = near(tmp_path / "t.png", BLUE)[:, 1]
    for middle in (330, 930):
        assert (np.abs(columns - middle) < 30).sum() > 10


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    data = [{"step": step, "loss": loss} for step, loss in enumerate([3.0, float("nan"), float("inf"), 2.0], 1)]
    plot_training(data, tmp_path / "t.png", chance_loss=3.0, title="")


def test_names_with_dollars_are_no_formulas_and_any_letters_are_drawn(tmp_path):
    names = [r"$\bad$", "from $5 to $6 猫"]
    plot_confusion(np.eye(2, dtype=int), names, tmp_path / "c.png", title=r"$\frac$")
    plot_training(
        rows(2) + [{"step": 2, r"zero_shot/$\x$/top1": 0.5}], tmp_path / "t.png", chance_loss=1.0, title=names[0]
    )
    images = np.zeros((1, 1, 4, 4, 3), np.uint8)
    plot_retrieval(names[:1], images, np.ones((1, 1), bool), tmp_path / "r.png", title=names[0])


def test_a_long_caption_stays_in_its_row(tmp_path):
    """Between the two rows' ink, left of the images, there is white."""
    images = np.full((2, 3, 4, 4, 3), 128, np.uint8)
    plot_retrieval(["many words " * 40] * 2, images, np.ones((2, 3), bool), tmp_path / "r.png", title="")
    ink = (pixels(tmp_path / "r.png")[:, :300] < 200).any(axis=(1, 2))
    starts = np.flatnonzero(np.diff(np.flatnonzero(ink)) > 12)
    assert len(starts) == 1


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
    with pytest.raises(UserError, match=r"no/c\.png cannot be written: No such file or directory"):
        plot_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "no" / "c.png", title="t")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(UserError, match=r"c\.png cannot be written: Is a directory"):
        plot_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "c.png", title="t")
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
