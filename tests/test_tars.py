"""Tar shards: the index against tarfile, sources, windows through the pipeline, what is bad."""

import dataclasses
import errno
import gzip
import itertools
import json
import lzma
import os
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from batches import assert_same, side_by_side
from pyarrow import parquet
from tars import add, bad_shard, picture, write_shard, write_shards
from tiny import TINY

from clip_jax.cli import main
from clip_jax.config import DataConfig
from clip_jax.data import loader, storage, tar_counts, tar_source
from clip_jax.data.augment import Augment
from clip_jax.data.filters import Filter
from clip_jax.data.images import Preprocess
from clip_jax.data.labelled import open_labelled
from clip_jax.data.loader import open_part, open_tars
from clip_jax.data.order import FullShuffle, WindowShuffle
from clip_jax.data.patterns import expand
from clip_jax.data.pipeline import check_batches, eval_batches, train_batches
from clip_jax.data.reading import Part, WindowReader
from clip_jax.data.records import REASONS, UNREACHABLE, RecordError
from clip_jax.data.storage import Storage
from clip_jax.data.tar_index import SAMPLE, Member, Sidecars, index_samples, members, read_at
from clip_jax.data.tar_source import TarSource, read_ranges
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.data.transforms import FixedTransform, TrainTransform
from clip_jax.errors import ConfigError, OutageError, UserError

TRANSFORM = TrainTransform(Preprocess(size=8), Tokenizer(), context=16, augment=Augment())


def source(pattern, tmp_path, **options):
    return TarSource(pattern, index_dir=str(tmp_path / "index"), **options)


def captions(records):
    return [record.captions[0] for record in records]


def windowed(tars, seed=0, streams=4):
    return [Part(tars, WindowShuffle(tars.counts, seed=seed, streams=streams, block=4, window=2))]


def batches(parts, count, **options):
    stream = train_batches(parts, **{"transform": TRANSFORM, "batch": 8, "seed": 0} | options)
    taken = list(itertools.islice(stream, count))
    stream.close()
    return taken


def column(found, name):
    return np.concatenate([batch[name] for batch in found])


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", [7, 10, 1, 14])


# The index


def own_members(path):
    return [
        (member.name, member.data, member.size)
        for member in members(read_at(Storage(), str(path), path.stat().st_size))
    ]


