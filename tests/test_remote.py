"""Shards on an HTTP store: the same bits as locally, few requests, failures and outages survived."""

import itertools
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import botocore.exceptions
import fsspec
import huggingface_hub.constants
import numpy as np
import pytest
from batches import assert_same
from http_store import serving
from tars import write_shard, write_shards
from test_tars import TRANSFORM, batches, captions, source, windowed

from clip_jax.data import prepare_inputs, storage, tar_index
from clip_jax.data.captions import CaptionFields
from clip_jax.data.order import WindowShuffle
from clip_jax.data.patterns import expand
from clip_jax.data.pipeline import eval_batches, train_batches
from clip_jax.data.reading import Part
from clip_jax.data.records import UNREACHABLE, RecordError
from clip_jax.data.storage import Storage, StorageError, requests_made
from clip_jax.data.tar_counts import find_counts
from clip_jax.errors import OutageError, UserError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def store(tmp_path):
    write_shards(tmp_path / "shards", [40, 25, 60])
    with serving(tmp_path / "shards") as store:
        yield store


def remote(store, tmp_path, **options):
    return source(f"{store.url}/{{00000..00002}}.tar", tmp_path / "remote", **options)


def test_remote_shards_give_the_bits_of_local_ones(store, tmp_path):
    here = windowed(source(str(tmp_path / "shards" / "{00000..00002}.tar"), tmp_path))
    there = windowed(remote(store, tmp_path))
    assert_same(batches(there, 18), batches(here, 18))


def test_the_hubs_shards_are_read_as_who_is_logged_in_there(tmp_path, monkeypatch):
    folder = tmp_path / "shards" / "datasets" / "owner" / "name" / "resolve"
    write_shards(folder / "main", [40])
    (folder / "refs%2Fpr%2F1").mkdir()
    (folder / "refs%2Fpr%2F1" / "0.tar").write_bytes(b"proposed")
    with serving(tmp_path / "shards") as files, serving(tmp_path / "shards") as hub:
        hub.moved_to = files.url
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        storage._hub.cache_clear()
        tars = source("hf://datasets/owner/name/00000.tar", tmp_path / "remote")
        assert captions(tars[number] for number in range(40)) == [f"number {number}" for number in range(40)]
        assert (hub.tokens, files.tokens) == ({"Bearer secret"}, {None})
        assert Storage(0.0).read("hf://datasets/owner/name@refs%2Fpr%2F1/0.tar", 3, 4) == b"pose"
        with pytest.raises(StorageError, match=r"^hf://datasets/owner/name/0.tar: .*404"):
            Storage(0.0).stat("hf://datasets/owner/name/0.tar")
    storage._hub.cache_clear()
    with pytest.raises(UserError, match=r"^hf://datasets/name.tar names no file of the Hugging Face Hub; write hf://"):
        Storage(0.0).read("hf://datasets/name.tar", 0, 1)


def test_a_server_that_knows_no_ranges_gives_the_same_records(store, tmp_path, monkeypatch, caplog):
    store.knows_ranges = False
    monkeypatch.setattr(tar_index, "_CHUNK", 1 << 13)
    tars = source(f"{store.url}/00001.tar", tmp_path)
    assert captions(tars[number] for number in range(len(tars))) == [f"number {number}" for number in range(40, 65)]
    monkeypatch.setattr(prepare_inputs, "_COPIED_AT_ONCE", 1 << 13)
    (part,) = prepare_inputs.tar_parts(f"{store.url}/00001.tar", 1.0)
    prepared = [sample.record for sample in part.samples(CaptionFields(), 1.0)]
    assert prepared == [tars[number] for number in range(25)]
    said = f"{store.url} sends whole files where a part is asked for: copy them to a disk, or to another server"
    assert [record.message for record in caplog.records] == [said]


