"""Sources and the pipeline: what is read, in which order, and what it is told when it cannot be."""

import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from batches import assert_same, side_by_side
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data import tfds_source
from clip_jax.data.augment import Augment
from clip_jax.data.images import ImageError, Preprocess, decode, encode_jpeg, eval_image
from clip_jax.data.order import FullShuffle, shuffled_index
from clip_jax.data.pipeline import eval_batches, train_batches
from clip_jax.data.reading import Part
from clip_jax.data.records import REASONS, UNREACHABLE, Record, RecordError
from clip_jax.data.synthetic import SyntheticSource, synthetic_batches
from clip_jax.data.tfds_files import FEATURES, RecordWriter, dataset_info, serialize, shard_name
from clip_jax.data.tfds_source import OWN_DATASETS, TfdsSource, find_dataset, prepare_command
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.data.transforms import EvalTransform, TrainTransform
from clip_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SOURCE = SyntheticSource(size=23, image_size=12, seed=0)
TRANSFORM = TrainTransform(
    Preprocess(size=8), Tokenizer(), context=16, augment=Augment(crop="resized", scale=(0.3, 1.0))
)


class Numbers:
    """A source whose records are almost free; the image holds the record's number."""

    fingerprint, state = {}, None

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Record(np.full((1, 1, 3), index, np.uint8), (str(index),), label=index % 10)


class Broken(Numbers):
    """A source in which record 3 is no image."""

    def __getitem__(self, index):
        return Record(b"\xff\xd8\xff", ("broken",)) if index == 3 else super().__getitem__(index)

    def __str__(self):
        return "the broken source"


class NumberTransform:
    """Keeps the number and one random draw, and no pixels."""

    def __call__(self, record, rng):
        (caption,) = record.captions
        return {"image": record.image, "tokens": np.asarray([len(caption)], np.int32), "draw": rng.random()}

    def blank(self):
        return {"image": np.zeros((1, 1, 3), np.uint8), "tokens": np.zeros(1, np.int32), "draw": 0.0}


def shuffled(source, seed):
    """A source, shuffled record by record."""
    return [Part(source, FullShuffle(len(source), seed=seed))]


def first(count, **options):
    """The first batches of SOURCE, as a list."""
    seed = options.pop("seed", 3)
    batches = train_batches(shuffled(SOURCE, seed), **{"transform": TRANSFORM, "batch": 8, "seed": seed} | options)
    return take(batches, count)


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches])


@pytest.fixture(scope="module")
def straight():
    """Nine batches: three epochs of 23 records and three more samples."""
    return first(9)


# Training batches


def test_a_batch_has_the_promised_arrays(straight):
    shapes = {name: (array.shape, array.dtype.name) for name, array in straight[0].items()}
    assert shapes == {
        "image": ((8, 8, 8, 3), "uint8"),
        "tokens": ((8, 16), "int32"),
        "weight": ((8,), "float32"),
        "index": ((8,), "int64"),
        "bad": ((8,), "int32"),
    }
    assert all((batch["weight"] == 1).all() for batch in straight)


def test_rows_belong_together(straight):
    """Image, caption and index of a row are of one record."""
    for batch in straight:
        captions = [SOURCE[int(index)].captions[0] for index in batch["index"]]
        np.testing.assert_array_equal(batch["tokens"], Tokenizer()(captions, context=16))
    square = TrainTransform(Preprocess(size=12), Tokenizer(), context=16)
    for batch in first(2, transform=square):
        expected = [eval_image(SOURCE[int(index)].image, Preprocess(size=12)) for index in batch["index"]]
        np.testing.assert_array_equal(batch["image"], expected)


def test_every_epoch_has_every_record_once_in_a_new_order(straight):
    order = indices(straight)[: 3 * 23].reshape(3, 23)
    for epoch in order:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in order}) == 3
    assert any(tuple(epoch) != tuple(range(23)) for epoch in order)


# Hypothesis stays out of what runs in Grain's threads: the checks of types there draw from `random`, which it guards.


