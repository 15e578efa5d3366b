"""Datasets prepared as TFRecord, converted to ArrayRecord: the same records, and nothing lost on the way."""

import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax.cli import main
from clip_jax.data.convert import convert
from clip_jax.data.tfds_source import TfdsSource, file_formats
from clip_jax.errors import UserError

ROOT = Path(__file__).parents[1]
BUILD = """
import sys
from clip_jax.data.build import load_tensorflow_quietly
load_tensorflow_quietly()
from clip_jax.data.digits.builder import Digits
Digits(data_dir=sys.argv[1]).download_and_prepare(file_format="tfrecord")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The digits, prepared by TFDS as TFRecord."""
    root = tmp_path_factory.mktemp("tfrecord")
    subprocess.run([sys.executable, "-c", BUILD, str(root)], cwd=ROOT, check=True, capture_output=True, timeout=300)
    return root


@pytest.fixture
def tfrecords(built, tmp_path):
    """A copy of them."""
    subprocess.run(["cp", "-r", f"{built}/digits", str(tmp_path)], check=True)
    return tmp_path


def records(root):
    sources = (TfdsSource("digits", split, data_dir=str(root), label_key="label") for split in ("train", "test"))
    return [source[i] for source in sources for i in range(len(source))]


def test_the_command_that_the_error_names_makes_the_dataset_readable(tfrecords, digits_dir, capsys):
    """Every record as in a dataset that was built as ArrayRecord; TFDS reads both, and the originals are untouched."""
    import tensorflow_datasets as tfds

    folder = tfrecords / "digits" / "1.0.0"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as caught:
        records(tfrecords)
    command = re.search(r"convert it with: clip-jax (.*)$", str(caught.value))[1]
    main([*shlex.split(command), "--workers=1"])
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert sorted(records(tfrecords)) == sorted(records(digits_dir))
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info.pop("alternativeFileFormats") == ["array_record"]
    assert info == json.loads(before.pop("dataset_info.json"))
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 3
    assert tfds.builder_from_directory(str(folder)).info.file_format.value == "tfrecord"
    assert convert("digits", str(tfrecords)) == folder  # and nothing to do


@pytest.mark.slow
def test_what_is_damaged_or_lost_is_named_and_announces_nothing(tfrecords):
    """A flipped bit; then, with that file made good, another that lacks records: the good one is kept."""
    folder = tfrecords / "digits" / "1.0.0"
    train, test = (folder / f"digits-{split}.tfrecord-00000-of-00001" for split in ("train", "test"))
    whole = train.read_bytes()
    train.write_bytes(whole[:50_000] + bytes([whole[50_000] ^ 1]) + whole[50_001:])
    with pytest.raises(
        UserError, match=r"digits-train.tfrecord-00000-of-00001 cannot be read: corrupted record.*what is"
    ):
        convert("digits", str(tfrecords), workers=1)
    train.write_bytes(whole)
    test.write_bytes(b"")
    with pytest.raises(UserError, match=r"digits-test.tfrecord-.* has 0 records, and its dataset_info.json says 300"):
        convert("digits", str(tfrecords), workers=1)
    assert file_formats(folder) == ["tfrecord"]
    assert [path.name for path in folder.glob("*array_record*")] == ["digits-train.array_record-00000-of-00001"]
    assert not list(folder.glob(".*"))


def test_two_processes_do_not_convert_the_same_dataset(tfrecords):
    folder = tfrecords / "digits" / "1.0.0"
    (begun := folder / ".x.tmp").touch()
    with (folder / "dataset_info.json").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"^another process is converting {folder}; wait for it, or end it$"):
            convert("digits", str(tfrecords), workers=1)
    assert begun.exists()


def test_what_cannot_be_converted_is_refused(tmp_path):
    with pytest.raises(UserError, match="'nothing' is not in"):
        convert("nothing", str(tmp_path))
    folder = tmp_path / "pairs" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{}")
    (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": "riegeli"}))
    with pytest.raises(UserError, match="prepared as riegeli; only tfrecord can be converted"):
        convert("pairs", str(tmp_path))
    assert os.listdir(folder.parent) == ["1.0.0"]
