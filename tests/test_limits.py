"""Typographic attack, word order, groups, phrasing: on models whose answer is known, and on real photographs."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.composed import Written, draw_pairs, side_by_side, write_word
from clip_jax.data.images import Preprocess, eval_image
from clip_jax.data.photographs import Photographs
from clip_jax.errors import UserError
from clip_jax.evals import limits
from clip_jax.evals.embedding import ImageFeatures
from clip_jax.evals.evaluator import Evaluator
from clip_jax.evals.job import EvalJob
from clip_jax.evals.limits import SIZES, groups, phrasing, typographic, word_order
from clip_jax.evals.tasks import evaluate
from clip_jax.evals.zero_shot import wilson_interval

NAMES = ("apple", "banana", "cherry", "damson", "elder")
COLOURS = np.random.default_rng(0).integers(30, 200, (len(NAMES), 3))
PREPROCESS = Preprocess(size=64)


@pytest.fixture(scope="module")
def plates(tmp_path_factory):
    """Three plates of each class's colour."""
    root = tmp_path_factory.mktemp("plates")
    for name, colour in zip(NAMES, COLOURS.tolist(), strict=True):
        (root / name).mkdir()
        for number in range(3):
            Image.new("RGB", (64, 64), tuple(colour)).save(root / name / f"{number}.png")
    return root


class Known(Evaluator):
    """An evaluator whose features are computed by functions of a picture and of a text."""

    def __init__(self, see, read):
        self._see, self._read, self.preprocess = see, read, PREPROCESS

    def images(self, source, *, kind="unit"):
        records = [source[number] for number in range(len(source))]
        pixels = [eval_image(record.image, PREPROCESS) for record in records]
        labels = np.array([record.label for record in records], np.int32)
        features = np.stack([self._see(each) for each in pixels]).astype(np.float32)
        return ImageFeatures(features, labels, np.arange(len(records), dtype=np.int32))

    embed = images

    def texts(self, texts):
        return np.stack([self._read(text) for text in texts]).astype(np.float32)


def one_hot(label):
    return np.eye(len(NAMES))[label]


def colour_of(pixels):
    """The class whose colour a plate has, by its upper left corner."""
    return int(np.abs(COLOURS - pixels[0, 0]).sum(axis=1).argmin())


def named_in(text):
    """The first class that a text names."""
    found = [(text.find(name), label) for label, name in enumerate(NAMES) if name in text]
    return min(found)[1]


def reading(pixels):
    """Believes what is written on a picture, at any size, and its colour only where nothing is."""
    for size in SIZES:
        for label, name in enumerate(NAMES):
            if np.array_equal(write_word(pixels, name, size=size), pixels):
                return one_hot(label)
    return one_hot(colour_of(pixels))


def test_one_who_believes_what_is_written_is_fooled_and_a_strip_alone_fools_nobody(plates):
    found = typographic(Known(reading, lambda text: one_hot(named_in(text))), EvalJob(str(plates), task="typographic"))
    assert found.metrics == {
        "acc1": 1.0,
        "acc1_blank": 1.0,
        "acc1_attacked": 0.0,
        "accuracy_drop": 1.0,
        "taken_for_the_word": 1.0,
    }
    assert [point["size"] for point in found.details["curve"]] == list(SIZES)


def test_one_who_cannot_read_is_not_fooled(plates):
    found = typographic(
        Known(lambda pixels: one_hot(colour_of(pixels)), lambda text: one_hot(named_in(text))),
        EvalJob(str(plates), task="typographic"),
    )
    assert found.metrics["accuracy_drop"] == found.metrics["taken_for_the_word"] == 0


def test_of_one_class_there_is_no_wrong_word(plates, half_blind, tmp_path):
    (tmp_path / "apple").symlink_to(plates / "apple")
    with pytest.raises(UserError, match="has one class; what is written on its images must be another's name"):
        typographic(half_blind, EvalJob(str(tmp_path), task="typographic"))


def test_words_fit_on_their_strip():
    pixels = np.full((64, 64, 3), 90, np.uint8)
    for word in ("x", "banana", "an exceedingly long name of a class"):
        for size in SIZES:
            written = write_word(pixels, word, size=size)
            strip = round(size * 64)
            np.testing.assert_array_equal(written[: 64 - strip], pixels[: 64 - strip])
            inside = written[64 - strip :, 1:-1]
            assert inside.min() < 128  # something is written
            inked = np.nonzero((inside < 128).any(axis=(1, 2)))[0]
            assert abs(inked[0] - (strip - 1 - inked[-1])) <= 1  # in the middle of its height
            assert len(word) > 20 or written[64 - strip :, [0, -1]].min() > 128  # and nothing cut
    np.testing.assert_array_equal(write_word(pixels, "", size=0.25)[48:], np.full((16, 64, 3), 255))
    assert pixels.min() == pixels.max() == 90


