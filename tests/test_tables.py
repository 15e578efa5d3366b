"""Tables of images and captions."""

import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tars import picture
from tiny import TINY

from clip_jax.config import DataConfig
from clip_jax.data.loader import open_source
from clip_jax.data.records import RecordError
from clip_jax.data.table_source import TableSource
from clip_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture(number))
    return tmp_path


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t"), ("csv", "\t")])
def test_rows_of_text_tables(folder, suffix, separator):
    rows = [("filepath", "title"), ("images/0.jpg", '"one\nline, or two"'), ("images/2.jpg", "naïve")]
    path = folder / f"pairs.{suffix}"
    path.write_text("\n".join(separator.join(row) for row in rows) + "\n", encoding="utf-8")
    table = TableSource(path, image_key="filepath", caption_key="title")
    assert len(table) == 2
    assert table[0] == (picture(0), ("one\nline, or two",), (), -1)
    assert pickle.loads(pickle.dumps(table))[1].captions == ("naïve",)
    assert table.where(1) == f"row 1 of {path}"


def test_parquet_may_hold_the_images_and_several_captions(folder):
    path = folder / "pairs.parquet"
    columns = {"image": [picture(5), picture(6)], "caption": [["a", "b"], ["c"]]}
    parquet.write_table(pyarrow.table(columns), path)
    table = TableSource(path)
    assert [record.captions for record in (table[0], table[1])] == [("a", "b"), ("c",)]
    assert table[1].image == picture(6)
    parquet.write_table(pyarrow.table({"image": ["1.jpg"], "caption": ["d"]}), path)
    assert TableSource(path, image_root=str(folder / "images"))[0].image == picture(1)


def test_of_several_captions_the_blank_ones_are_not_drawn(folder):
    path = folder / "pairs.parquet"
    parquet.write_table(pyarrow.table({"image": ["1.jpg"] * 2, "caption": [["", "a", None, " "], ["", "\n"]]}), path)
    table = TableSource(path, image_root=str(folder / "images"))
    assert {table[0].draw_caption(np.random.default_rng(seed)) for seed in range(20)} == {"a"}
    assert table[0].first_caption() == "a"
    with pytest.raises(RecordError, match="the caption is empty"):
        table[1].draw_caption(np.random.default_rng(0))
    record = table[0]._replace(captions=(" ", "a", "b"), shares=(8.0, 1.0, 3.0))
    drawn = [record.draw_caption(np.random.default_rng(seed)) for seed in range(1_000)]
    assert 210 < drawn.count("a") < 290
    assert drawn.count("a") + drawn.count("b") == 1_000


def test_parquet_of_hugging_face_has_structs_of_bytes_and_path(folder):
    path = folder / "train.parquet"
    images = [
        {"bytes": picture(5), "path": "nowhere.jpg"},
        {"bytes": None, "path": "images/1.jpg"},
        {"bytes": b"", "path": None},
        None,
    ]
    parquet.write_table(pyarrow.table({"image": images, "caption": ["a", "b", "c", "d"]}), path)
    table = TableSource(path)
    assert [table[row] for row in (0, 1)] == [(picture(5), ("a",), (), -1), (picture(1), ("b",), (), -1)]
    assert [table.key(row) for row in range(4)] == ["0", "images/1.jpg", "2", "3"]
    for row in (2, 3):
        with pytest.raises(RecordError, match="the row names no image"):
            table[row]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary"])
def test_every_type_of_text_is_read(folder, kind):
    texts = pyarrow.array(["images/1.jpg", None])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    columns = {"image": texts, "caption": ["a", "b"], "bytes": [picture(1)] * 2}
    columns |= {"text": texts, "texts": [["c"], []], "none": pyarrow.nulls(2)}
    path = folder / "pairs.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert TableSource(path).key(0) == ("0" if "binary" in kind else "images/1.jpg")
    for name, captions in (("text", [("images/1.jpg",), ()]), ("texts", [("c",), ()]), ("none", [(), ()])):
        table = TableSource(path, image_key="bytes", caption_key=name)
        assert [table[row].captions for row in (0, 1)] == captions


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("image", [5], "holds int64 in its column 'image'; config.data.image_key must name a column of paths, of enc"),
        ("image", [["a.jpg"]], "holds list<element: string> in its column 'image'"),
        ("image", [{"url": "a.jpg"}], "holds struct<url: string> in its column 'image'"),
        ("image", [{"bytes": [1, 2]}], "holds struct<bytes: list<element: int64>> in its column 'image'"),
        ("caption", [5], "holds int64 in its column 'caption'; config.data.caption_key must name a column of texts"),
        ("caption", [[{"raw": "a"}]], "holds list<element: struct<raw: string>> in its column 'caption'"),
    ],
)
def test_columns_that_hold_something_else_are_refused(folder, column, values, message):
    path = folder / "pairs.parquet"
    parquet.write_table(pyarrow.table({"image": ["a.jpg"], "caption": ["a"]} | {column: values}), path)
    with pytest.raises(UserError, match=re.escape(message)):
        TableSource(path)


