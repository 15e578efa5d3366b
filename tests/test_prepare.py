"""Prepared datasets: every good sample once, the same bytes however often the job was killed, and read as any other."""

import dataclasses
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pytest
from full_disk import small_files
from http_store import serving
from PIL import Image
from pyarrow import parquet
from tars import bad_shard, noise_shards, picture, write_shard, write_shards
from tiny import TINY

from clip_jax.cli import main
from clip_jax.data import prepare as prepare_module
from clip_jax.data import prepare_inputs
from clip_jax.data.captions import CaptionFields
from clip_jax.data.images import decode, encode_jpeg
from clip_jax.data.loader import open_training_data
from clip_jax.data.prepare import Job, prepare
from clip_jax.data.prepare_shard import OutputError, ShardSettings, process_shard
from clip_jax.data.records import REASONS
from clip_jax.data.table_source import TableSource
from clip_jax.data.tar_source import TarSource
from clip_jax.data.tfds_files import FEATURES, shard_name
from clip_jax.data.tfds_source import TfdsSource
from clip_jax.data.workers import attempt, run
from clip_jax.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def inline(monkeypatch):
    """The units run in this process, one after another."""
    monkeypatch.setattr(prepare_module, "run", lambda function, tasks, **_: (attempt(function, task) for task in tasks))


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", [7, 10, 1, 14])


def job(**options):
    """A job for the dataset `pairs`; options of both kinds."""
    settings = {name: options.pop(name) for name in list(options) if name in ShardSettings.__dataclass_fields__}
    return Job("pairs", **options, settings=ShardSettings(**settings))