def test_a_server_that_would_compress_or_says_no_lengths_gives_no_half_of_a_shard(store, tmp_path):
    """The length of what is compressed on the way was taken for the shard's, and samples behind it were none."""
    remote(store, tmp_path)[0]
    assert store.encodings == {"identity"}
    store.says_lengths = store.knows_ranges = False
    with pytest.raises(StorageError, match=r"00000.tar: its server does not say how many bytes it has"):
        Storage(1.0).stat(f"{store.url}/00000.tar")


def test_want_of_credentials_is_not_waited_for_as_an_outage_is(monkeypatch):
    """And a name that no bucket can have not at all."""
    raised = botocore.exceptions.NoCredentialsError()

    def ask(*_, **__):
        raise raised

    monkeypatch.setattr(storage, "_file_system", lambda protocol: SimpleNamespace(cat_file=ask))
    monkeypatch.setattr(storage, "_CREDENTIALS_S", 0.05)
    monkeypatch.setattr(storage.random, "uniform", lambda low, high: 0.02)
    with pytest.raises(OutageError, match=r"^s3://bucket/0.tar: Unable to locate credentials \(after [1-4] tries\)"):
        Storage(0.5).read("s3://bucket/0.tar", 0, 1)
    raised = botocore.exceptions.ParamValidationError(report="Invalid bucket name")
    with pytest.raises(StorageError, match="Invalid bucket name$"):
        Storage(0.5).read("s3://Bucket!/0.tar", 0, 1)


def test_stores_behind_a_proxy_are_read_through_it(tmp_path, monkeypatch):
    host = tmp_path / "http:" / "shards.invalid"  # by what a proxy is asked for
    write_shards(host, [40])
    with serving(tmp_path) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        there = source("http://shards.invalid/00000.tar", tmp_path / "remote", retry_s=0.5)
        assert there[39].captions == source(str(host / "00000.tar"), tmp_path / "local")[39].captions
    made = []
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **options: made.append(options))
    storage._file_system.__wrapped__("gs")
    assert made[0]["session_kwargs"] == {"trust_env": True}