def tarfile_members(path):
    with tarfile.open(path) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_tarfiles(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        add(tar, "a/b/0.jpg", b"x" * 700)
        add(tar, "empty.txt", b"")
        add(tar, "x" * 90 + "/" + "y" * 80 + ".txt", b"long name")
        if kind != tarfile.USTAR_FORMAT:
            add(tar, "z" * 300 + ".json", b"{}")
        add(tar, "ünïcode.txt", b"u")
        add(tar, "../../up.txt", b"up")
        add(tar, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.jpg", b"", type=tarfile.LNKTYPE, linkname="a/b/0.jpg")
        add(tar, "device.jpg", b"", type=tarfile.CHRTYPE)
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        add(tar, "sized.jpg", b"x" * 5_000, type=tarfile.SYMTYPE, linkname="it states a size and has no content")
        add(tar, "last.txt", b"1" * 512)
    assert own_members(path) == tarfile_members(path)
    assert len(own_members(path)) >= 5


def stating(header, size):
    """A header that states a size in other words, with its checksum."""
    header = bytearray(header)
    header[-512 + 124 : -512 + 136], header[-512 + 148 : -512 + 156] = size, b" " * 8
    header[-512 + 148 : -512 + 156] = b"%06o\0 " % sum(header[-512:])
    return bytes(header)


def test_sizes_in_base_256_and_in_extension_headers_are_read(tmp_path):
    info = tarfile.TarInfo("0.jpg")
    info.size, info.pax_headers = 700, {"size": "700"}
    gnu = stating(info.tobuf(tarfile.GNU_FORMAT), b"\x80" + (700).to_bytes(11, "big"))
    pax = stating(info.tobuf(tarfile.PAX_FORMAT), b"%011o\0" % 0)
    path = tmp_path / "a.tar"
    for header in (gnu, pax):
        path.write_bytes(header + b"x" * 1024 + bytes(1024))
        assert own_members(path) == tarfile_members(path) == [("0.jpg", len(header), 700)]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_sample_begins_with_the_extension_headers_of_its_first_file(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for name in ("0", "z" * 300):
            add(tar, f"{name}.jpg", picture(1))
            add(tar, f"{name}.txt", b"text")
    tars = source(str(tmp_path / "a.tar"), tmp_path)
    assert tars.key(1, tars.read_block(1, 1)) == "a/" + "z" * 300


def test_files_of_a_sample_are_consecutive_and_in_one_folder(tmp_path):
    for number, names in enumerate((("a/0.jpg", "b/0.txt"), ("0.jpg", "1.cls", "0.txt"))):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w") as tar:
            for name in names:
                add(tar, name, b"content")
        assert len(Sidecars(Storage(), str(tmp_path / "index")).get(str(path)).samples) == 2
    (huge,), _ = index_samples(iter([Member("0.jpg", 0, 512, 5 << 30)]))
    assert huge["image_size"] == 2**32 - 1, "too large to be read, and no error"


def test_what_lies_far_apart_is_read_in_pieces():
    asked = []

    class Asked(Storage):
        def read(self, path, start, length):
            asked.append((start, length))
            return b""

    samples = np.zeros(3, SAMPLE)
    samples["start"], samples["image"], samples["image_size"] = (0, 100 << 10, 10 << 20), 512, 1000
    read_ranges(Asked(), "a.tar", samples)
    assert asked == [(0, (100 << 10) + 1512), (10 << 20, 1512)]


def test_files_of_macos_and_names_without_extension_part_no_sample(tmp_path):
    """As in webdataset. macOS' tar puts a `._` file before every member, between the image and its caption too."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            for extension, content in (("JPG", picture(number)), ("txt", f"{number}".encode())):
                for name in (f"._{number}.{extension}", ".DS_Store", "README"):
                    add(tar, f"./folder/{name}", b"\0\5\x16\7")
                add(tar, f"./folder/{number}.{extension}", content)
    tars = source(str(tmp_path / "a.tar"), tmp_path)
    assert captions(tars[number] for number in range(len(tars))) == ["0", "1"]


def test_a_sidecar_is_made_once_and_again_when_the_shard_changes(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(3))
    sidecars = Sidecars(Storage(), str(tmp_path / "index"))
    assert len(sidecars.get(str(path)).samples) == 3
    kept = next((tmp_path / "index").iterdir())
    written = kept.stat().st_mtime_ns
    assert len(sidecars.get(str(path)).samples) == 3
    assert kept.stat().st_mtime_ns == written
    write_shard(path, range(5))
    assert len(sidecars.get(str(path)).samples) == 5
    kept.write_bytes(b"damaged")
    assert len(sidecars.get(str(path)).samples) == 5


# Sources


def test_records_are_the_samples_in_order(shards, tmp_path):
    tars = source(shards, tmp_path)
    assert tars.counts.tolist() == [7, 10, 1, 14]
    assert captions(tars[i] for i in range(32)) == [f"number {i}" for i in range(32)]
    assert tars[9].image == picture(9)
    assert json.loads(json.dumps(tars.fingerprint))["records"] == 32
    copy = pickle.loads(pickle.dumps(tars))
    assert captions(copy[i] for i in (0, 31)) == ["number 0", "number 31"]
    assert tars.where(17) == f"sample 0 of {tmp_path}/shards/00002.tar"


def test_a_read_goes_on_where_the_system_gives_less(tmp_path, monkeypatch):
    """Linux gives 2 GiB at most: of blocks of large images the rest was taken for cut off."""
    content, pread = bytes(range(250)), os.pread
    (tmp_path / "a.tar").write_bytes(content)
    monkeypatch.setattr(os, "pread", lambda file, length, start: pread(file, min(length, 100), start))
    assert Storage().read(str(tmp_path / "a.tar"), 10, 230) == content[10:240]
    assert Storage().read(str(tmp_path / "a.tar"), 240, 100) == content[240:]


def test_a_folder_may_have_a_name_that_is_no_utf_8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert len(source(write_shards(folder, [3]), tmp_path)) == 3


def test_patterns_expand(tmp_path):
    for name in ("a-01.tar", "a-02.tar", "b-01.tar"):
        (tmp_path / name).touch()
    assert expand("{a,b}-{08..10}.tar::c.tar")[2:] == ["a-10.tar", "b-08.tar", "b-09.tar", "b-10.tar", "c.tar"]
    assert [path[-8:] for path in expand(f"{tmp_path}/*-01.tar")] == ["a-01.tar", "b-01.tar"]
    assert expand("s3://bucket/{1..2}.tar") == ["s3://bucket/1.tar", "s3://bucket/2.tar"]
    queries = [f"http://127.0.0.1:1/{number}.tar?download=true" for number in range(2)]
    assert expand("http://127.0.0.1:1/{0..1}.tar?download=true") == queries  # no server is asked
    assert expand("{00..100}")[9:11] + expand("{0..10}")[9:] == ["009", "010", "9", "10"]  # as shells and webdataset
    with pytest.raises(UserError, match="no file is called"):
        expand(f"{tmp_path}/*.zip")
    with pytest.raises(UserError, match=r"^pipe:aws .* commands are not run; name the files themselves"):
        expand("pipe:aws s3 cp s3://bucket/{0..9}.tar -")
    with pytest.raises(UserError, match=r"^a.tar::: before and behind :: there must be a path$"):
        expand("a.tar::")
    with pytest.raises(UserError, match="range {9..3} is empty"):
        expand("{9..3}.tar")


def test_counts_come_from_where_they_are_known(shards, tmp_path):
    """And then no shard is looked at: the numbers here are wrong, and taken."""
    folder = tmp_path / "shards"
    names = [f"{i:05d}" for i in range(4)]
    for name in names:
        (folder / f"{name}_stats.json").write_text(json.dumps({"successes": 2}))
    assert source(shards, tmp_path).counts.tolist() == [2] * 4
    (folder / "sizes.json").write_text(json.dumps({f"{name}.tar": 3 for name in names}))
    assert source(shards, tmp_path).counts.tolist() == [3] * 4
    (tmp_path / "mine.json").write_text(json.dumps({f"{folder}/{name}.tar": 4 for name in names}))
    assert source(shards, tmp_path, counts=str(tmp_path / "mine.json")).counts.tolist() == [4] * 4
    assert not (tmp_path / "index").exists()
    for wrong in ("[]", "[" * 10**5, *(f'{{"00000.tar": {count}}}' for count in ("-1", "2.5", "true", "9" * 30))):
        (tmp_path / "mine.json").write_text(wrong)
        with pytest.raises(UserError, match="config.data.counts=.*(not a mapping|must be an object|nested too deep)"):
            source(shards, tmp_path, counts=str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").write_text('{"0.tar": 4}')
    with pytest.raises(UserError, match="mine.json names none of the 4 shards, such as .*/00000.tar$"):
        source(shards, tmp_path, counts=str(tmp_path / "mine.json"))
    (folder / "sizes.json").unlink()
    for name, wrong in zip(names, ("-2", "1e99", "2.5", "[]"), strict=True):
        (folder / f"{name}_stats.json").write_text(f'{{"successes": {wrong}}}')
    assert source(shards, tmp_path).counts.tolist() == [7, 10, 1, 14]  # by a look into them


def test_many_remote_shards_are_counted_only_when_that_is_asked_for(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_counts, "_MOST_REMOTE_TO_INDEX", 3)
    remote = "::".join(f"file://{path}" for path in expand(shards))
    with pytest.raises(UserError, match="not known how many samples 4 shards have.*clip-jax data index"):
        source(remote, tmp_path)
    few = source(remote.rpartition("::")[0], tmp_path)
    assert few.counts.tolist() == [7, 10, 1]
    assert source(remote, tmp_path, index=True).counts.tolist() == [7, 10, 1, 14]
    assert source(remote, tmp_path).counts.tolist() == [7, 10, 1, 14]


def test_what_a_file_states_is_not_remembered(shards, tmp_path):
    (tmp_path / "mine.json").write_text('{"00001.tar": 3}')  # wrong
    assert source(shards, tmp_path, counts=str(tmp_path / "mine.json")).counts.tolist() == [7, 3, 1, 14]
    assert source(shards, tmp_path).counts.tolist() == [7, 10, 1, 14]


def test_shards_of_the_same_name_in_several_folders_have_counts_of_their_own(tmp_path):
    for folder, count in (("a", 2), ("b", 5)):
        write_shard(tmp_path / folder / "00000.tar", range(count))
    both = f"{tmp_path}/a/00000.tar::{tmp_path}/b/00000.tar"
    (tmp_path / "a" / "sizes.json").write_text('{"00000.tar": 7}')  # wrong, and taken for this one only
    assert source(both, tmp_path).counts.tolist() == [7, 5]
    (tmp_path / "b" / "sizes.json").write_text('{"00000.tar": 8}')
    assert source(both, tmp_path / "elsewhere").counts.tolist() == [7, 8]
    twice = f"{tmp_path}/a/00000.tar::{tmp_path}/a/00000.tar"
    assert source(twice, tmp_path / "elsewhere").counts.tolist() == [7, 7]
    (tmp_path / "mine.json").write_text(f'{{"00000.tar": 9, "{tmp_path}/b/00000.tar": 6}}')
    assert source(both, tmp_path / "elsewhere", counts=str(tmp_path / "mine.json")).counts.tolist() == [7, 6]


def test_what_was_counted_is_counted_again_when_the_shard_changes(shards, tmp_path, monkeypatch):
    """Only that shard; and one that is gone keeps its samples, which are missing then."""
    assert source(shards, tmp_path).counts.tolist() == [7, 10, 1, 14]
    write_shard(tmp_path / "shards" / "00001.tar", range(3))
    (tmp_path / "shards" / "00002.tar").unlink()
    count, looked = TarSource._count, []
    monkeypatch.setattr(TarSource, "_count", lambda self, path: looked.append(path) or count(self, path))
    assert source(shards, tmp_path).counts.tolist() == [7, 3, 1, 14]
    assert looked == [f"{tmp_path}/shards/00001.tar"]
    assert source(shards, tmp_path).counts.tolist() == [7, 3, 1, 14]
    assert len(looked) == 1
    write_shard(tmp_path / "shards" / "00002.tar", range(2))
    assert source(shards, tmp_path).counts.tolist() == [7, 3, 2, 14]


def test_what_was_counted_belongs_to_the_shard_and_not_to_the_path_as_typed(tmp_path, monkeypatch):
    for folder, samples in (("a", 2), ("b", 6)):
        write_shard(tmp_path / folder / "0.tar", range(samples))
        monkeypatch.chdir(tmp_path / folder)
        tars = source("0.tar", tmp_path)
        assert len(tars) == samples
        assert tars[samples - 1].captions == (f"number {samples - 1}",)
    monkeypatch.setattr(TarSource, "_count", lambda self, path: pytest.fail(f"{path} is counted again"))
    assert len(source("../b/0.tar", tmp_path)) == 6
    assert len(source(str(tmp_path / "a" / "0.tar"), tmp_path)) == 2


def test_what_an_earlier_version_kept_is_not_believed_nor_what_is_damaged(tmp_path):
    path = write_shard(tmp_path / "0.tar", range(3))
    assert len(source(str(path), tmp_path)) == 3
    (file,) = (tmp_path / "index").glob("*.counts.json")
    for kept in (*(json.dumps({str(path): count}) for count in (5, [], [5], None)), "[1]", "7", "no JSON"):
        file.write_text(kept)
        assert len(source(str(path), tmp_path)) == 3, kept


def test_captions_are_chosen_by_seed_and_share(tmp_path):
    write_shard(tmp_path / "a.tar", range(2), lambda number: {"alt": ["one", "two"]})
    pattern = str(tmp_path / "a.tar")
    assert source(pattern, tmp_path)[0].captions == ("number 0",)
    mixed = source(pattern, tmp_path, captions=("txt=0.5", "json.caption=0.25", "json.alt=0.25"))[1]
    assert mixed.captions == ("number 1", "json 1", "one", "two")
    drawn = [mixed.draw_caption(np.random.default_rng(seed)) for seed in range(2_000)]
    found = [drawn.count(caption) / 2_000 for caption in mixed.captions]
    np.testing.assert_allclose(found, (0.5, 0.25, 0.125, 0.125), atol=0.04)
    with pytest.raises(ConfigError, match="config.data.captions holds 'text'"):
        source(pattern, tmp_path, captions=("text",))


def test_filters_leave_samples_out_before_they_get_a_number(tmp_path):
    pattern = write_shards(tmp_path / "s", [10, 10], metadata=lambda n: {"similarity": n / 20, "nsfw": "UNLIKELY"})
    kept = source(pattern, tmp_path, keep=Filter(("similarity>=0.3", "similarity < 0.8", "nsfw==UNLIKELY")))
    assert kept.counts.tolist() == [4, 6]
    assert captions(kept[i] for i in range(10)) == [f"number {i}" for i in range(6, 16)]
    again = source(pattern, tmp_path, keep=Filter(("similarity>=0.3", "similarity < 0.8", "nsfw==UNLIKELY")))
    assert again.fingerprint == kept.fingerprint != source(pattern, tmp_path).fingerprint
    with pytest.raises(UserError, match="no samples that the filters keep"):
        source(pattern, tmp_path, keep=Filter(("absent>0",)))
    assert not Filter(("similarity>=0.3",))({"similarity": 10**400})  # a float has no room for it
    with pytest.raises(ConfigError, match="config.data.filters holds 'similarity'"):
        Filter(("similarity",))


@pytest.mark.parametrize("truth", ["true", "True", "'true'"])
def test_conditions_on_what_is_true_or_false(truth):
    """JSON's `true` was compared as Python's `True`: nsfw!=true kept everything."""
    values = (True, False, "true", "False", 1, 0)
    assert [Filter((f"nsfw=={truth}",))({"nsfw": value}) for value in values] == [True, False] * 3
    assert [Filter((f"nsfw!={truth}",))({"nsfw": value}) for value in values] == [False, True] * 3
    assert not Filter((f"nsfw!={truth}",))({})


def write_tables(pattern, rows):
    """Writes img2dataset's table beside each shard."""
    for path in expand(pattern):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path.replace(".tar", ".parquet"))


@pytest.mark.parametrize("conditions", [("similarity>=0.3", "width<150"), ("nsfw!=LIKELY",), ()], ids=str)
def test_a_table_beside_the_shard_judges_as_the_samples_own_json(tmp_path, monkeypatch, conditions):
    """And no sample is read; where the table lacks a column or a sample, or has one twice, the JSON is."""
    (tmp_path / "uids.txt").write_text("\n".join(f"{number:032x}" for number in (2, 3, 5, 17)))
    keep = Filter(conditions, "" if conditions else str(tmp_path / "uids.txt"))
    rng = np.random.default_rng(0)
    about = [
        {"similarity": rng.random(), "width": None if n == 4 else 100 + 5 * n, "nsfw": "LIKELY" if n % 3 else "NO"}
        for n in range(20)
    ]
    pattern = write_shards(tmp_path / "s", [12, 8], metadata=about.__getitem__)
    plain = source(pattern, tmp_path / "json", keep=keep)
    rows = [{"key": f"{n:06d}", "uid": f"{n:032x}"} | about[n] for n in range(20)]
    failed = {"key": "000099", "uid": None, "similarity": None, "width": None, "nsfw": None}
    read, reads = tar_source.read_ranges, []
    monkeypatch.setattr(tar_source, "read_ranges", lambda *arguments: reads.append(arguments) or read(*arguments))

    def judged(name, table):
        reads.clear()
        write_tables(pattern, table)
        found = source(pattern, tmp_path / name, keep=keep)
        assert found.counts.tolist() == plain.counts.tolist()
        judging = len(reads)
        assert captions(found[i] for i in range(len(found))) == captions(plain[i] for i in range(len(plain)))
        return judging

    assert 0 < len(plain) < 20
    assert judged("whole", [failed, *reversed(rows)]) == 0
    assert judged("a row less", [failed, *rows[1:]]) > 0
    assert judged("one twice", [*rows, rows[0] | {"uid": None, "similarity": 9.0, "nsfw": "NO"}]) > 0
    assert judged("columns less", [{"key": row["key"]} for row in rows]) > 0
    nanoseconds = pyarrow.array([1] * 20, pyarrow.timestamp("ns"))
    assert judged("no value", [row | dict.fromkeys(about[0].keys() | {"uid"}, nanoseconds[0]) for row in rows]) > 0


def test_uids_of_datacomp_and_of_text_keep_the_same(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path / "s", [10, 10])
    chosen = [3, 4, 12, 19]
    np.save(tmp_path / "uids.npy", np.asarray([(0, number) for number in reversed(chosen)], "u8,u8"))
    (tmp_path / "uids.txt").write_text("\n".join(f"{number:032x}" for number in chosen), encoding="utf-8-sig")
    for name in ("uids.npy", "uids.txt"):
        kept = source(pattern, tmp_path, keep=Filter((), str(tmp_path / name)))
        assert captions(kept[i] for i in range(len(kept))) == [f"number {number}" for number in chosen]
    np.save(tmp_path / "sorted.npy", Filter((), str(tmp_path / "uids.npy"))._uids)
    with monkeypatch.context() as patch:
        patch.setattr(np, "sort", lambda _: pytest.fail("sorted again"))
        assert Filter((), str(tmp_path / "sorted.npy")).digest == kept.fingerprint["filter"]
    np.save(tmp_path / "halves.npy", np.zeros((3, 2), np.uint64))
    np.save(tmp_path / "numbers.npy", np.zeros(3, np.uint64))
    np.save(tmp_path / "pickle.npy", np.asarray([None]), allow_pickle=True)
    (tmp_path / "empty.npy").touch()
    messages = {
        "halves.npy": r"it holds uint64 \[3, 2\], and",
        "numbers.npy": r"it holds uint64 \[3\], and",
        "pickle.npy": "Object arrays cannot be loaded",
        "empty.npy": "No data",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            Filter((), str(tmp_path / name))
    (tmp_path / "uids.txt").write_text("nonsense")
    with pytest.raises(UserError, match="'nonsense' is not a uid"):
        Filter((), str(tmp_path / "uids.txt"))


def test_uids_are_found_in_whatever_order_they_are_listed(tmp_path):
    high, low = 0x8123456789ABCDEF, 0xFEDCBA9876543211
    uids = list(itertools.product((high, high + 1), (low, low + 1)))
    for order in itertools.permutations(uids):
        np.save(tmp_path / "uids.npy", np.asarray(list(order), "u8,u8"))
        keep = Filter((), str(tmp_path / "uids.npy"))
        assert all(keep({"uid": f"{first:016x}{second:016x}"}) for first, second in uids)
        others = [(high - 1, low), (high, low - 1), (high, low + 2), (high + 2, low), (low, high)]
        assert not any(keep({"uid": f"{first:016x}{second:016x}"}) for first, second in others)


def test_processes_that_see_other_shards_are_refused(tmp_path, monkeypatch):
    """Each shuffled what it saw, so that pairs came twice in an epoch and others never."""
    counts = {"same": [4, 3], "copy": [4, 3], "cut": [4, 2], "other": [3, 4]}
    same, copy, cut, other = (source(write_shards(tmp_path / name, counts[name]), tmp_path) for name in counts)
    found = []

    def gather(own):
        found.append(own)
        return np.stack([found[0], own])

    monkeypatch.setattr(loader.jax, "process_count", lambda: 2)
    monkeypatch.setattr(loader.multihost_utils, "process_allgather", gather)
    loader.check_same("config.data", [same])
    loader.check_same("config.data", [copy])
    with pytest.raises(UserError, match=r"^config.data is not .*: process 1 has 6 records, and process 0 7;"):
        loader.check_same("config.data", [cut])
    with pytest.raises(UserError, match=r"process 1 has 7 records, and process 0 as many in other shards"):
        loader.check_same("config.data", [other])


def test_filters_judge_a_shard_anew_when_it_changed_and_go_before_stated_sizes(tmp_path):
    path = tmp_path / "a.tar"
    (tmp_path / "sizes.json").write_text('{"a.tar": 10}')
    for good, count in ((lambda number: number % 2, 5), (lambda number: 1, 10)):
        write_shard(path, range(10), metadata=lambda number, good=good: {"good": good(number)})
        assert len(source(str(path), tmp_path, keep=Filter(("good==1",)))) == count


def test_few_indexes_stay_in_memory(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_source, "_KEPT_INDEXES", 2)
    tars = source(shards, tmp_path)
    for record in (0, 7, 0, 17):
        tars.read_block(record, 1)
    assert list(tars._shards) == [0, 2], "those that were read last"


def test_a_part_is_read_as_its_section_says(shards, tmp_path, monkeypatch):
    data = DataConfig(
        source="tars", shards="a.tar::s3://b/0.tar", streams=2, block=3, window=5, weight=2.0, retry_s=7.0
    )
    tars = source(shards, tmp_path)
    part = loader.open_part(dataclasses.replace(TINY, seed=1), data, tars)
    expected = WindowShuffle(tars.counts, seed=1, streams=2, block=3, window=5)
    assert part.weight == 2
    assert [part.order.locate(i) for i in range(32)] == [expected.locate(i) for i in range(32)]
    full = loader.open_part(dataclasses.replace(TINY, seed=1), dataclasses.replace(data, order="full"), tars)
    assert [full.order.locate(i) for i in range(32)] == [FullShuffle(32, seed=1).locate(i) for i in range(32)]
    local = dataclasses.replace(data, shards=shards, index_dir=str(tmp_path / "index"))
    assert loader.open_tars(local)._storage._retry_s == 7
    asked = {}

    def reads(parts, **options):
        asked.update(options)
        yield {}

    monkeypatch.setattr(loader, "train_batches", reads)
    how = {"on_bad": "fail", "workers": 3, "threads": 5, "prefetch": 6, "connections": 7}
    config = dataclasses.replace(TINY, data=dataclasses.replace(local, **how), seed=9)
    next(loader.parts_batches(config, [part], TRANSFORM, position=32, process_index=1, process_count=2))
    assert asked.items() >= (how | {"batch": 32, "seed": 9, "position": 32}).items()
    assert (asked["process_index"], asked["process_count"]) == (1, 2)
    given = []

    def seen(config, parts, transform):
        given.append(transform)
        return loader.synthetic_data(config)

    monkeypatch.setattr(loader, "parts_data", seen)
    for augmented in (False, True):
        loader.open_training_data(dataclasses.replace(TINY, data=local), augmented=augmented)
    assert isinstance(given[0], FixedTransform)
    assert given[1] is None, "what the run makes of a record"


# Through the pipeline


def test_windows_give_every_sample_once_whatever_reads_them(shards, tmp_path):
    parts = windowed(source(shards, tmp_path))
    straight = batches(parts, 8)
    for epoch in range(2):
        assert sorted(column(straight, "index")[32 * epoch :][:32]) == list(range(32))
    images = column(straight, "image")[:, 4, 4]
    expected = column(straight, "index")
    np.testing.assert_allclose(images[:, 0], expected // 16 * 16, atol=6)
    np.testing.assert_allclose(images[:, 1], expected % 16 * 16, atol=6)
    for options in ({"threads": 1}, {"prefetch": 1}, {"connections": 1}):
        assert_same(batches(parts, 8, **options), straight)
    for process_count in (2, 4):
        found = [batches(parts, 8, process_index=i, process_count=process_count) for i in range(process_count)]
        assert_same(side_by_side(found), straight)


@pytest.mark.slow
def test_worker_processes_change_nothing(shards, tmp_path):
    parts = windowed(source(shards, tmp_path))
    straight = batches(parts, 6)
    for workers in (1, 2, 4):
        assert_same(batches(parts, 6, workers=workers), straight)


def test_windows_resume_in_the_middle(shards, tmp_path):
    """Also on another number of processes, and with another batch."""
    parts = windowed(source(shards, tmp_path))
    straight = batches(parts, 12)
    for step in (1, 3, 4, 7):
        assert_same(batches(parts, 12 - step, position=8 * step), straight[step:])
    halves = [batches(parts, 5, position=24, process_index=i, process_count=2) for i in range(2)]
    both = [np.concatenate([part["index"] for part in each]) for each in zip(*halves, strict=True)]
    np.testing.assert_array_equal(both, [batch["index"] for batch in straight[3:8]])
    small = column(batches(parts, 12, batch=4, position=48), "index")
    assert set(small.tolist()) == set(column(straight[6:], "index").tolist())
    assert sorted(small[:8]) == sorted(straight[6]["index"])


def test_every_block_is_read_once_an_epoch(shards, tmp_path, monkeypatch):
    tars = source(shards, tmp_path)
    reads = []
    read_block = TarSource.read_block

    def counted(self, first, count):
        reads.append((first, count))
        return read_block(self, first, count)

    monkeypatch.setattr(TarSource, "read_block", counted)
    stream = train_batches(
        windowed(tars, streams=1), transform=TRANSFORM, batch=8, seed=0, prefetch=1, threads=1, connections=1
    )
    for _ in range(4):
        next(stream)
    stream.close()
    blocks = int(np.searchsorted(np.cumsum([count for _, count in reads]), 32)) + 1
    assert sum(count for _, count in reads[:blocks]) == 32
    assert sorted(first + i for first, count in reads[:blocks] for i in range(count)) == list(range(32))


def test_a_closed_stream_reads_no_more(shards, tmp_path, monkeypatch):
    """Not even for the batch that a thread is in the midst of: nobody would close what it opens."""
    midway, closed, records, reads = threading.Event(), threading.Event(), [], []
    read_block = TarSource.read_block

    class Transform(TrainTransform):
        def __call__(self, record, rng):
            records.append(record)
            if len(records) == 12:  # in the second batch; the first one would not come
                midway.set()
                closed.wait(60)
            return super().__call__(record, rng)

    def counted(self, first, count):
        reads.append(closed.is_set())
        return read_block(self, first, count)

    monkeypatch.setattr(TarSource, "read_block", counted)
    transform = Transform(TRANSFORM.preprocess, TRANSFORM.tokenizer, context=16)
    stream = train_batches(windowed(source(shards, tmp_path)), transform=transform, batch=8, seed=0, prefetch=1)
    next(stream)
    assert midway.wait(60)
    (making,) = [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
    stream.close()
    closed.set()
    making.join(60)
    assert not making.is_alive()
    assert not any(reads)


@pytest.mark.parametrize("start", [0, 8, 44])
def test_a_window_is_dropped_when_all_of_it_was_read(shards, tmp_path, start):
    """Also one in whose middle reading began: else a resumed run would keep its blocks for ever."""
    tars = source(shards, tmp_path)
    order = WindowShuffle(tars.counts, seed=0, streams=4, block=4, window=2)
    reader = WindowReader(tars, order, start=start, connections=2)
    for position in range(start, start + 96):
        reader.read(position)
        for opened in reader._windows.values():
            assert len(opened) <= 2
            assert all(each.left > 0 and each.window.end > position - 4 for each in opened)
            assert len(opened) == 1 + (2 * opened[0].left <= len(opened[0].window.records)), "the next one is fetched"
    reader.close()


@pytest.mark.parametrize("ahead", [16, 48])
def test_a_window_is_opened_once_though_a_thread_is_ahead(shards, tmp_path, ahead):
    """It opens the next window, or has read all of it, before the one before it is half read."""
    tars = source(shards, tmp_path)
    reader = WindowReader(
        tars, WindowShuffle(tars.counts, seed=0, streams=4, block=4, window=2), start=0, connections=2
    )
    for begin in range(0, 96, 2 * ahead):
        for position in (*range(begin + ahead, begin + 2 * ahead), *range(begin, begin + ahead)):
            reader.read(position)
    for opened in reader._windows.values():
        assert len(opened) == 1
        assert opened[0].left == sum(each >= 96 for each in range(opened[0].window.begin, opened[0].window.end, 4))
    reader.close()


def test_a_mixture_has_both_sources_in_proportion(shards, tmp_path):
    other = write_shards(tmp_path / "other", [9])
    first, second = windowed(source(shards, tmp_path))[0], source(other, tmp_path)
    parts = [Part(first.source, first.order, 3.0), Part(second, FullShuffle(9, seed=0), 1.0)]
    found = batches(parts, 12)
    index = column(found, "index")
    assert np.mean(index >= 32) == 0.25
    own = index[index < 32]
    assert sorted(own[:32]) == list(range(32))
    assert sorted(index[index >= 32][:9] - 32) == list(range(9))
    for step in (1, 5):
        assert_same(batches(parts, 12 - step, position=8 * step), found[step:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 6}, "divide config.batch"),
        ({"process_count": 8, "batch": 8}, "multiple of the number of processes"),
        ({"position": 2}, "samples consumed so far"),
        ({"workers": 5}, "config.data.workers is 5, over the 4 streams"),
    ],
)
def test_streams_that_do_not_divide_are_refused(shards, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        batches(windowed(source(shards, tmp_path)), 1, **options)


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"process_count": 4, "workers": 8, "batch": 4_096}, 32),
        ({"process_count": 64, "workers": 8, "batch": 32_768}, 512),
        ({"process_count": 64, "batch": 32_768}, 64),
        ({"batch": 24}, 12),
        ({"process_count": 3, "batch": 48, "position": 36}, 12),
        ({"workers": 17, "batch": 64}, 32),
    ],
)
def test_the_number_of_streams_that_is_named_serves(shards, tmp_path, options, number):
    tars = source(shards, tmp_path)
    options = {"position": 0} | options
    with pytest.raises(
        UserError, match=rf"(, as {number} does$|set config.data.streams={number} before a run begins, or use threads$)"
    ):
        check_batches(windowed(tars, streams=16), **options)
    check_batches(windowed(tars, streams=number), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 32, "batch": 16}, "over the 16 streams of each process; use fewer of them$"),
        ({"process_count": 4, "batch": 16, "position": 6}, r"the samples consumed so far \(6\)$"),
    ],
)
def test_where_no_number_of_streams_serves_none_is_named(shards, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        check_batches(windowed(source(shards, tmp_path), streams=16), **{"position": 0} | options)


# What is bad


def test_a_bad_pair_keeps_its_slot_with_its_reason(tmp_path):
    path = tmp_path / "bad.tar"
    reasons = bad_shard(path)
    tars = source(str(path), tmp_path)
    assert len(tars) == len(reasons) == 16
    for part in (windowed(tars, streams=1)[0], Part(tars, FullShuffle(16, seed=0))):
        (batch,) = batches([part], 1, batch=16)
        found = {int(index): int(bad) for index, bad in zip(batch["index"], batch["bad"], strict=True)}
        assert [REASONS[found[i] - 1] if found[i] else None for i in range(16)] == reasons
        np.testing.assert_array_equal(batch["weight"], batch["bad"] == 0)
        assert not batch["image"][batch["weight"] == 0].any()
        assert not batch["tokens"][batch["weight"] == 0].any()
        assert batch["tokens"][batch["weight"] == 1].any(axis=1).all()


def test_on_bad_fail_names_shard_and_sample(tmp_path):
    path = tmp_path / "bad.tar"
    bad_shard(path)
    with pytest.raises(RecordError, match=r"sample \d+ of .*bad.tar"):
        batches(windowed(source(str(path), tmp_path), streams=1), 1, batch=16, on_bad="fail")


def reasons_of(parts, size):
    (batch,) = batches(parts, 1, batch=size)
    return {int(index): REASONS[bad - 1] for index, bad in zip(batch["index"], batch["bad"], strict=True) if bad}


def test_a_missing_shard_costs_its_own_slots(shards, tmp_path):
    (tmp_path / "shards" / "00001.tar").unlink()
    sizes = {f"{i:05d}.tar": count for i, count in enumerate([7, 10, 1, 14])}
    with pytest.raises(UserError, match=r"00001.tar.*config.data.counts"):
        source(shards, tmp_path)
    (tmp_path / "shards" / "sizes.json").write_text(json.dumps(sizes))
    assert reasons_of(windowed(source(shards, tmp_path)), 32) == dict.fromkeys(range(7, 17), "shard_missing")


def test_a_share_that_does_not_answer_is_an_outage_and_no_missing_shard(shards, tmp_path, monkeypatch):
    tars = source(shards, tmp_path)
    lost = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(storage, "_read_range", lambda *_: (_ for _ in ()).throw(lost))
    assert reasons_of(windowed(tars), 32) == dict.fromkeys(range(32), UNREACHABLE)
    with pytest.raises(OutageError, match="^sample 0 of .*00000.tar: .*00000.tar: Input/output error"):
        next(eval_batches(tars, transform=TRANSFORM, batch=4))


def test_an_index_that_cannot_be_kept_costs_a_warning_and_no_pair(shards, tmp_path, monkeypatch, caplog):
    """As on a full disk. Where shards must be counted, it is noticed before any is read."""
    (tmp_path / "index").write_text("no folder")
    looked = []
    monkeypatch.setattr(TarSource, "_count", lambda self, path: looked.append(path) or 1)
    with pytest.raises(UserError, match=r"^config.data.index_dir cannot be written: .*; name another folder"):
        source(shards, tmp_path)
    assert not looked
    sizes = {f"{i:05d}.tar": count for i, count in enumerate([7, 10, 1, 14])}
    (tmp_path / "shards" / "sizes.json").write_text(json.dumps(sizes))
    assert reasons_of(windowed(source(shards, tmp_path)), 32) == {}
    (warning,) = [record.message for record in caplog.records]
    assert warning.endswith("every process looks into shards again; name another config.data.index_dir")


def test_a_truncated_shard_costs_what_it_lacks(shards, tmp_path):
    path = tmp_path / "shards" / "00003.tar"
    tars = source(shards, tmp_path)
    content = path.read_bytes()
    samples = Sidecars(Storage(), str(tmp_path / "index")).get(str(path)).samples
    path.write_bytes(content[: int(samples["start"][9]) + 700])
    found = reasons_of(windowed(tars), 32)
    assert found == dict.fromkeys(range(18 + 9, 32), "shard_changed")


def test_a_shard_that_changes_while_it_is_used_is_noticed(shards, tmp_path):
    tars = source(shards, tmp_path)
    assert tars[20].captions == ("number 20",)  # its index is in memory now
    write_shard(tmp_path / "shards" / "00003.tar", range(18, 34), lambda number: {"longer": "x" * 700})
    found = reasons_of([Part(tars, FullShuffle(32, seed=0))], 32)
    assert found == dict.fromkeys(range(18, 32), "shard_changed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", r"is no tar; it begins with b'version https://'"),
        (b"<html>" * 1_000, r"is no tar; it begins with b'<html>"),
        (b"", r"is empty \(0 bytes\)"),
    ],
)
def test_among_shards_a_file_that_is_no_tar_is_refused(tmp_path, content, message):
    """They were shards without samples, of which nothing was said while others had some."""
    write_shards(tmp_path, [3, 3])
    (tmp_path / "00001.tar").write_bytes(content)
    with pytest.raises(UserError, match=f"00001.tar {message}.*; take it out of config.data.shards"):
        source(f"{tmp_path}/{{00000..00001}}.tar", tmp_path)
    with pytest.raises(UserError, match=message):
        open_labelled(str(tmp_path / "00001.tar"))
    with tarfile.open(tmp_path / "00001.tar", "w"):
        pass  # a tar of nothing
    assert len(source(f"{tmp_path}/{{00000..00001}}.tar", tmp_path)) == 3


