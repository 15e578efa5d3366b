"""Embeddings: every record once whatever happens, bad ones named, vectors those of the model."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from search_fixtures import BAD, GOOD, MODEL, bomb, picture, write_pictures
from tars import add, write_shard, write_shards

import clip_jax
from clip_jax import cli
from clip_jax.data.folder_source import FolderSource
from clip_jax.errors import UserError
from clip_jax.evals.store import VectorStore, vectors_of
from clip_jax.search.embed import EmbedOptions, embed, open_images
from clip_jax.search.index import build_index

ROOT = Path(__file__).parent.parent


def rows_of(folder, kind="images"):
    """All rows in order, as dicts."""
    return [row for table in VectorStore(str(folder)).tables(kind) for row in table.to_pylist()]


def run(source, folder, model, **options):
    chosen = EmbedOptions(**{"shard": 8, "batch": 8, "threads": 2} | options)
    return embed(source, str(folder), model=model, model_source="small", options=chosen)


def test_vectors_are_the_models(vectors, pictures, model):
    rows = rows_of(vectors)
    assert [row["key"] for row in rows] == [key for key in FolderSource(pictures)._paths if "/" in key]
    images = model.preprocess([pictures / row["key"] for row in rows])
    expected = np.asarray(model.encode_image(images, normalize=True))
    found = np.array([row["embedding"] for row in rows], np.float32)
    np.testing.assert_allclose(found, expected, atol=1e-3)  # half precision
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    texts = rows_of(vectors, "texts")
    assert [text["record"] for text in texts] == [row["record"] for row in rows for _ in range(2)]
    assert [text["caption"] for text in texts[:2]] == ["picture number 0", "another text of 0"]
    tokens = model.tokenize([text["caption"] for text in texts])
    found = np.array([text["embedding"] for text in texts], np.float32)
    np.testing.assert_allclose(found, np.asarray(model.encode_text(tokens, normalize=True)), atol=1e-3)


def test_any_reader_of_parquet_reads_the_shards(vectors):
    table = parquet.read_table(vectors / "images-00000.parquet")
    assert str(table.schema.field("embedding").type) == f"fixed_size_list<element: halffloat>[{MODEL.embed_dim}]"
    assert table.schema.names == ["record", "key", "caption", "thumbnail", "embedding"]
    assert vectors_of(table).shape == (table.num_rows, MODEL.embed_dim)
    assert all(row["thumbnail"].startswith(b"\xff\xd8\xff") for row in table.to_pylist())


def test_what_cannot_be_used_is_named(vectors, pictures):
    manifest = json.loads((vectors / "manifest.json").read_text())
    assert manifest["rows"] == {"images": GOOD, "texts": 2 * GOOD}
    assert manifest["rejected"] == {"image_damaged": 2, "image_too_large": 1}
    assert manifest["records"] == GOOD + BAD
    rejects = [reject for file in sorted(vectors.glob("0*.json")) for reject in json.loads(file.read_text())["rejects"]]
    assert {reject["where"] for reject in rejects} == {
        str(pictures / name) for name in ("damaged.jpg", "empty.png", "vast.png")
    }
    assert all(reject["message"] for reject in rejects)


def test_large_images_of_16_bit_grey_are_embedded(model, tmp_path):
    """Many times larger than their thumbnails."""
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((900, 900), 30_000, np.uint16)).save(tmp_path / "in" / "grey.png")
    run(FolderSource(tmp_path / "in"), tmp_path / "out", model)
    [row] = rows_of(tmp_path / "out")
    assert Image.open(io.BytesIO(row["thumbnail"])).size == (192, 192)


def test_captions_on_a_share_that_does_not_answer_are_not_taken_for_none(tmp_path, model, monkeypatch):
    write_pictures(tmp_path / "in", 1)
    read = Path.read_bytes

    def lost(path):
        if path.name == "000.json":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", lost)
    with pytest.raises(UserError, match=r"000.json cannot be read: Input/output error; when it can"):
        run(FolderSource(tmp_path / "in"), tmp_path / "out", model, kinds=("images", "texts"))


@pytest.mark.parametrize("devices_do_not_divide", [3, 8])
def test_batches_do_not_matter(devices_do_not_divide, pictures, vectors, model, tmp_path):
    run(FolderSource(pictures), tmp_path, model, batch=devices_do_not_divide, kinds=("images",))
    found = np.array([row["embedding"] for row in rows_of(tmp_path)], np.float32)
    np.testing.assert_allclose(found, [row["embedding"] for row in rows_of(vectors)], atol=1e-3)


def test_two_slices_make_what_one_process_makes(pictures, vectors, model, tmp_path):
    source, options = FolderSource(pictures), EmbedOptions(kinds=("images", "texts"), shard=8, batch=8)
    made = []
    for index in (1, 0):
        found = embed(
            source, str(tmp_path), model=model, model_source="m", options=options, process_index=index, process_count=2
        )
        made.append(found.shards)
        assert (found.manifest is None) == (index == 1)
    assert made == [2, 3]
    for kind in ("images", "texts"):
        assert rows_of(tmp_path, kind) == rows_of(vectors, kind)


def test_what_is_there_is_not_made_again_and_what_is_damaged_is(pictures, model, tmp_path):
    source = FolderSource(pictures)
    assert run(source, tmp_path, model).shards == 5
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(source, tmp_path, model).shards == 0
    (tmp_path / "images-00002.parquet").write_bytes(whole["images-00002.parquet"][:100])
    (tmp_path / "00003.json").unlink()
    assert run(source, tmp_path, model).shards == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    for name in ("left", "begun"):
        (tmp_path / f".{name}.tmp").touch()
    os.utime(tmp_path / ".left.tmp", (0, 0))
    assert run(source, tmp_path, model).shards == 0
    assert {path.name for path in tmp_path.iterdir()} == {*whole, ".begun.tmp"}  # another process's


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "float32"}, "dtype 'float16' -> 'float32'"), ({"shard": 4}, "shard_records 8 -> 4")],
)
def test_another_job_in_the_same_folder_is_refused(options, message, pictures, vectors, model):
    with pytest.raises(UserError, match=message):
        run(FolderSource(pictures), vectors, model, kinds=("images", "texts"), **options)


def test_a_folder_whose_job_is_damaged_is_refused(tmp_path):
    (tmp_path / "job.json").write_text('{"half')
    with pytest.raises(UserError, match=r"job\.json is damaged, so that nobody knows what lies beside it"):
        VectorStore(str(tmp_path)).begin({"model": "another"})
    assert (tmp_path / "job.json").read_text() == '{"half'


def test_another_precision_is_refused(pictures, vectors, model_dir):
    half = clip_jax.load(model_dir, dtype="bfloat16")
    with pytest.raises(UserError, match=r"another job \(model\.compute 'float32' -> 'bfloat16'\)"):
        run(FolderSource(pictures), vectors, half, kinds=("images", "texts"))


def test_a_folder_that_grew_is_refused(model, tmp_path):
    write_pictures(tmp_path / "in", 3)
    run(FolderSource(tmp_path / "in"), tmp_path / "out", model)
    (tmp_path / "in" / "new.png").write_bytes(picture(9))
    with pytest.raises(UserError, match=r"another job \(data\.paths .* data\.records 3 -> 4"):
        run(FolderSource(tmp_path / "in"), tmp_path / "out", model)


@pytest.mark.parametrize("suffix", [".json", ".txt"])
def test_captions_of_a_folder_that_changed_are_refused(suffix, model, tmp_path):
    write_pictures(tmp_path / "in", 3)
    run(FolderSource(tmp_path / "in"), tmp_path / "out", model)
    (tmp_path / "in" / "even" / "002.png").with_suffix(suffix).write_text('{"caption": "mended"}')
    with pytest.raises(UserError, match=r"another job \(state "):
        run(FolderSource(tmp_path / "in"), tmp_path / "out", model)


@pytest.mark.parametrize("name", ["", "pairs.csv", "pairs.parquet", "pairs.tar"])
def test_data_that_changed_under_the_same_names_are_refused(name, model, tmp_path):
    """By what is kept of them alone: what a checkpoint or a result says of its data holds for a copy too."""
    data = tmp_path / "in"
    data.mkdir()

    def write(number):
        (data / "0.png").write_bytes(picture(number))
        (data / "pairs.csv").write_text(f"image,caption\n0.png,{number}\n")
        parquet.write_table(pyarrow.table({"image": [picture(number)], "caption": ["c"]}), data / "pairs.parquet")
        write_shard(data / "pairs.tar", [number])
        return open_images(str(data / name), model)

    before = write(1)
    run(before, tmp_path / "out", model)
    run(open_images(str(data / name), model), tmp_path / "out", model)
    after = write(2)
    assert after.fingerprint == before.fingerprint
    with pytest.raises(UserError, match=r"another job \(state '\w+' -> '\w+'\)"):
        run(after, tmp_path / "out", model)


def test_no_usable_record_at_all_is_an_error_with_the_commonest_reason(model_dir, tmp_path, capsys):
    """Told by the slice that finishes last, and again when it is started again."""
    (tmp_path / "0.png").write_bytes(b"damaged")
    (tmp_path / "pairs.csv").write_text("image,caption\n0.png,a\n1.png,b\n2.png,c\n")
    arguments = ["embed", str(tmp_path / "pairs.csv"), str(tmp_path / "out"), "--model", str(model_dir), "--shard=2"]
    cli.main([*arguments, "--slice=0/2"])
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_code:
            cli.main([*arguments, "--slice=1/2"])
        assert exit_code.value.code == 2
        error = capsys.readouterr().err
        assert "none of the 3 records can be used: 2 for image_missing, such as row 1 of " in error
        assert f"{tmp_path}/1.png cannot be read: " in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
def test_killed_and_continued_is_uninterrupted(model_dir, tmp_path):
    """A real process, killed without warning as soon as it has made some shards."""
    write_pictures(tmp_path / "in", 60)
    command = [sys.executable, "-m", "clip_jax.cli", "embed", str(tmp_path / "in"), str(tmp_path / "out")]
    command += ["--model", str(model_dir), "--shard", "2", "--batch", "2", "--kinds", "images,texts", "--slice", "0/1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "out").glob("0*.json"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*.json")}
    assert 3 <= len(made) < 30
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match="not complete; run the same clip-jax embed again"):
        VectorStore(str(tmp_path / "out")).read_manifest()
    (tmp_path / "out" / "images-00029.parquet.1.2.tmp").write_bytes(b"left over")
    for left_over in (tmp_path / "out").glob("*.tmp"):
        os.utime(left_over, (0, 0))

    cli.main(command[3:])
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    cli.main([*command[3:5], str(tmp_path / "straight"), *command[6:]])
    for kind in ("images", "texts"):
        rows = rows_of(tmp_path / "out", kind)
        assert [row["record"] for row in rows] == sorted(list(range(60)) * (2 if kind == "texts" else 1))
        straight = rows_of(tmp_path / "straight", kind)
        assert [row["key"] for row in rows] == [row["key"] for row in straight]
        np.testing.assert_allclose(
            np.array([row["embedding"] for row in rows], np.float32),
            [row["embedding"] for row in straight],
            atol=1e-3,
        )
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_names_that_are_not_utf8(model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"\xff.png")).write_bytes(picture(1))
    (tmp_path / "in" / os.fsdecode(b"\xfe.png")).write_bytes(b"damaged")
    assert run(FolderSource(tmp_path / "in"), tmp_path / "out", model).rejected == {"image_damaged": 1}
    assert [row["key"] for row in rows_of(tmp_path / "out")] == ["?.png"]


def test_a_link_that_leads_nowhere_costs_its_own_record(model, tmp_path):
    write_pictures(tmp_path / "in", 1)
    (tmp_path / "in" / "gone.png").symlink_to("nowhere.png")
    assert run(FolderSource(tmp_path / "in"), tmp_path / "out", model).rejected == {"image_missing": 1}


def test_a_remote_folder(pictures, vectors, model, tmp_path):
    """fsspec's own store stands for any: embedded, continued and indexed there."""
    folder = f"memory://{tmp_path.name}/vectors"
    assert run(FolderSource(pictures), folder, model, kinds=("images", "texts")).shards == 5
    assert rows_of(folder, "texts") == rows_of(vectors, "texts")
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}/vectors/00001.json")
    assert run(FolderSource(pictures), folder, model, kinds=("images", "texts")).shards == 1
    assert build_index(folder, tmp_path / "index")["vectors"] == folder


