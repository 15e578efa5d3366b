"""Tables of images and captions."""

import pickle

import pyarrow
import pytest
from pyarrow import parquet
from tars import picture

from clip_jax.data.records import RecordError
from clip_jax.data.table_source import TableSource
from clip_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture(number))
    return tmp_path


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
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


def test_what_cannot_be_used_has_its_reason(folder):
    path = folder / "pairs.csv"
    path.write_bytes(b"image,caption\nimages/9.jpg,x\n,x\nimages/1.jpg,caf\xe9\n")
    table = TableSource(path)
    for row, reason in enumerate(("image_missing", "image_missing", "caption_unreadable")):
        with pytest.raises(RecordError) as caught:
            table[row]
        assert caught.value.reason == reason


def test_what_is_no_such_table_is_refused(folder):
    path = folder / "pairs.csv"
    path.write_text("filepath,title\nimages/0.jpg,x\n")
    with pytest.raises(UserError, match="no column 'image'.*it has filepath, title.*config.data.image_key"):
        TableSource(path)
    for name in ("absent.csv", "pairs.txt"):
        with pytest.raises(UserError, match=f"config.data.table=.*{name}"):
            TableSource(folder / name)