@given(size=st.integers(1, 300), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(size, epoch, seed):
    assert sorted(shuffled_index(place, epoch, size=size, seed=seed) for place in range(size)) == list(range(size))


@pytest.mark.parametrize(("size", "batch"), [(1, 1), (1, 3), (7, 7), (7, 3), (7, 8), (7, 20), (50, 1), (64, 48)])
def test_epochs_follow_each_other_for_any_size_and_batch(size, batch):
    count = -(-3 * size // batch)
    batches = train_batches(shuffled(Numbers(size), 1), transform=NumberTransform(), batch=batch, seed=1)
    taken = take(batches, count)
    order, draws = indices(taken), np.concatenate([batch["draw"] for batch in taken])
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert len(set(draws)) == len(draws)  # no two crops are alike, neither of a record nor within an epoch


def test_the_order_of_a_seed_is_forever():
    """A checkpoint holds a position and no order: another order after an upgrade would repeat and miss records."""
    order = [[shuffled_index(place, epoch, size=10, seed=0) for place in range(10)] for epoch in range(2)]
    assert order == [[5, 8, 9, 7, 4, 2, 1, 0, 3, 6], [1, 2, 4, 5, 9, 7, 8, 6, 0, 3]]


@pytest.mark.parametrize("position", [1, 8, 22, 23, 24, 40])
def test_seeking_gives_the_tail_of_the_straight_run(straight, position):
    rest = {name: np.concatenate([batch[name] for batch in straight])[position:] for name in straight[0]}
    count = len(rest["index"]) // 8
    expected = [{name: values[8 * i : 8 * i + 8] for name, values in rest.items()} for i in range(count)]
    assert_same(first(count, position=position), expected)


def test_a_position_means_samples_whatever_the_batch(straight):
    in_one = {name: np.concatenate([batch[name] for batch in first(4, batch=2, position=8)]) for name in straight[1]}
    assert_same([in_one], straight[1:2])


def test_another_seed_gives_another_order_and_other_crops(straight):
    other = first(9, seed=4)
    assert (indices(other) != indices(straight)).any()
    ours, theirs = (np.concatenate([batch["image"] for batch in run]) for run in (straight, other))
    places = [(int(np.flatnonzero(indices(run) == record)[0])) for record in range(23) for run in (straight, other)]
    same = [(ours[a] == theirs[b]).all() for a, b in zip(places[::2], places[1::2], strict=True)]
    assert sum(same) < 5


def test_a_record_is_cropped_anew_in_every_epoch(straight):
    images = np.concatenate([batch["image"] for batch in straight])
    by_record = [images[indices(straight) == record] for record in range(23)]
    assert sum((crops[0] == crops[1]).all() for crops in by_record) < 5


@pytest.mark.parametrize("count", [2, 4])
def test_processes_make_the_rows_of_the_same_global_batches(straight, count):
    parts = [first(9, process_index=index, process_count=count) for index in range(count)]
    assert parts[0][0]["index"].shape == (8 // count,)
    assert_same(side_by_side(parts), straight)


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 16, "prefetch": 2}, {"prefetch": 1}])
def test_threads_and_prefetching_change_nothing(straight, options):
    assert_same(first(9, **options), straight)


def test_worker_processes_change_nothing(straight):
    assert_same(first(8, workers=2, position=8), straight[1:])


def test_data_of_many_epochs_ahead_is_reached_at_once():
    started = time.perf_counter()
    (batch,) = first(1, position=10**15)
    assert time.perf_counter() - started < 5
    assert len(set(batch["index"])) >= 4


def test_a_batch_that_does_not_divide_is_refused():
    for make in (
        lambda: first(1, batch=6, process_count=4),
        lambda: eval_batches(SOURCE, transform=EvalTransform(Preprocess(size=8)), batch=6, process_count=4),
        lambda: synthetic_batches(batch=6, image_size=8, context=8, vocab_size=16, seed=0, process_count=4),
    ):
        with pytest.raises(UserError, match="batch of 6 rows .* 4 processes"):
            make()


def test_no_records_are_refused():
    with pytest.raises(UserError, match="no records"):
        train_batches(shuffled(Numbers(0), 0), transform=NumberTransform(), batch=1, seed=0)
    with pytest.raises(UserError, match="no records"):
        eval_batches(Numbers(0), transform=EvalTransform(Preprocess(size=8)), batch=1)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bad_record_is_named(workers):
    batches = train_batches(
        shuffled(Broken(5), 0), transform=TRANSFORM, batch=5, seed=0, workers=workers, on_bad="fail"
    )
    with pytest.raises(RecordError, match="record 3 of the broken source: the JPEG cannot be decoded"):
        next(batches)
    with pytest.raises(RecordError, match="record 3 of the broken source"):
        list(eval_batches(Broken(5), transform=EvalTransform(Preprocess(size=8)), batch=2))