def tree(folder):
    """Every file of a dataset and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def open_prepared(root, name="pairs"):
    return TfdsSource(name, "train", data_dir=str(root))


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def rejects(folder):
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]


# What is written


def test_training_reads_a_prepared_dataset_as_it_reads_the_tars(shards, tmp_path, inline):
    """The same batches: no sample is lost, none comes twice, small JPEGs and captions are untouched."""
    prepare(job(data_dir=str(tmp_path), tars=shards))
    text = dataclasses.replace(TINY.model.text, vocab_size=49_408)
    base = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, text=text))
    sections = (
        dataclasses.replace(base.data, source="tfds", dataset="pairs", data_dir=str(tmp_path)),
        dataclasses.replace(base.data, source="tars", shards=shards, index_dir=str(tmp_path / "index")),
    )
    batches = []
    for section in sections:
        stream = open_training_data(dataclasses.replace(base, data=section)).batches(0)
        batches.append(next(stream))
        stream.close()
    prepared, raw = batches
    assert sorted(prepared["index"].tolist()) == list(range(32))
    for name, rows in raw.items():
        np.testing.assert_array_equal(prepared[name], rows)


def test_all_captions_are_kept_with_their_shares(tmp_path, inline):
    several = {"synthetic": ["one", " ", "three"]}
    shards = write_shards(tmp_path / "shards", [3], metadata=lambda _: several)
    captions = ("txt=0.3", "json.synthetic=0.6")
    prepare(job(data_dir=str(tmp_path), tars=shards, captions=captions))
    raw, prepared = (
        TarSource(shards, index_dir=str(tmp_path / "index"), captions=captions)[1],
        open_prepared(tmp_path)[1],
    )
    assert prepared.captions == raw.captions == ("number 1", "one", "three")
    np.testing.assert_allclose(prepared.shares, raw.shares, rtol=1e-6)
    np.testing.assert_allclose(prepared.shares, (0.3, 0.3, 0.3), rtol=1e-6)


def test_tfds_itself_describes_and_reads_what_is_written(shards, tmp_path, inline):
    import tensorflow_datasets as tfds
    from google.protobuf import json_format
    from tensorflow_datasets.core.proto import feature_pb2

    folder = prepare(job(data_dir=str(tmp_path), tars=shards))
    kinds = tfds.features
    expected = kinds.FeaturesDict(
        {
            "image": kinds.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "caption": kinds.Sequence(kinds.Text()),
            "caption_shares": kinds.Sequence(np.float32),
            "key": kinds.Text(),
            "uid": kinds.Text(),
        }
    )
    assert json_format.ParseDict(FEATURES, feature_pb2.Feature()) == expected.to_proto()
    data = tfds.builder_from_directory(str(folder)).as_data_source("train")
    assert [example["key"] for example in data][6:8] == [b"00000.tar/6", b"00001.tar/0"]
    assert data[9]["uid"] == f"{9:032x}".encode()
    np.testing.assert_array_equal(data[9]["image"], decode(picture(9)))
    name = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name="pairs", split="train")
    for number, count in ((3, 4), (7, 123_456)):
        template = name.replace(filetype_suffix="array_record")
        assert template.sharded_filepath(shard_index=number, num_shards=count).name == shard_name(
            "pairs", "train", number, count
        )


@pytest.mark.parametrize("resize", ["fast", "exact"])
def test_large_images_are_made_smaller_and_small_ones_kept(tmp_path, inline, resize):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (8, 10, 3), np.uint8)).resize((500, 400)))
    for name, pixels in {"large.png": smooth, "small.png": smooth[:30, :40], "tall.png": smooth[:, :50]}.items():
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        (tmp_path / "images" / name).with_suffix(".txt").write_text(name)
    prepare(job(data_dir=str(tmp_path), folder=str(tmp_path / "images"), short_side=100, resize=resize))
    files = {record.captions[0]: record.image for record in map(open_prepared(tmp_path).__getitem__, range(3))}
    images = {name: decode(file) for name, file in files.items()}
    assert {name: image.shape for name, image in images.items()} == {
        "large.png": (100, 125, 3),
        "small.png": (30, 40, 3),
        "tall.png": (400, 50, 3),
    }
    expected = np.asarray(Image.fromarray(smooth).resize((125, 100), Image.Resampling.BICUBIC))
    assert np.abs(images["large.png"].astype(int) - expected).mean() < 2
    assert (files["large.png"] == encode_jpeg(expected, 95)) == (resize == "exact")


def test_a_jpeg_that_is_small_enough_keeps_its_bytes_and_its_pixels_are_not_turned(tmp_path, inline):
    """EXIF orientation is not applied anywhere; a JPEG that is made smaller loses it, pixels as they were stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for side in (20, 30, 200):
        buffer = io.BytesIO()
        Image.new("RGB", (2 * side, side)).save(buffer, "JPEG", exif=exif)
        (tmp_path / f"{side}.jpg").write_bytes(buffer.getvalue())
        (tmp_path / f"{side}.txt").write_text("turned")
    prepare(job(data_dir=str(tmp_path / "out"), folder=str(tmp_path), short_side=30))
    small, large, just = (open_prepared(tmp_path / "out")[number].image for number in range(3))  # 20, 200, 30
    assert small == (tmp_path / "20.jpg").read_bytes()
    assert just == (tmp_path / "30.jpg").read_bytes()
    assert decode(large).shape == (30, 60, 3)


def test_a_small_jpeg_whose_scan_is_cut_is_not_kept(tmp_path, inline):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(buffer, "JPEG", quality=95)
    for name, content in {"whole": buffer.getvalue(), "cut": buffer.getvalue()[:-500]}.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
        (tmp_path / f"{name}.txt").write_text(name)
    folder = prepare(job(data_dir=str(tmp_path / "out"), folder=str(tmp_path)))
    assert [(line["record"], line["reason"]) for line in rejects(folder)] == [(f"{tmp_path}/cut.jpg", "image_damaged")]
    assert open_prepared(tmp_path / "out")[0].captions == ("whole",)


def test_quality_is_what_is_asked(tmp_path, inline):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("noise")
    sizes = []
    for quality in (50, 95):
        root = tmp_path / f"q{quality}"
        prepare(job(data_dir=str(root), folder=str(tmp_path), quality=quality))
        sizes.append(len(open_prepared(root)[0].image))
    assert sizes[1] > 1.5 * sizes[0]


