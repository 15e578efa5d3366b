"""The embedded dataset: what is in it, that nothing held out leaks into training, and how it is built."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from devices import outputs

from clip_jax.data import build
from clip_jax.data.build import build_dataset, ensure_dataset
from clip_jax.data.digits.captions import CLASSES, TRAIN_TEMPLATES, UNSEEN_TEMPLATES, caption
from clip_jax.data.images import decode
from clip_jax.data.tfds_source import TfdsSource, _feature, find_dataset
from clip_jax.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def splits(digits_dir):
    """Split -> all records."""
    sources = {
        split: TfdsSource("digits", split, data_dir=str(digits_dir), label_key="label") for split in ("train", "test")
    }
    return {split: [source[i] for i in range(len(source))] for split, source in sources.items()}


# Captions


def test_wordings_are_many_and_held_out_ones_are_never_trained():
    assert len(set(TRAIN_TEMPLATES)) == len(TRAIN_TEMPLATES) >= 24
    assert len(set(UNSEEN_TEMPLATES)) == len(UNSEEN_TEMPLATES) >= 8
    assert not set(TRAIN_TEMPLATES) & set(UNSEEN_TEMPLATES)


def test_each_unseen_wording_has_words_that_training_never_sees():
    def words(template):
        return set(re.findall(r"[a-z]+", template))

    trained = set().union(*map(words, TRAIN_TEMPLATES))
    for template in UNSEEN_TEMPLATES:
        assert {word for word in words(template) - trained if len(word) > 3}, template


@pytest.mark.parametrize("template", TRAIN_TEMPLATES + UNSEEN_TEMPLATES)
def test_a_wording_names_its_digit_and_no_other(template):
    assert template.count("{}") == 1
    around = template.replace("{}", " ")
    assert not re.search(r"\d", around)
    assert not {word for word in re.findall(r"[a-z]+", around) if word.endswith(CLASSES)}
    assert caption(template, 7, word=True) == template.replace("{}", "seven")
    assert caption(template, 7, word=False) == template.replace("{}", "7")


def test_the_digit_stands_in_front_in_the_middle_and_at_the_end():
    front = {template for template in TRAIN_TEMPLATES if template.startswith("{} ")}
    end = {template for template in TRAIN_TEMPLATES if template.endswith(" {}")}
    assert min(len(front), len(end), len(set(TRAIN_TEMPLATES) - front - end)) >= 3


# Records


def test_counts(splits):
    assert {split: len(records) for split, records in splits.items()} == {"train": 1497 * 6, "test": 300}
    assert Counter(record.image for record in splits["train"]).most_common(1)[0][1] == 6
    assert len({record.image for record in splits["test"]}) == 300


def test_no_held_out_scan_is_in_train(splits):
    """By pixels: a scan that occurs twice in the original must not be on both sides either."""
    pixels = {split: {decode(record.image).tobytes() for record in records} for split, records in splits.items()}
    assert not pixels["train"] & pixels["test"]
    assert len(pixels["train"] | pixels["test"]) == 1797


def test_images_are_the_scans_of_scikit_learn(splits):
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    grey = np.rint(scans * 255 / 16).astype(np.uint8)
    expected = {scan.tobytes(): label for scan, label in zip(grey, labels, strict=True)}
    for record in splits["test"] + splits["train"][::50]:
        image = decode(record.image)
        assert image.shape == (8, 8, 3)
        assert expected[image[..., 0].tobytes()] == record.label
    assert max(decode(record.image).max() for record in splits["test"]) == 255


def test_every_class_is_in_both_splits(splits):
    for records, least in ((splits["train"], 800), (splits["test"], 20)):
        counts = Counter(record.label for record in records)
        assert sorted(counts) == list(range(10))
        assert min(counts.values()) >= least


def test_captions_name_the_class_in_a_wording_of_their_split(splits):
    for split, templates in (("train", TRAIN_TEMPLATES), ("test", UNSEEN_TEMPLATES)):
        known = {
            (label, caption(template, label, word=word)): (template, word)
            for template in templates
            for label in range(10)
            for word in (True, False)
        }
        found = Counter(known[record.label, record.captions[0]] for record in splits[split])
        assert {template for template, _ in found} == set(templates)
        assert 0.4 < sum(count for (_, word), count in found.items() if word) / found.total() < 0.6


def test_the_captions_of_a_scan_are_all_different(splits):
    by_scan = {}
    for record in splits["train"]:
        by_scan.setdefault(record.image, []).append(record.captions)
    assert all(len(set(captions)) == 6 for captions in by_scan.values())


def test_features_and_classes(digits_dir):
    import tensorflow_datasets as tfds

    features = tfds.builder_from_directory(str(find_dataset("digits", str(digits_dir)))).info.features
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    assert kinds == {"image": "Image", "caption": "Text", "label": "ClassLabel", "scan": "Scalar"}
    assert TfdsSource("digits", "test", data_dir=str(digits_dir), label_key="label").classes == CLASSES


# Building


def test_a_dataset_that_is_there_is_not_built_again(digits_dir, monkeypatch):
    monkeypatch.setattr(build, "_build_in_child", lambda *_: pytest.fail("built again"))
    expected = digits_dir / "digits" / "1.0.0"
    assert build_dataset("digits", str(digits_dir)) == expected
    assert ensure_dataset("digits", str(digits_dir)) == expected
    assert ensure_dataset("digits:1.0.0", str(digits_dir)) == expected


def test_building_an_unknown_dataset_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'digits'"):
        build_dataset("digit", str(tmp_path))
    with pytest.raises(UserError, match=r"it builds digits"):
        build_dataset("imagenet", str(tmp_path))


def test_a_dataset_that_is_not_ours_is_found_or_refused_but_not_built(digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_build_in_child", lambda *_: pytest.fail("built"))
    (tmp_path / "pairs").symlink_to(digits_dir / "digits")
    assert ensure_dataset("pairs", str(tmp_path)) == tmp_path / "pairs" / "1.0.0"
    with pytest.raises(UserError, match=r"tfds.builder\('other'"):
        ensure_dataset("other", str(tmp_path))


def test_a_failed_build_says_why_and_leaves_nothing(tmp_path):
    root = tmp_path / "file"
    root.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"preparing 'digits' in .* failed \(exit code 2\): .*cannot make") as caught:
        build_dataset("digits", str(root))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_builds_at_the_same_time_both_succeed_and_are_equal(tmp_path, digits_dir):
    command = [sys.executable, "-m", "clip_jax.data.build", "digits", "--data-dir", str(tmp_path)]
    children = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    printed = outputs(children, timeout=120)
    assert [child.returncode for child in children] == [0, 0]
    for out, err in printed:
        assert len(out.splitlines()) == 1
        assert err == b""
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]
    here, there = (TfdsSource("digits", "train", data_dir=str(root)) for root in (tmp_path, digits_dir))
    assert all(here[i] == there[i] for i in range(len(there)))  # hosts that build for themselves agree


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path):
    command = [sys.executable, "-m", "clip_jax.data.build", "digits", "--data-dir", str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while child.poll() is None and not list(tmp_path.glob("digits/incomplete*/*.array_record*")):
        pass
    child.kill()
    assert child.wait() != 0
    assert list(tmp_path.glob("digits/*"))
    with pytest.raises(UserError, match="is not in"):
        find_dataset("digits", str(tmp_path))
    build_dataset("digits", str(tmp_path))
    assert len(TfdsSource("digits", "train", data_dir=str(tmp_path))) == 8982


def test_captions_may_lie_within_a_sequence():
    """As COCO has them: `captions/text`, several an image."""
    import tensorflow_datasets as tfds

    kinds = tfds.features
    features = kinds.FeaturesDict(
        {
            "image": kinds.Image(),
            "captions": kinds.Sequence({"text": kinds.Text(), "id": kinds.Scalar(np.int64)}),
            "texts": kinds.Sequence(kinds.Text()),
        }
    )
    for key in ("captions/text", "texts"):
        assert isinstance(_feature(features, key, texts=True), kinds.Text)
    for key in ("captions", "captions/words", "image/text", "absent"):
        assert not isinstance(_feature(features, key, texts=True), kinds.Text)
    assert not isinstance(_feature(features, "texts", texts=False), kinds.Text)