def test_the_word_is_never_the_right_one_and_always_the_same(plates):
    from clip_jax.data.labelled import open_labelled

    written = Written(open_labelled(str(plates)), NAMES, preprocess=PREPROCESS, size=0.2, kind="wrong")
    attacks = [written.attack(index, index % 5) for index in range(200)]
    assert all(attack != index % 5 for index, attack in enumerate(attacks))
    assert set(attacks) == set(range(5))
    assert attacks == [written.attack(index, index % 5) for index in range(200)]
    np.testing.assert_array_equal(written[3].image, written[3].image)

    def other(**changed):
        given = {"words": NAMES, "preprocess": PREPROCESS, "size": 0.2, "kind": "wrong"} | changed
        return Written(open_labelled(str(plates)), **given)

    assert attacks != [other(seed=1).attack(index, index % 5) for index in range(200)]
    changes = ({}, {"seed": 1}, {"size": 0.3}, {"kind": "blank"}, {"words": NAMES[::-1]})
    kept_by = [str(other(**changed).fingerprint) for changed in changes]  # features of one are none of another
    assert len(set(kept_by)) == len(kept_by)


def halves(pixels):
    """What is left and right in a picture of two plates."""
    return colour_of(pixels[20:, 4:]), colour_of(pixels[20:, 36:])


def bag_of_words(text):
    return sum(one_hot(label) for label, name in enumerate(NAMES) if name in text)


def test_a_bag_of_words_knows_the_objects_and_no_order(plates):
    known = Known(lambda pixels: sum(one_hot(label) for label in halves(pixels)), bag_of_words)
    found = word_order(known, EvalJob(str(plates), task="word_order"))
    assert found.metrics == {"word_order_acc": 0.5, "object_acc": 1.0}
    assert found.details["images"] == 15 * 12


def test_one_who_knows_the_order(plates):
    def ordered(labels):
        return np.concatenate([one_hot(labels[0]), one_hot(labels[1])])

    def read(text):
        places = sorted((text.find(name), label) for label, name in enumerate(NAMES) if name in text)
        return ordered([label for _, label in places])

    found = word_order(Known(lambda pixels: ordered(halves(pixels)), read), EvalJob(str(plates), task="word_order"))
    assert found.metrics == {"word_order_acc": 1.0, "object_acc": 1.0}


def test_captions_that_the_user_swapped(plates, tmp_path):
    table = tmp_path / "pairs.csv"
    rows = [f"{plates}/{name}/0.png,{name} first,{NAMES[0]} first" for name in NAMES[1:]]
    table.write_text("image,caption,swapped\n" + "\n".join(rows) + "\n")
    known = Known(lambda pixels: one_hot(colour_of(pixels)), lambda text: one_hot(named_in(text)))
    found = word_order(known, EvalJob(str(table), task="word_order"))
    assert (found.metrics, found.details["images"]) == ({"word_order_acc": 1.0}, 4)


def test_pairs_are_of_different_classes_and_none_is_there_twice():
    labels = [0] * 50 + [1] * 50
    for count in (100, 4_000, 10_000):
        pairs = draw_pairs(labels, count=count)
        assert len(set(pairs)) == len(pairs) == min(count, 5_000)
        assert all(labels[pair.left] == pair.left_label != pair.right_label == labels[pair.right] for pair in pairs)
    assert len(draw_pairs([0] * 990 + [1] * 10, count=500)) == 500
    assert draw_pairs([1, 1], count=5) == []


def test_two_pictures_side_by_side():
    left, right = np.full((8, 8, 3), 10, np.uint8), np.full((8, 8, 3), 200, np.uint8)
    square = side_by_side([left, right])
    assert square[4, :, 0].tolist() == [10] * 4 + [200] * 4
    assert set(square[0, :, 0].tolist()) == {127}


@pytest.fixture
def half_blind():
    """Takes damsons and elders for apples."""
    return Known(lambda pixels: one_hot(colour_of(pixels) % 3 % 3 if colour_of(pixels) < 3 else 0), bag_of_words)