# Evaluation batches


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("size", "rows"), [(1, 1), (1, 8), (7, 2), (8, 2), (9, 2), (23, 3), (30, 8)])
def test_evaluation_has_every_record_once_in_order_and_padding_never_counts(size, rows, count):
    transform = EvalTransform(Preprocess(size=2))
    parts = [
        list(eval_batches(Numbers(size), transform=transform, batch=rows * count, process_index=i, process_count=count))
        for i in range(count)
    ]
    assert {len(part) for part in parts} == {-(-size // (rows * count))}
    whole = side_by_side(parts)
    weight, index = (np.concatenate([batch[name] for batch in whole]) for name in ("weight", "index"))
    np.testing.assert_array_equal(index[weight == 1], np.arange(size))
    np.testing.assert_array_equal(weight, index >= 0)
    for batch in whole:
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert not batch["image"][batch["weight"] == 0].any()
        assert not batch["label"][batch["weight"] == 0].any()
        np.testing.assert_array_equal(batch["label"], np.where(batch["weight"] == 1, batch["index"] % 10, 0))
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], np.maximum(batch["index"], 0))


# Synthetic batches


def synthetic(count, **options):
    sizes = {"batch": 16, "image_size": 8, "context": 10, "vocab_size": 50, "seed": 0}
    return list(itertools.islice(synthetic_batches(**sizes | options), count))


def test_synthetic_batches_look_like_training_batches(straight):
    batch = synthetic(1, batch=8, context=16)[0]
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (array.shape, array.dtype) for name, array in straight[0].items()
    }


def test_synthetic_tokens_are_start_caption_end_and_zeros():
    tokens = np.concatenate([batch["tokens"] for batch in synthetic(8, batch=32)])
    ends = tokens.argmax(axis=1)
    assert (tokens[:, 0] == 48).all()
    assert (tokens.max(axis=1) == 49).all()
    assert set(ends) == set(range(2, 10))
    columns = np.arange(10)
    assert (tokens[columns > ends[:, None]] == 0).all()
    inner = tokens[(columns > 0) & (columns < ends[:, None])]
    assert 1 <= inner.min() <= inner.max() < 48


def test_synthetic_batches_are_a_function_of_seed_and_position():
    whole = synthetic(40)  # the pairs repeat after 256
    assert_same(synthetic(40), whole)
    assert_same(synthetic(38, position=32), whole[2:])
    assert_same(synthetic(1, position=256), whole[:1])
    assert (synthetic(1, seed=1)[0]["image"] != whole[0]["image"]).any()
    for count in (2, 4):
        parts = [synthetic(40, process_index=index, process_count=count) for index in range(count)]
        assert_same(side_by_side(parts), whole)


def test_synthetic_batches_may_be_larger_than_their_pairs():
    (batch,) = synthetic(1, batch=600, position=100)
    assert batch["image"].shape == (600, 8, 8, 3)
    np.testing.assert_array_equal(batch["index"], (100 + np.arange(600)) % 256)
    np.testing.assert_array_equal(batch["image"][0], batch["image"][256])


# Sources


def test_synthetic_source_is_a_function_of_seed_and_index():
    assert len(SOURCE) == 23
    image, captions, _, label = SOURCE[13]
    np.testing.assert_array_equal(image, SyntheticSource(99, 12, 0)[13].image)
    assert (image != SyntheticSource(99, 12, 1)[13].image).any()
    assert (image != SOURCE[14].image).any()
    assert (captions, label) == (("random pixels, picture 13 of class 3",), 3)
    assert SOURCE.classes[label] in captions[0]
    with pytest.raises(IndexError):
        SOURCE[23]


def test_tfds_source_reads_what_its_keys_say(digits_dir):
    both = TfdsSource("digits", "train", data_dir=str(digits_dir), label_key="label")
    pairs = TfdsSource("digits:1.0.0", "train", data_dir=str(digits_dir))
    labelled = TfdsSource("digits", "train", data_dir=str(digits_dir), caption_key="", label_key="label")
    assert isinstance(both[5].image, bytes)
    assert decode(both[5].image).shape == (8, 8, 3)
    assert pairs[5] == both[5]._replace(label=-1)
    assert labelled[5] == both[5]._replace(captions=())
    word = both.classes[both[5].label]
    assert word in both[5].captions[0] or str(both[5].label) in both[5].captions[0]
    assert pairs.classes == ()
    assert pairs.fingerprint == {"name": "digits", "version": "1.0.0", "split": "train", "records": 8982}
    assert both.fingerprint == pairs.fingerprint | {"label_key": "label"}  # kept features hold labels
    assert json.loads(json.dumps(both.fingerprint)) == both.fingerprint
    assert str(both) == "digits:1.0.0 (train)"