@pytest.mark.parametrize("module", [gzip, lzma])
def test_a_compressed_tar_is_named_as_such(tmp_path, module):
    content = write_shard(tmp_path / "0.tar", range(3)).read_bytes()
    path = tmp_path / "0.tar.packed"
    path.write_bytes(module.compress(content))
    with pytest.raises(UserError, match=r"^.*/0.tar.packed is compressed as a whole, .*; decompress it"):
        source(str(path), tmp_path)


def test_after_a_damaged_header_the_next_whole_one_counts(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(6))
    samples = Sidecars(Storage(), str(tmp_path / "index")).get(str(path)).samples
    content = bytearray(path.read_bytes())
    content[int(samples["start"][2]) + 3] ^= 0xFF
    path.write_bytes(content)
    tars = source(str(path), tmp_path)
    assert len(tars) == 6
    with pytest.raises(RecordError, match="no image"):
        tars[2]
    assert captions(tars[i] for i in (0, 1, 3, 4, 5)) == [f"number {i}" for i in (0, 1, 3, 4, 5)]


def test_paths_of_a_config_may_begin_at_home(shards, tmp_path, monkeypatch):
    """A shell leaves the ~ of `--config.data.index_dir=~/index` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "shards")
    (tmp_path / "uids.txt").write_text(f"{1:032x}\n{9:032x}\n")
    (tmp_path / "counts.json").write_text("[]")
    section = DataConfig(source="tars", shards=shards, index_dir="~/index", uids="~/uids.txt")
    assert len(open_tars(section)) == 2
    assert (tmp_path / "index").is_dir()
    assert not (tmp_path / "shards" / "~").exists()
    with pytest.raises(UserError, match=f"config.data.counts={tmp_path}/counts.json: .* must be an object"):
        open_tars(dataclasses.replace(section, uids="", counts="~/counts.json"))


@pytest.mark.parametrize("shards", ["s3://bucket/0.tar", "/data/0.tar::s3://bucket/0.tar"])
def test_where_a_shard_is_remote_the_order_is_of_windows(shards, tmp_path):
    run = dataclasses.replace(TINY, data=DataConfig(source="tars", shards=shards))
    tars = source(str(write_shard(tmp_path / "0.tar", range(3))), tmp_path)
    assert isinstance(open_part(run, run.data, tars).order, WindowShuffle)


@pytest.mark.filterwarnings("ignore:the load_module")
def test_data_index_counts_once_for_all_later_runs(shards, tmp_path, capsys):
    arguments = [
        "data", "index", "--config=configs/demo.py", "--config.data.source=tars", f"--config.data.shards={shards}",
        f"--config.data.index_dir={tmp_path}/index", "--config.data.build=false",
    ]  # fmt: skip
    out = f"{tmp_path}/kept/sizes.json"
    main([*arguments, f"--out={out}"])
    assert capsys.readouterr().out == f"4 tar shards ({shards}): 32 samples\n{out}\n"
    for shard in (tmp_path / "shards").iterdir():
        shard.unlink()
    assert len(source(shards, tmp_path)) == 32
    assert source(shards, tmp_path / "elsewhere", counts=out).counts.tolist() == [7, 10, 1, 14]
    filtered = "--config.data.filters=similarity>=0.3"
    for wrong, message in (
        (["data", "index", "--config=configs/demo.py"], "nothing to index"),
        ([*arguments, filtered, f"--out={out}"], "--out: config.data.filters or uids leave samples out"),
        ([*arguments, f"--out={tmp_path}"], f"--out={tmp_path}: "),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err