def test_the_gap_between_groups(plates, half_blind, tmp_path):
    seen = "\n".join(["seen"] * 9 + ["unseen"] * 6)
    (tmp_path / "g.txt").write_text(seen, encoding="utf-8-sig")
    job = EvalJob(str(plates), task="groups", groups=str(tmp_path / "g.txt"))
    found = groups(half_blind, job)
    assert found.metrics == {"acc1": 0.6, "gap": 1.0, "acc1/seen": 1.0, "acc1/unseen": 0.0}
    (low, _), (_, high) = wilson_interval(1.0, 9), wilson_interval(0.0, 6)
    assert found.intervals["gap"] == pytest.approx((1 - math.hypot(1 - low, high), 1.0))
    assert found.details["groups"] == {"seen": 9, "unseen": 6}
    keys = [f"{name}/{number}.png" for name in NAMES for number in range(3)]
    rows = [f"{key},{group}" for key, group in zip(keys, seen.splitlines(), strict=True)]
    (tmp_path / "g.csv").write_text("key,group\n" + "\n".join(rows[::-1]), encoding="utf-8-sig")
    assert groups(half_blind, dataclasses.replace(job, groups=str(tmp_path / "g.csv"))).metrics == found.metrics


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.txt", "a\nb\n", "has 2 lines, and "),
        ("g.txt", "a\n" * 15, "names one group; a gap needs two"),
        ("g.csv", "image,group\nx,y\n", "must have the columns key and group"),
        ("g.csv", "key,group\nk,a\nk,a\nk,b\n", "names two groups for the key k: a, b"),
        ("g.csv", "key,group\napple/0.png,a\n", r"has no group for .*/apple/1\.png \(key apple/1\.png\)"),
        ("gone.txt", None, r"gone\.txt cannot be read"),
    ],
)
def test_groups_that_do_not_fit_are_refused(name, text, message, plates, half_blind, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        groups(half_blind, EvalJob(str(plates), task="groups", groups=str(tmp_path / name)))


def test_phrasing(plates, tmp_path):
    """A text tower that is misled by one template: it takes every fruit that is sold for an apple."""
    (tmp_path / "t.txt").write_text("a {}\n{} for sale\nthe {}\n")

    def read(text):
        return one_hot(0 if "for sale" in text else named_in(text)) + 0.01 * one_hot(named_in(text))

    known = Known(lambda pixels: one_hot(colour_of(pixels)), read)
    found = phrasing(known, EvalJob(str(plates), task="phrasing", templates=str(tmp_path / "t.txt")))
    assert found.metrics == pytest.approx(
        {"acc1": 1, "acc1_best": 1, "acc1_worst": 1, "acc1_mean": 1, "spread": 0, "all_agree": 1}
    )

    def misled(text):
        return one_hot(0 if "for sale" in text else named_in(text)) + 0.5 * one_hot(1) * ("for sale" in text)

    found = phrasing(
        Known(lambda pixels: one_hot(colour_of(pixels)) * 3 - 1, misled),
        EvalJob(str(plates), task="phrasing", templates=str(tmp_path / "t.txt")),
    )
    assert found.metrics["acc1_worst"] == 0.2
    assert found.metrics["acc1_best"] == found.metrics["acc1"] == 1
    assert found.metrics["spread"] == pytest.approx(0.8)
    assert list(found.details["templates"])[-1] == "{} for sale"


def test_photographs_where_no_dataset_is_named(model, model_dir, monkeypatch):
    monkeypatch.setattr(limits, "SIZES", (0.4,))
    monkeypatch.setattr(limits, "PAIRS", 5)
    evaluator = Evaluator(model, str(model_dir), batch=16, threads=2)
    source = Photographs()
    assert len(set(source.classes)) == len(source) >= 2
    for task in ("typographic", "word_order"):
        result = evaluate(evaluator, EvalJob(task=task))
        assert result.dataset == "photographs"
        assert result.details["images"] == (len(source) if task == "typographic" else 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "groups", "dataset": "x"}, "--task=groups needs --groups=file"),
        ({"task": "phrasing"}, "--task=phrasing needs a --dataset"),
    ],
)
def test_jobs_that_say_too_little(values, message):
    with pytest.raises(UserError, match=message):
        EvalJob(**values)


def test_one_template_has_no_spread(plates, half_blind):
    with pytest.raises(UserError, match="phrasing needs several templates, and there is only 'a photo of a {}.'"):
        phrasing(half_blind, EvalJob(str(plates), task="phrasing"))