# What is left out


def test_a_strip_that_is_longer_than_a_jpeg_can_be_is_rejected(tmp_path, inline):
    """It ended the command with a traceback, at each start."""
    for name, width in (("long", 65_501), ("short", 65_500)):
        Image.new("L", (width, 1)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    folder = prepare(job(data_dir=str(tmp_path / "out"), folder=str(tmp_path)))
    assert [line["reason"] for line in rejects(folder)] == ["image_too_large"]
    assert "65501 x 1 pixels" in rejects(folder)[0]["message"]
    assert decode(open_prepared(tmp_path / "out")[0].image).shape == (1, 65_500, 3)


def test_rejects_are_named_by_reason_and_counted(tmp_path, inline):
    path = tmp_path / "bad.tar"
    expected = bad_shard(path)
    folder = prepare(job(data_dir=str(tmp_path), tars=str(path)))
    found = {line["record"]: line["reason"] for line in rejects(folder)}
    assert found == {f"sample {i} of {path}": reason for i, reason in enumerate(expected) if reason}
    counts = manifest(folder)
    assert counts["rejected"] == dict(sorted(Counter(filter(None, expected)).items()))
    assert set(counts["rejected"]) <= set(REASONS)
    assert counts["samples"] == 16 == counts["records"] + sum(counts["rejected"].values())
    assert len(open_prepared(tmp_path)) == counts["records"] == expected.count(None)


def test_filters_and_uids_leave_samples_out(shards, tmp_path, inline):
    (tmp_path / "uids.txt").write_text("\n".join(f"{number:032x}" for number in range(3, 40, 2)))
    uids = str(tmp_path / "uids.txt")
    asked = job(data_dir=str(tmp_path), tars=shards, filters=("caption!=json 9",), uids=uids)
    counts = manifest(prepare(asked))
    kept = [open_prepared(tmp_path)[i].captions[0] for i in range(counts["records"])]
    assert kept == [f"number {i}" for i in range(3, 32, 2) if i != 9]
    assert (counts["samples"], counts["filtered"]) == (32, 32 - len(kept))
    assert len(manifest(tmp_path / "pairs" / "1.0.0")["shards"]) == 4  # one of them without a record
    assert [shard["records"] for shard in counts["shards"]][2] == int("number 17" in kept)


def test_a_shard_without_a_record_is_read_over(tmp_path, inline):
    for number, samples in enumerate((range(3), range(100, 104), range(3, 5), range(0))):
        write_shard(tmp_path / "shards" / f"{number}.tar", samples, metadata=lambda sample: {"good": sample < 100})
    asked = job(data_dir=str(tmp_path), tars=f"{tmp_path}/shards/*.tar", filters=("good==1",))
    counts = manifest(prepare(asked))
    assert [shard["records"] for shard in counts["shards"]] == [3, 0, 2, 0]
    prepared = open_prepared(tmp_path)
    assert [prepared[i].captions[0] for i in range(len(prepared))] == [f"number {i}" for i in range(5)]


def test_nothing_to_write_is_an_error_with_the_reasons(tmp_path, inline):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match=r"no sample that can be used \(caption_missing 1\)"):
        prepare(job(data_dir=str(tmp_path), folder=str(tmp_path / "in")))
    assert not (tmp_path / "pairs" / "1.0.0").exists()


# Inputs