def test_tfds_splits_can_be_sliced(digits_dir):
    def records(split):
        source = TfdsSource("digits", split, data_dir=str(digits_dir))
        return [source[i] for i in range(len(source))]

    test = records("test")
    assert records("test[:50%]") + records("test[50%:]") == test
    assert records("test[10:20]") == test[10:20]
    assert len(TfdsSource("digits", "train+test", data_dir=str(digits_dir))) == 8982 + 300


def test_a_pickled_source_opens_its_files_again(digits_dir):
    source = TfdsSource("digits", "test", data_dir=str(digits_dir))
    copy = pickle.loads(pickle.dumps(source))
    assert copy._records is not None  # or threads would import TFDS, and each other's modules while it is imported
    assert len(pickle.dumps(source)) < 1_000
    assert len(copy) == len(source) == 300
    assert copy[7] == source[7]


def written(root, files, records=1):
    """Writes a dataset in so many files; returns its folder."""
    folder = root / "pairs" / "1.0.0"
    folder.mkdir(parents=True)
    image = encode_jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), 95)
    for file in range(files):
        with RecordWriter(folder / shard_name("pairs", "train", file, files)) as writer:
            for record in range(records):
                writer.write(serialize(image, [f"{file} {record}"], [], key="", uid=""))
    (folder / "features.json").write_text(json.dumps(FEATURES))
    info = dataset_info("pairs", "1.0.0", "train", description="", lengths=[records] * files, total_bytes=0)
    (folder / "dataset_info.json").write_text(info)
    return folder


def test_a_dataset_may_have_more_files_than_a_process_may_open_unasked(tmp_path, monkeypatch):
    """1,024 on most systems, and `data prepare` makes as many files as there are tars."""
    written(tmp_path, files=40)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    few = [number for number in range(len(used) + 40) if number not in used][20]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
        source = TfdsSource("pairs", "train", data_dir=str(tmp_path))
        assert [source[i].captions for i in range(40)] == [(f"{i} 0",) for i in range(40)]
        monkeypatch.setattr(tfds_source, "allow_open_files", lambda number: None)  # as where the hard limit is as low
        source = TfdsSource("pairs", "train", data_dir=str(tmp_path))
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
        with pytest.raises(
            UserError, match=r"Too many open files.*array_record-000\d\d-of-00040.*\(ulimit -n\)"
        ) as caught:
            [source[i] for i in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not isinstance(caught.value, RecordError)  # no pair is to blame


def test_shares_of_other_captions_cost_their_own_pair(tmp_path):
    """They ended the run with a traceback."""
    folder = written(tmp_path, files=1)
    with RecordWriter(folder / shard_name("pairs", "train", 0, 1)) as writer:
        writer.write(serialize(b"image", ["one", "two", "three"], [0.5, 0.5], key="", uid=""))
    with pytest.raises(RecordError, match="there are 3 captions and 2 shares of them"):
        TfdsSource("pairs", "train", data_dir=str(tmp_path))[0]


def test_damaged_and_lost_files_cost_their_own_pairs(tmp_path, monkeypatch):
    folder = written(tmp_path, files=4, records=3)
    files = sorted(folder.glob("*array_record*"))
    content = bytearray(files[0].read_bytes())
    content[100] ^= 1  # in the first record
    files[0].write_bytes(content)
    files[1].write_bytes(content[:-20_000])
    files[2].unlink()
    source = TfdsSource("pairs", "train", data_dir=str(tmp_path))
    batch = take(train_batches(shuffled(source, 0), transform=TRANSFORM, batch=12, seed=0), 1)[0]
    reasons = dict(zip(batch["index"].tolist(), (["", *REASONS][bad] for bad in batch["bad"]), strict=True))
    changed, missing = "shard_changed", "shard_missing"
    expected = [changed, "", "", changed, changed, changed, missing, missing, missing, "", "", ""]
    assert [reasons[record] for record in range(12)] == expected
    with pytest.raises(RecordError, match=r"^open\(\) failed: No such file or directory; opening .*-00002-of-00004"):
        source[6]

    class Share(list):
        def __getitem__(self, index):
            raise RuntimeError(
                "pread() failed: Input/output error; reading /nfs/pairs-train.array_record-00000-of-00004"
            )

    monkeypatch.setattr(source, "_records", Share())
    with pytest.raises(RecordError, match="^pread") as caught:
        source[0]
    assert caught.value.reason == UNREACHABLE


def test_a_dataset_that_is_prepared_anew_has_another_state(digits_dir, tmp_path):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")  # with its times
    original, copy = (TfdsSource("digits", "test", data_dir=str(root)) for root in (digits_dir, tmp_path))
    assert copy.state == original.state
    os.utime(next((tmp_path / "digits" / "1.0.0").glob("digits-test*")))
    assert copy.state != original.state
    assert copy.fingerprint == original.fingerprint


def test_the_newest_version_is_found(digits_dir, tmp_path):
    for version in ("1.0.0", "1.2.0", "1.10.0"):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / version).symlink_to(digits_dir / "digits" / "1.0.0")
    (tmp_path / "d" / "2.0.0").mkdir()
    (tmp_path / "d" / "3.0.0").mkdir()  # from a TFDS too old to write features.json
    (tmp_path / "d" / "3.0.0" / "dataset_info.json").write_text("{}")
    (tmp_path / "d" / "incomplete.ABC_9.0.0").symlink_to(digits_dir / "digits" / "1.0.0")
    assert find_dataset("d", str(tmp_path)).name == "1.10.0"
    assert find_dataset("d:1.2.0", str(tmp_path)).name == "1.2.0"