def test_threads_of_a_worker_read_the_table_once(folder, monkeypatch):
    """All of it is in memory while it is read, several times over where each thread does."""
    path = folder / "pairs.csv"
    path.write_text("image,caption\n" + "images/1.jpg,x\n" * 4)
    table = pickle.loads(pickle.dumps(TableSource(path)))
    read, reads = TableSource._read, []

    def slowly(self):
        reads.append(1)
        time.sleep(0.1)
        return read(self)

    monkeypatch.setattr(TableSource, "_read", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert [record.captions for record in pool.map(table.__getitem__, range(4))] == [("x",)] * 4
    assert len(reads) == 1


def test_other_columns_of_a_text_table_play_no_part(folder):
    path = folder / "pairs.csv"
    rows = "".join(f"images/1.jpg,{number},{number}\n" for number in range(1_000))
    path.write_text(f"image,caption,other\n{rows}images/1.jpg,last,not a number\n")
    table = TableSource(path)
    assert (len(table), table[1_000].captions) == (1_001, ("last",))
    path.write_text(f"image,caption,other\nimages/1.jpg,x,{'y' * 3_000_000}\n" + rows)
    with pytest.raises(UserError, match=r"straddl.*; is a quotation mark not closed\?"):
        TableSource(path)


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_rows_behind_an_open_quotation_mark_are_told_of(folder, caplog, delimiter):
    path = folder / "pairs.csv"
    captions = ["a", '"b', "c", "d", 'e" x', "f", '"g', "h"]
    rows = [("image", "caption"), *((f"images/{i}.jpg", text) for i, text in enumerate(captions))]
    path.write_text("\n".join(map(delimiter.join, rows)))
    assert len(TableSource(path)) == 4
    (message,) = caplog.messages
    assert "4 row(s) seem to lie within captions, the first in that of row 1 (images/1.jpg): is a quotation" in message
    caplog.clear()
    path.write_text('image,caption\nimages/1.jpg,"A dog, running\non grass, happy"\nimages/2.jpg,"He said ""x""\n"')
    assert len(TableSource(path)) == 2
    assert not caplog.messages


def test_what_cannot_be_used_has_its_reason(folder):
    path = folder / "pairs.csv"
    path.write_bytes(b"image,caption\nimages/9.jpg,x\n,x\nimages/1.jpg,caf\xe9\n")
    nested = [b"images/1.jpg,&" + 20 * entity + b"\n" for entity in (b"amp;", b"AMP;", b"#38;", b"#x0026;")]
    path.write_bytes(path.read_bytes() + b"".join(nested))  # thousands of them take seconds to clean
    table = TableSource(path)
    for row, reason in enumerate(("image_missing", "image_missing", *["caption_unreadable"] * 5)):
        with pytest.raises(RecordError) as caught:
            table[row]
        assert caught.value.reason == reason


def test_texts_of_parquet_that_are_not_utf_8_cost_their_own_pairs(folder):
    texts = pyarrow.array([b"images/1.jpg", b"caf\xe9"])
    unchecked = pyarrow.Array.from_buffers(pyarrow.string(), 2, texts.buffers())
    several = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2], pyarrow.int32()), unchecked)
    paths = pyarrow.array(["images/0.jpg"] * 2)
    for images, captions, reason in (
        (paths, unchecked, "caption_unreadable"),
        (paths, several, "caption_unreadable"),
        (unchecked, paths, "image_missing"),
    ):
        parquet.write_table(pyarrow.table({"image": images, "caption": captions}), folder / "pairs.parquet")
        table = TableSource(folder / "pairs.parquet")
        assert table[0].captions
        with pytest.raises(RecordError, match="the (caption|image) is not UTF-8") as caught:
            table[1]
        assert caught.value.reason == reason
        assert sum(map(len, table.by_image())) == 2


def test_what_is_no_such_table_is_refused(folder):
    path = folder / "pairs.csv"
    path.write_text("filepath,title\nimages/0.jpg,x\n")
    with pytest.raises(UserError, match="no column 'image'.*filepath.*config.data.image_key, .*,image_key=…$"):
        TableSource(path)
    path.write_text("image,caption,other,caption,other\nimages/0.jpg,x,y,z,u\n")
    parquet.write_table(pyarrow.table([["a"]] * 3, names=["image", "caption", "caption"]), folder / "pairs.parquet")
    for twice in (path, folder / "pairs.parquet"):
        with pytest.raises(UserError, match=f"{twice} has 2 columns 'caption'; rename .* config.data.caption_key$"):
            TableSource(twice)
        assert len(TableSource(twice, caption_key="")) == 1
    for key in ("", "caption"):
        with pytest.raises(UserError, match=f"config.data.image_key is '{key}'; it must name the column of images"):
            TableSource(path, image_key=key)
    for key in ("table", "image_root"):
        section = DataConfig(**{"source": "table", "table": str(path), key: "s3://bucket/a.csv"})
        with pytest.raises(UserError, match=f"^config.data.{key}=s3://bucket/a.csv: it must be on a disk"):
            open_source(TINY, section)
    for name in ("absent.csv", "pairs.txt"):
        with pytest.raises(UserError, match=f"config.data.table=.*{name}"):
            TableSource(folder / name)
    path.write_bytes(b"image,caption,caf\xe9\nimages/0.jpg,x,y\n")
    with pytest.raises(UserError, match=r"pairs.csv: it has names of columns that are not UTF-8 .*; save it as UTF-8$"):
        TableSource(path)