def test_a_file_that_is_no_tar_is_called_as_it_was_named(store, tmp_path):
    """And not by the number of its copy."""
    (tmp_path / "shards" / "pointer.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (part,) = prepare_inputs.tar_parts(f"{store.url}/pointer.tar", 1.0)
    with pytest.raises(StorageError, match=f"^{store.url}/pointer.tar is no tar"):
        next(part.samples(CaptionFields(), 1.0))


def test_requests_are_few(store, tmp_path):
    tars = remote(store, tmp_path)
    before = store.requests
    batches(windowed(tars, streams=1), 15, prefetch=1)
    blocks = 10 + 7 + 15
    print(f"{store.requests - before} requests for {blocks} blocks of 4, 3 shards")
    assert store.requests - before <= 1.3 * blocks + 3 * 3


def end_of_threads(*names):
    """Waits for threads that a stream has left: what they ask for is counted here before it arrives."""
    for thread in threading.enumerate():
        if thread.name.startswith(names):
            thread.join(60)
            assert not thread.is_alive()


def test_threads_look_into_a_shard_once(store, tmp_path):
    """Each of them read all of it, where its number of samples was known and its index was not."""
    (tmp_path / "counts.json").write_text(json.dumps({"00000.tar": 40, "00001.tar": 25, "00002.tar": 60}))
    tars, store.latency = remote(store, tmp_path, counts=str(tmp_path / "counts.json")), 0.02
    with ThreadPoolExecutor(8) as pool:
        assert captions(pool.map(tars.__getitem__, range(8))) == [f"number {number}" for number in range(8)]
    assert store.requests == 1 + 1 + 8  # its size, its headers, the samples


def test_a_sample_costs_a_small_part_of_a_request(tmp_path):
    """All requests of a first epoch: to find the sizes, to index, to read; and each of them is counted."""
    write_shards(tmp_path / "shards", [256, 256])
    with serving(tmp_path / "shards", failing=0.01) as store:
        before = requests_made()
        tars = source(f"{store.url}/{{00000..00001}}.tar", tmp_path / "remote")
        parts = [Part(tars, WindowShuffle(tars.counts, seed=0, streams=2, block=64, window=4))]
        batches(parts, 512 // 8, prefetch=1)
        end_of_threads("grain-prefetch", "blocks")
        counted, found = requests_made() - before, store.requests
    print(f"{found / 512:.3f} requests a sample (goal 0.1)")
    assert found <= 0.1 * 512
    assert counted == found


def test_failing_requests_are_tried_again(store, tmp_path):
    expected = batches(windowed(remote(store, tmp_path)), 8)
    store.failing = 0.3
    assert_same(batches(windowed(remote(store, tmp_path)), 8), expected)


@pytest.mark.parametrize("seconds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_an_outage_is_waited_for(store, tmp_path, seconds):
    parts = windowed(remote(store, tmp_path))
    expected = batches(parts, 16)
    stream = train_batches(parts, transform=TRANSFORM, batch=8, seed=0, prefetch=1)
    found = [next(stream)]
    store.down_until = time.monotonic() + seconds
    found += itertools.islice(stream, 15)
    stream.close()
    assert_same(found, expected)
    assert not any(batch["bad"].any() for batch in found)


def test_after_the_deadline_a_shard_counts_as_missing(store, tmp_path):
    tars = remote(store, tmp_path, retry_s=0.5)
    store.down_until = time.monotonic() + 60
    began = time.monotonic()
    (batch,) = batches(windowed(tars), 1)
    assert (batch["bad"] > 0).all()
    assert time.monotonic() - began < 20
    with pytest.raises(OutageError, match=r"503.*after \d+ tries"):
        Storage(0.2).read(f"{store.url}/00000.tar", 0, 10)


def test_an_outage_is_no_fault_of_the_pairs(store, tmp_path):
    """Where they are evaluated, or must be usable, or are to be counted or listed, it is said as such."""
    tars = remote(store, tmp_path, retry_s=0.1)
    store.down_until = math.inf
    with pytest.raises(OutageError, match=r"^sample 0 of http.*503.*after \d+ tries"):
        next(eval_batches(tars, transform=TRANSFORM, batch=4, on_bad="drop"))
    with pytest.raises(OutageError, match=r"^sample \d+ of http.*503.*after \d+ tries"):
        batches(windowed(tars), 1, on_bad="fail")
    with pytest.raises(OutageError, match=r"^http.*503.*after \d+ tries"):
        source(f"{store.url}/{{00000..00002}}.tar", tmp_path / "elsewhere", retry_s=0.1)
    with pytest.raises(OutageError, match=r"^http.*/\*.tar cannot be listed: 503"):
        expand(f"{store.url}/*.tar")


@pytest.mark.parametrize("pattern", ["dropbox://folder/*.tar", "dropbox://folder/0.tar"])
def test_a_store_whose_package_is_not_installed_is_one_line(tmp_path, pattern):
    with pytest.raises(UserError, match=r"^dropbox://folder/.*: DropboxFileSystem requires"):
        source(pattern, tmp_path)


def test_what_is_not_there_or_not_known_is_not_waited_for(store):
    began = time.monotonic()
    with pytest.raises(StorageError, match="nothing.tar"):
        Storage(60.0).stat(f"{store.url}/nothing.tar")
    with pytest.raises(StorageError, match="501"):  # this store cannot be written
        Storage(60.0).write_whole(f"{store.url}/index/0.npz", b"")
    assert time.monotonic() - began < 5
    with pytest.raises(UserError, match="unknown protocol"):
        Storage(60.0).stat("htp://x/y.tar")


def test_a_remote_shard_that_changed_is_indexed_again(store, tmp_path):
    assert len(remote(store, tmp_path)) == 125
    write_shard(tmp_path / "shards" / "00001.tar", range(40, 68))
    tars = remote(store, tmp_path)  # its counts are remembered
    assert len(tars) == 125
    assert tars[64].captions == ("number 64",)
    store.folder.joinpath("00001.tar").unlink()
    (batch,) = batches(windowed(remote(store, tmp_path)), 1)
    assert batch["bad"].shape == (8,)


def test_many_remote_shards_of_unknown_size_are_refused_with_the_remedy(store, tmp_path):
    paths = [f"{store.url}/none/{number}.tar" for number in range(300)]
    options = {"remembered": str(tmp_path / "counts"), "all_used": True, "count": len}
    with ThreadPoolExecutor(16) as pool:
        with pytest.raises(UserError, match="clip-jax data index"):
            find_counts(paths, Storage(0.0), file="", pool=pool, **options)
        (tmp_path / "sizes.json").write_text(json.dumps({f"{number}.tar": 10 for number in range(300)}))
        known = find_counts(paths, Storage(0.0), file=str(tmp_path / "sizes.json"), pool=pool, **options)
    np.testing.assert_array_equal(known, [10] * 300)


def test_what_was_counted_of_remote_shards_is_taken_without_a_request(tmp_path):
    """Also as earlier versions kept it."""
    paths = [f"http://127.0.0.1:9/{number}.tar" for number in range(300)]
    options = {"file": "", "remembered": str(tmp_path / "counts"), "all_used": False, "count": len}
    with ThreadPoolExecutor(16) as pool:
        find_counts(paths, Storage(0.0), pool=pool, index_all=True, **options)
        made = requests_made()
        known = find_counts(paths, Storage(0.0), pool=pool, **options)
        (tmp_path / "counts").write_text(json.dumps(dict.fromkeys(paths, 10)))
        earlier = find_counts(paths, Storage(0.0), pool=pool, **options)
    np.testing.assert_array_equal(known, list(map(len, paths)))
    np.testing.assert_array_equal(earlier, [10] * 300)
    assert requests_made() == made


def test_a_shard_that_was_given_up_costs_the_deadline_once(store, tmp_path, monkeypatch):
    """Its other blocks send no request for a while; then one try decides."""
    tars = remote(store, tmp_path, retry_s=0.3)
    tars.read_block(0, 4)
    store.down_until = math.inf
    reasons = [reason_of(tars.read_block(first, 4)) for first in (4, 8)]
    assert reasons[0] == reasons[1]
    assert "503" in reasons[0]
    asked = store.requests
    assert {reason_of(tars.read_block(first, 4)) for first in range(12, 40, 4)} == {reasons[0]}
    assert store.requests == asked
    other = reason_of(tars.read_block(40, 4))
    assert "00001.tar" in other
    assert store.requests > asked + 1

    asked = store.requests
    monkeypatch.setattr(storage, "_GIVEN_UP_S", math.inf)
    later = time.monotonic() + 61
    monkeypatch.setattr(storage.time, "monotonic", lambda: later)
    assert "after 1 tries" in reason_of(tars.read_block(4, 4))
    reason_of(tars.read_block(4, 4))
    assert store.requests == asked + 1


def test_a_shard_that_was_given_up_is_used_again_when_it_is_back(store, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_GIVEN_UP_S", 0.0)
    tars = remote(store, tmp_path, retry_s=0.3)
    store.down_until = math.inf
    assert "503" in reason_of(tars.read_block(0, 4))
    store.down_until = 0.0
    assert tars.read_block(0, 4)[0].captions == ("number 0",)
    store.down_until, asked = math.inf, store.requests
    reason_of(tars.read_block(4, 4))
    assert store.requests > asked + 1  # it is waited for as before


def reason_of(block):
    with pytest.raises(RecordError) as caught:
        block[0]
    assert caught.value.reason == UNREACHABLE
    return str(caught.value)


def test_behind_the_end_of_a_file_there_is_nothing(store, tmp_path):
    size = (tmp_path / "shards" / "00000.tar").stat().st_size
    url = f"{store.url}/00000.tar"
    assert [len(Storage(60.0).read(url, begin, 100)) for begin in (size - 10, size, size + 1_000)] == [10, 0, 0]


def test_which_answers_are_asked_for_again():
    def passes(status):
        error = OSError()
        error.status = status
        return storage._may_pass(error)

    assert all(map(passes, (408, 425, 429, 500, 503)))
    assert not any(map(passes, (400, 401, 403, 404, 410, 501)))