def test_a_config_is_part_of_the_path(digits_dir, tmp_path):
    (tmp_path / "d" / "small").mkdir(parents=True)
    (tmp_path / "d" / "small" / "1.0.0").symlink_to(digits_dir / "digits" / "1.0.0")
    assert find_dataset("d/small", str(tmp_path)) == find_dataset("d/small:1.0.0", str(tmp_path))
    with pytest.raises(UserError, match=r"needs a config: .* has small \(as in d/small\)"):
        find_dataset("d", str(tmp_path))


def test_the_default_folder_is_tfds_own(digits_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(digits_dir))
    assert find_dataset("digits") == digits_dir / "digits" / "1.0.0"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("digit", r"'digit' is not in .*did you mean 'digits'\?"),
        ("digits:7.0.0", "has 1.0.0 of it"),
        ("coco/2014:1.1.0", r"tfds.builder\('coco/2014:1.1.0', data_dir='.*', file_format='array_record'\)"),
        ("../digits", "not a TFDS name"),
        ("", "not a TFDS name"),
    ],
)
def test_a_dataset_that_is_not_there_is_told_how_to_come(digits_dir, dataset, message):
    with pytest.raises(UserError, match=message) as caught:
        TfdsSource(dataset, "train", data_dir=str(digits_dir))
    assert "\n" not in str(caught.value)