def test_folders_below_a_folder_count_in_the_order_of_their_paths(tmp_path, inline):
    for number, name in enumerate(("b/1.jpg", "a/2.JPEG", "0.png", "c/d/3.jpg", ".hidden.jpg", "a/no_text.jpg")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        if "no_text" not in name:
            path.with_suffix(".txt").write_text(f"text of {name}")
    (tmp_path / "in" / "b" / "1.json").write_text(json.dumps({"caption": "json", "uid": 7}))
    folder = prepare(job(data_dir=str(tmp_path), folder=str(tmp_path / "in"), per_shard=2))
    prepared = open_prepared(tmp_path)
    names = ["0.png", "a/2.JPEG", "b/1.jpg", "c/d/3.jpg"]
    assert [prepared[i].captions[0] for i in range(len(prepared))] == [f"text of {name}" for name in names]
    assert rejects(folder) == [
        {
            "record": str(tmp_path / "in" / "a" / "no_text.jpg"),
            "reason": "caption_missing",
            "message": "no caption in txt, json.caption",
        }
    ]
    assert [shard["samples"] for shard in shard_counts(folder)] == [2, 2, 1]


@pytest.mark.parametrize(("suffix", "answers"), [(".jpg", 0), (".txt", 0), (".json", 0), (".json", 1)])
def test_a_share_that_does_not_answer_rejects_nothing(tmp_path, inline, monkeypatch, suffix, answers):
    """The file is good: its part is made when it can be read."""
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(picture(number))
        (tmp_path / "in" / f"{number}.txt").write_text(f"number {number}")
        (tmp_path / "in" / f"{number}.json").write_text(json.dumps({"good": 1}))
    asked = job(data_dir=str(tmp_path), folder=str(tmp_path / "in"), per_shard=1, filters=("good==1",))
    read, asked_for = Path.read_bytes, []

    def lost(path):
        asked_for.append(path.name)
        if path.name == f"1{suffix}" and asked_for.count(path.name) > answers:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", lost)
    with pytest.raises(UserError, match=f"1 of 2 shards could not be made, .*1{suffix} cannot be read: .*output error"):
        prepare(asked)
    monkeypatch.setattr(Path, "read_bytes", read)
    folder = prepare(asked)
    assert (manifest(folder)["records"], rejects(folder)) == (2, [])


def shard_counts(folder):
    return [
        shard | {"samples": shard["records"] + sum(shard["rejected"].values())} for shard in manifest(folder)["shards"]
    ]


def test_tables_are_cut_into_rows(tmp_path, inline):
    columns = {
        "picture": [picture(i) for i in range(5)],
        "texts": [[f"a {i}", "", f"b {i}"] for i in range(4)] + [[""]],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
    (tmp_path / "more.csv").write_text("picture,texts\nmissing.jpg,gone\n")
    tables = f"{tmp_path}/pairs.parquet::{tmp_path}/more.csv"
    folder = prepare(job(data_dir=str(tmp_path), table=tables, image_key="picture", caption_key="texts", per_shard=2))
    prepared = open_prepared(tmp_path)
    assert [prepared[i].captions for i in range(len(prepared))] == [(f"a {i}", f"b {i}") for i in range(4)]
    assert [(line["reason"], line["record"]) for line in rejects(folder)] == [
        ("caption_missing", f"row 4 of {tmp_path}/pairs.parquet"),
        ("image_missing", f"row 0 of {tmp_path}/more.csv"),
    ]
    assert [shard["samples"] for shard in shard_counts(folder)] == [2, 2, 1, 1]


def test_paths_of_a_table_that_is_a_link_begin_where_the_link_lies(tmp_path, inline):
    """As in training."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "pairs.csv").write_text("image,caption\n1.jpg,one\n")
    (tmp_path / "pairs.csv").symlink_to(tmp_path / "kept" / "pairs.csv")
    (tmp_path / "1.jpg").write_bytes(picture(1))
    prepare(job(data_dir=str(tmp_path), table=str(tmp_path / "pairs.csv")))
    assert open_prepared(tmp_path)[0].captions == TableSource(tmp_path / "pairs.csv")[0].captions == ("one",)


def test_remote_shards_are_read_once(shards, tmp_path, inline):
    with serving(tmp_path / "shards") as store:
        prepare(job(data_dir=str(tmp_path / "remote"), tars=f"{store.url}/{{00000..00003}}.tar"))
        assert store.ranges == 12  # of each shard a look, another when it is read, and the content
    prepare(job(data_dir=str(tmp_path / "local"), tars=shards))
    remote, local = (open_prepared(tmp_path / name) for name in ("remote", "local"))
    assert [remote[i] for i in range(32)] == [local[i] for i in range(32)]


def test_the_copy_of_a_remote_shard_has_no_name_and_needs_room(shards, tmp_path, monkeypatch):
    """A process that is killed leaves none behind; and where it does not fit, the dataset's folder is not to blame."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with serving(tmp_path / "shards") as store:
        (part,) = prepare_inputs.tar_parts(f"{store.url}/00000.tar", 1.0)
        samples = part.samples(CaptionFields(), 1.0)
        assert next(samples).key == "00000.tar/0"
        assert not list(scratch.iterdir())
        assert len(list(samples)) == 6
        with small_files(10_000), pytest.raises(UserError, match=f"/00000.tar cannot be copied to {scratch}: File too"):
            next(part.samples(CaptionFields(), 1.0))


# Stopped and gone on with


class Killed(BaseException):
    """What a test throws where a process might die."""


def test_a_crash_at_any_step_changes_nothing_of_the_result(tmp_path, inline, monkeypatch):
    """Before and after each rename, the last one included: then the same command again."""
    shards = write_shards(tmp_path / "shards", [3, 2])
    (tmp_path / "shards" / "00000.tar").write_bytes((tmp_path / "shards" / "00000.tar").read_bytes()[:3000])
    whole = tree(prepare(job(data_dir=str(tmp_path / "whole"), tars=shards)))
    renames = {"os": os.replace, "path": Path.rename}
    steps = 0

    def dying(step, rename, before):
        def call(*paths):
            nonlocal steps
            steps += 1
            if before and steps == step:
                raise Killed
            rename(*paths)
            if steps == step:
                raise Killed

        return call

    # job.json, 2 x (shard, rejects, marker), rejects, manifest, features, info, the folder; and after that
    for step, before in [*((step, True) for step in range(1, 13)), (12, False)]:
        steps, root = 0, tmp_path / f"{step}-{before}"
        asked = job(data_dir=str(root), tars=shards)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(step, renames["os"], before))
            patch.setattr(Path, "rename", dying(step, renames["path"], before))
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # the dead clean nothing up
            with pytest.raises(Killed):
                prepare(asked)
        assert (root / "pairs" / "1.0.0").exists() == (not before)
        assert tree(prepare(asked)) == whole
        assert [path.name for path in (root / "pairs").iterdir()] == ["1.0.0"]


def command(root, shards, *options):
    arguments = ["data", "prepare", "pairs", f"--data-dir={root}", f"--tars={shards}", "--workers=2", *options]
    return [sys.executable, "-m", "clip_jax.cli", *arguments]


@pytest.fixture(scope="module")
def slow_shards(tmp_path_factory):
    """Six shards that take a worker a moment each."""
    return noise_shards(tmp_path_factory.mktemp("slow") / "shards", shards=6, samples=30)


def kill_when(reached, root, shards):
    """Starts a real job, and kills it, hard, when its folder looks as wanted; returns how many shards were done."""
    work = root / "pairs" / "1.0.0.preparing" / "work"
    process = subprocess.Popen(command(root, shards), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not reached(work):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive, "workers that outlive the job"
    return len(list(work.glob("*.done.json")))


def check_killed_job(tmp_path, shards, moments):
    root = tmp_path / "killed"
    for reached in moments:
        kill_when(reached, root, shards)
        with pytest.raises(UserError, match=r"1.0.0.preparing is not finished; run its clip-jax data prepare again"):
            open_prepared(root)
    done = subprocess.run(command(root, shards), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "shards are there already" in done.stdout
    assert re.search(r"images/s, [\d.]+ per core on [12]; [\d.]+ MB in, [\d.]+ MB out", done.stdout)
    whole = prepare(job(data_dir=str(tmp_path / "whole"), tars=shards))
    assert tree(root / "pairs" / "1.0.0") == tree(whole)
    prepared = open_prepared(root)
    assert [prepared[i].captions[0] for i in range(len(prepared))] == [f"number {i}" for i in range(180)]


def test_a_job_that_was_killed_goes_on_without_loss_or_duplicates(tmp_path, slow_shards, inline):
    """SIGKILL while shards are written and others are done; workers die too."""

    def reached(work):
        return len(list(work.glob("*.done.json"))) >= 2 and any(work.parent.glob(".*array_record*.tmp"))

    check_killed_job(tmp_path, slow_shards, [reached])


@pytest.mark.slow
def test_a_job_that_was_killed_many_times_goes_on(tmp_path, slow_shards, inline):
    def after(count, wanted):
        def reached(work):
            return len(list(work.glob("*.done.json"))) >= count and wanted(work)

        return reached

    moments = [
        lambda work: work.exists(),
        lambda work: (work / "job.json").exists(),
        *(after(count, lambda work: any(work.parent.glob(".*array_record*.tmp"))) for count in range(5)),
        after(4, lambda work: any(work.glob(".*rejects*.tmp"))),  # not 5: two workers may end the last two together
    ]
    check_killed_job(tmp_path, slow_shards, moments)


def test_done_shards_are_not_made_again_unless_they_are_damaged(shards, tmp_path, monkeypatch):
    made = []

    def unit(task):
        made.append(task.shard.name[-14:-9])
        return process_shard(task)

    monkeypatch.setattr(prepare_module, "run", lambda _, tasks, **__: (attempt(unit, task) for task in tasks))
    asked = job(data_dir=str(tmp_path), tars=shards)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_finish", lambda *_: None)
        prepare(asked)
    assert made == ["00000", "00001", "00002", "00003"]
    with asked.unfinished.joinpath(shard_name("pairs", "train", 1, 4)).open("r+b") as file:
        file.truncate(1000)
    (asked.unfinished / "work" / "00003.done.json").write_text("{")
    marker = asked.unfinished / "work" / "00002.done.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"digest": "of another input"}))
    (asked.unfinished / "work" / "00000.rejects.jsonl").unlink()
    made.clear()
    folder = prepare(asked)
    assert made == ["00000", "00001", "00002", "00003"]
    assert len(open_prepared(tmp_path)) == 32
    before = tree(folder)
    made.clear()
    assert prepare(asked) == folder
    assert not made
    assert tree(folder) == before


def test_other_settings_or_another_input_are_refused_by_name(shards, tmp_path, inline, monkeypatch):
    asked = job(data_dir=str(tmp_path), tars=shards)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_finish", lambda *_: None)
        prepare(asked)
    changes = {"short_side": 224, "quality": 80, "filters": ("a>1",)}
    for state in ("unfinished", "finished"):
        for name, value in changes.items():
            with pytest.raises(UserError, match=rf"begun otherwise \({name}=.*, not .*\)|begun otherwise .*{name}="):
                prepare(job(data_dir=str(tmp_path), tars=shards, **{name: value}))
        with pytest.raises(UserError, match=r"another input: 3 shards, of 4 before"):
            prepare(dataclasses.replace(asked, tars=f"{tmp_path}/shards/{{00000..00002}}.tar"))
        begun = asked.unfinished / "work" / "job.json" if state == "unfinished" else asked.target / "manifest.json"
        content = begun.read_bytes()
        for damaged in (content[:50], b"{}", b"\xff" + content, b"[" * 100_000):
            begun.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{begun.name} is damaged, .*; choose another --version, or"):
                prepare(asked)
        begun.write_bytes(content)
        if state == "unfinished":
            prepare(asked)
    monkeypatch.chdir(tmp_path)
    prepare(dataclasses.replace(asked, tars=os.path.relpath(shards)))  # the same ones
    of_its_size, table = tmp_path / "shards" / "00001.tar", tmp_path / "pairs.csv"
    os.utime(of_its_size, (0, 0))
    with pytest.raises(UserError, match="files that changed since"):
        prepare(asked)
    table.write_text("image,caption\na.jpg,a\n")
    digests = set()
    for change in (0, 1):
        os.utime(table, (change, change))
        (part,) = prepare_inputs.table_parts(str(table), 10, image_key="image", caption_key="caption", image_root="")
        digests.add(part.digest)
    assert len(digests) == 2


@pytest.mark.parametrize("suffix", [".jpg", ".txt", ".json"])
def test_a_folder_whose_images_or_captions_changed_is_another_input(tmp_path, inline, suffix):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(picture(0))
    (tmp_path / "in" / "0.txt").write_text("a wrong caption")
    asked = job(data_dir=str(tmp_path), folder=str(tmp_path / "in"))
    prepare(asked)
    (tmp_path / "in" / f"0{suffix}").write_bytes(b'{"caption": "another"}')
    with pytest.raises(UserError, match="files that changed since"):
        prepare(asked)


def test_two_jobs_do_not_write_one_dataset(shards, tmp_path, inline, monkeypatch):
    asked = job(data_dir=str(tmp_path), tars=shards)

    def meanwhile(function, tasks, **_):
        with pytest.raises(UserError, match=r"another process is preparing .*pairs/1.0.0"):
            prepare(asked)
        return (attempt(function, task) for task in tasks)

    monkeypatch.setattr(prepare_module, "run", meanwhile)
    prepare(asked)


def test_a_file_system_without_locks_costs_a_warning(shards, tmp_path, inline, monkeypatch, caplog):
    def without(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", without)
    folder = prepare(job(data_dir=str(tmp_path), tars=shards))
    assert manifest(folder)["records"] == 32
    assert "has no locks (Function not implemented)" in caplog.text


def test_a_shard_that_cannot_be_read_does_not_cost_the_others(shards, tmp_path, monkeypatch):
    gone = tmp_path / "shards" / "00001.tar"
    kept = tmp_path / "kept.tar"

    def lose(function, tasks, **_):
        gone.rename(kept)
        return (attempt(function, task) for task in tasks)

    monkeypatch.setattr(prepare_module, "run", lose)
    asked = job(data_dir=str(tmp_path), tars=shards)
    with pytest.raises(UserError, match=r"1 of 4 shards could not be made, such as: .*00001.tar: No such file"):
        prepare(asked)
    assert len(list((asked.unfinished / "work").glob("*.done.json"))) == 3
    kept.rename(gone)
    monkeypatch.setattr(prepare_module, "run", lambda function, tasks, **_: (attempt(function, task) for task in tasks))
    prepare(asked)
    assert len(open_prepared(tmp_path)) == 32


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_kills_the_workers(tmp_path, slow_shards):
    process = subprocess.Popen(
        command(tmp_path, slow_shards), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    work = tmp_path / "pairs" / "1.0.0.preparing" / "work"
    while not list(work.glob("*.done.json")) and process.poll() is None:
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert re.fullmatch(r"error: stopped with \d of 6 shards done; the same command goes on from there\n", stderr)
    assert process.returncode == 2
    assert not psutil.wait_procs(workers, timeout=10)[1]


# The disk, workers, mistakes


def tmpfs_command(folder, size, arguments):
    """A command that sees a file system of its own, of so many bytes, in a folder."""
    script = f"mount -t tmpfs -o size={size} tmpfs {folder} && shift 0; " + '"$@"; code=$?; ls -A '
    script += f"{folder}/pairs/1.0.0.preparing >&2; exit $code"
    return ["unshare", "-rm", "sh", "-c", script, "sh", *arguments]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, slow_shards):
    (tmp_path / "small").mkdir()
    probe = subprocess.run(tmpfs_command(tmp_path / "small", "1m", ["true"]), capture_output=True, check=False)
    if b"mount" in probe.stderr or b"unshare" in probe.stderr:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        tmpfs_command(tmp_path / "small", "1m", command(tmp_path / "small", slow_shards)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    error, *left = done.stderr.splitlines()
    assert re.fullmatch(
        r"error: cannot write .*array_record-0000\d-of-00006: No space left on device; .*run the same command again: "
        r"it goes on with the shards that are missing",
        error,
    )
    assert done.returncode == 2
    assert left == ["work"]


def test_a_shard_that_cannot_be_written_ends_the_job(shards, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    tried = []

    def count(function, tasks, **_):
        for task in tasks:
            tried.append(task)
            yield attempt(function, task)

    monkeypatch.setattr(prepare_module, "run", count)
    monkeypatch.setattr("clip_jax.data.prepare_shard._sha256", full)
    with pytest.raises(OutputError, match="cannot write .*00000-of-00004: No space left on device"):
        prepare(job(data_dir=str(tmp_path), tars=shards))
    assert len(tried) == 1
    assert not list((tmp_path / "pairs").rglob("*.tmp"))


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="a worker process died, perhaps for want of memory; .*--workers"):
        list(run(os._exit, [1, 1], workers=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name one input: --tars, --folder or --table"),
        (("--tars=a.tar", "--folder=b"), "and not tars and folder"),
        (("--tars=absent.tar",), "absent.tar: No such file or directory; take it out"),
        (("--tars=absent/*.tar",), "no file is called .*absent/"),
        (("--folder=absent",), "absent is not a folder"),
        (("--folder=.",), "holds no images"),
        (("--folder=s3://bucket/a",), "--folder=s3://bucket/a: it must be on a disk"),
        (("--table=a.csv", "--image-root=s3://b"), "--image-root=s3://b: it must be on a disk"),
        (("--table=absent.csv",), "--table=.*absent.csv"),
        (("--table=s3://bucket/a.csv",), "local disks only"),
        (("--table=a.csv", "--captions", "txt"), "--captions has no meaning with --table"),
        (("--tars=ok.tar", "--image-key=x"), "--image-key has no meaning with --tars"),
        (("--tars=ok.tar", "--per-shard=5"), "--per-shard has no meaning with --tars"),
        (("--tars=ok.tar", "--captions", "text"), "--captions holds 'text'"),
        (("--tars=ok.tar", "--filters", "a=3"), "--filters holds 'a=3'"),
        (("--tars=ok.tar", "--uids=absent.npy"), "--uids=.*absent.npy"),
        (("--tars=ok.tar", "--quality=0"), "--quality=0: it must be from 1 to 100"),
        (("--tars=ok.tar", "--short-side=0"), "--short-side=0: it must be positive"),
        (("--tars=ok.tar", "--version=1"), "'1' is no version of a dataset"),
        (
            ("--tars=ok.tar", "--data-dir=gs://bucket/x"),
            "--data-dir=gs://bucket/x: it must be on a disk, or on a share",
        ),
        (("--tars=ok.tar", "--data-dir=ok.tar"), "cannot write .*/ok.tar/pairs/1.0.0.preparing: Not a directory"),
        (("--tars=ok.tar", "--workers=-1"), "--workers=-1: it must be positive"),
        (("--tars=ok.tar", "--address=auto"), "--address=auto is for --runner=ray"),
        (("--tars=ok.tar", "--runner=ray", "--workers=2"), "--workers=2 is for --runner=pool"),
        (("--tars=ok.tar", "--runner=rays"), "no runner 'rays'; did you mean 'ray'"),
        (("--tars=ok.tar", "--runner=ray"), r'needs Ray .*pip install "ray>=2.60"'),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    write_shard(tmp_path / "ok.tar", range(1))
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", "pairs", "--data-dir=out", *options])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{message}", line)
    assert not list(tmp_path.rglob("*.array_record*"))


def test_a_name_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["data", "prepare", "my-pairs", f"--tars={write_shard(tmp_path / 'a.tar', range(1))}"])
    assert "'my-pairs' is no name of a dataset" in capsys.readouterr().err


def test_workers_never_import_tensorflow_or_jax(shards, tmp_path):
    code = (
        "import sys; from clip_jax.data import prepare as p; from clip_jax.data.prepare_shard import ShardSettings\n"
        "p.run = lambda f, tasks, **_: (f(task) for task in tasks)\n"
        f"job = p.Job('pairs', data_dir={str(tmp_path)!r}, tars={shards!r}, settings=ShardSettings(short_side=8))\n"
        "p.prepare(job)\n"
        "print({'jax', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