def test_tar_shards(model, tmp_path):
    pattern = write_shards(tmp_path / "shards", [5, 7])
    with tarfile.open(tmp_path / "shards" / "00002.tar", "w") as tar:  # without captions; one has a long name
        add(tar, "deep/" * 30 + "x.jpg", picture(1, kind="JPEG"))
        add(tar, "b.png", bomb())
    section = f"source=tars,shards={pattern}::{tmp_path}/shards/00002.tar"
    run(open_images(section, model), tmp_path / "out", model, kinds=("images", "texts"))
    rows = rows_of(tmp_path / "out")
    assert [row["key"] for row in rows[:6]] == [f"00000/{i:06d}" for i in range(5)] + ["00001/000005"]
    assert rows[12]["key"] == "00002/" + "deep/" * 30 + "x"
    assert [row["caption"] for row in rows[11:]] == ["number 11", None]
    assert [row["caption"] for row in rows_of(tmp_path / "out", "texts")] == [f"number {i}" for i in range(12)]
    source = open_images(section, model)
    (tmp_path / "shards" / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001\.tar.*run the same command again"):
        run(source, tmp_path / "other", model)


def test_tables_and_tfds(model, tmp_path, digits_dir):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "pairs.csv").write_text("image,caption\n2.png,two\nnone.png,missing\n0.png,zero\n")
    found = run(open_images(str(tmp_path / "pairs.csv"), model), tmp_path / "table", model)
    assert found.rejected == {"image_missing": 1}
    assert [(row["record"], row["key"], row["caption"]) for row in rows_of(tmp_path / "table")] == [
        (0, "2.png", "two"),
        (2, "0.png", "zero"),
    ]
    (tmp_path / "only.csv").write_text("image\n2.png\n")
    source = open_images(f"source=table,table={tmp_path}/only.csv,caption_key=", model)
    run(source, tmp_path / "only", model)
    assert [row["caption"] for row in rows_of(tmp_path / "only")] == [None]

    section = f"source=tfds,dataset=digits,split=test[:20],data_dir={digits_dir},caption_key="
    run(open_images(section, model), tmp_path / "digits", model)
    assert [row["key"] for row in rows_of(tmp_path / "digits")] == [str(i) for i in range(20)]
    with pytest.raises(UserError, match=r"another job \(data\.caption_key"):
        run(open_images(section.removesuffix(",caption_key="), model), tmp_path / "digits", model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{none}"], "is not a folder"),
        (["{empty}"], "holds no images (files that end in avif, bmp, gif, jpeg, jpg, pgm, png, ppm, "),
        (["source=tras"], "config.data.source is 'tras'; it must be one of"),
        (["sorce=tars"], "did you mean 'source'?"),
        (["{pictures}", "--kinds=image"], "--kinds=image: it must be images, texts, or images,texts"),
        (["{pictures}", "--slice=2/2"], "--slice=2/2: it must be I/N with I from 0 to N - 1"),
        (["{pictures}", "--batch=0"], "--batch is 0; it must be positive"),
        (["{pictures}", "--thumbnail=5000"], "--thumbnail is 5000; it must be from 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, pictures, model_dir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    names = {"none": tmp_path / "none", "empty": tmp_path / "empty", "pictures": pictures}
    data, *options = [argument.format(**names) for argument in arguments]
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["embed", data, str(tmp_path / "out"), "--model", str(model_dir), *options])
    assert exit_code.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