def test_our_own_dataset_is_told_our_own_command(tmp_path):
    assert OWN_DATASETS == ("digits",)
    with pytest.raises(UserError, match=f"clip-jax data build digits --data-dir={tmp_path}"):
        TfdsSource("digits", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize("file_format", ["tfrecord", "riegeli"])
def test_another_file_format_is_named_with_the_command(digits_dir, tmp_path, file_format):
    folder = tmp_path / "pairs" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_bytes((digits_dir / "digits" / "1.0.0" / "features.json").read_bytes())
    info = json.loads((digits_dir / "digits" / "1.0.0" / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": file_format}))
    with pytest.raises(UserError) as caught:
        TfdsSource("pairs", "train", data_dir=str(tmp_path))
    assert f"prepared as {file_format}, and random access needs array_record" in str(caught.value)
    convert = f"clip-jax data convert pairs --data-dir={tmp_path}"
    assert str(caught.value).endswith(convert if file_format == "tfrecord" else prepare_command("pairs", tmp_path))


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("damaged", [b"", b'{"name": 3, "pythonClassName": []}', b"[]", b"\xff"])
def test_a_damaged_description_is_one_line(digits_dir, tmp_path, file, damaged):
    for name in ("dataset_info.json", "features.json"):
        (tmp_path / "pairs/1.0.0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pairs/1.0.0" / name).write_bytes((digits_dir / "digits/1.0.0" / name).read_bytes())
    (tmp_path / "pairs/1.0.0" / file).write_bytes(damaged)
    with pytest.raises(UserError, match="cannot be opened: .* is damaged .*; copy or prepare the dataset|data convert"):
        TfdsSource("pairs", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize("split", ["nope", "train[", "train[:200%]", "train[:0]", "train[5:2]", ""])
def test_an_unknown_split_lists_the_splits(digits_dir, split):
    with pytest.raises(UserError, match=r"no split '.*'; it has train \(8,982\), test \(300\)"):
        TfdsSource("digits", split, data_dir=str(digits_dir))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_key": ""}, "no feature '' of kind Image for the image"),
        ({"image_key": "img"}, "no feature 'img' of kind Image .*config.data.image_key and config.data.caption_key"),
        ({"caption_key": "label"}, "no feature 'label' of kind Text .*config.data.caption_key"),
        ({"label_key": "caption"}, "no feature 'caption' of kind ClassLabel .*config.eval.label_key"),
        ({"caption_key": ""}, "both empty"),
    ],
)
def test_wrong_features_are_listed(digits_dir, keys, message):
    with pytest.raises(UserError, match=message) as caught:
        TfdsSource("digits", "train", data_dir=str(digits_dir), **keys)
    if "feature" in message:
        for found in ("image: Image", "caption: Text", "label: ClassLabel", "scan: Scalar"):
            assert found in str(caught.value)


def test_transforms_pass_the_reason_of_a_bad_image_on():
    with pytest.raises(ImageError, match="empty"):
        EvalTransform(Preprocess())(Record(b"", label=0))


# What is imported

WITHOUT = """
from importlib.machinery import PathFinder
import sys
hidden = {hidden!r}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.split(".")[0] in hidden else find(name, path, target)
)
"""


def run_without(hidden, script, *arguments):
    """Runs a script in a process where some packages are not installed; returns what it printed."""
    code = WITHOUT.format(hidden=hidden) + script
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_reads_without_tensorflow(digits_dir):
    script = """
from clip_jax.data.images import Preprocess
from clip_jax.data.order import FullShuffle
from clip_jax.data.pipeline import train_batches
from clip_jax.data.transforms import TrainTransform
from clip_jax.data.reading import Part
from clip_jax.data.tfds_source import TfdsSource
from clip_jax.data.tokenizer import Tokenizer

source = TfdsSource("digits", "train", data_dir=sys.argv[1])
parts = [Part(source, FullShuffle(len(source), seed=0))]
batches = train_batches(parts, transform=TrainTransform(Preprocess(size=8), Tokenizer()), batch=4, seed=0)
print(next(batches)["tokens"].shape, "tensorflow" in sys.modules, "torch" in sys.modules)
batches.close()
"""
    assert run_without({"tensorflow", "torch"}, script, digits_dir) == "(4, 77) False False\n"
    visible = run_without(set(), script, digits_dir)
    assert visible == "(4, 77) False False\n"


def test_synthetic_batches_need_numpy_only():
    data = {"tensorflow", "tensorflow_datasets", "array_record", "grain", "absl", "tokenizers", "ftfy"}
    script = """
from clip_jax.data.synthetic import synthetic_batches
print(next(synthetic_batches(batch=4, image_size=8, context=8, vocab_size=16, seed=0))["image"].shape)
"""
    assert run_without(data | {"PIL", "simplejpeg", "jax", "torch"}, script) == "(4, 8, 8, 3)\n"


def test_a_missing_tensorflow_datasets_is_named(digits_dir):
    script = """
from clip_jax.data.tfds_source import TfdsSource
from clip_jax.errors import UserError
try:
    TfdsSource("digits", "train", data_dir=sys.argv[1])
except UserError as error:
    print(error)
"""
    for module in ("tensorflow_datasets", "array_record"):
        printed = run_without({module}, script, digits_dir)
        assert f"needs the module {module}; install it with: pip install tensorflow-datasets" in printed


# Worker processes


@pytest.mark.slow
def test_workers_ignore_sigterm_and_die_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        """
import multiprocessing, os, signal, sys, time
from clip_jax.data.images import Preprocess
from clip_jax.data.order import FullShuffle
from clip_jax.data.pipeline import train_batches
from clip_jax.data.transforms import TrainTransform
from clip_jax.data.reading import Part
from clip_jax.data.synthetic import SyntheticSource
from clip_jax.data.tokenizer import Tokenizer

if __name__ == "__main__":
    transform = TrainTransform(Preprocess(size=8), Tokenizer())
    parts = [Part(SyntheticSource(50, 8, 0), FullShuffle(50, seed=0))]
    batches = train_batches(parts, transform=transform, batch=4, seed=0, workers=2)
    next(batches), next(batches)
    workers = [child.pid for child in multiprocessing.active_children()]
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    time.sleep(0.5)
    for _ in range(20):
        next(batches)
    print(*workers, flush=True)
    time.sleep(60)
"""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(is_running, workers)):
        time.sleep(0.1)
    left = list(filter(is_running, workers))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
