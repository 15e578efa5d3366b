"""Shards and their sidecars on S3, against a server of its interface on loopback."""

import logging
import shutil

import fsspec
import numpy as np
import pytest
from batches import assert_same
from moto.server import ThreadedMotoServer
from tars import write_shard, write_shards
from test_mirror import files, trained
from test_tars import batches, captions, source, windowed

from clip_jax.checkpoints.mirror import Mirror
from clip_jax.data.patterns import expand
from clip_jax.data.records import RecordError
from clip_jax.data.storage import Storage, StorageError
from clip_jax.data.tar_index import Sidecars
from clip_jax.data.tar_source import TarSource
from clip_jax.interop.download import download_url

pytestmark = [
    pytest.mark.slow,  # the server takes seconds to start
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    server.stop()


@pytest.fixture
def bucket(server, tmp_path):
    """A bucket of the test's own, with the shards of `tmp_path / "shards"` in it."""
    write_shards(tmp_path / "shards", [40, 25, 60])
    system, name = fsspec.filesystem("s3"), tmp_path.name.replace("_", "-")
    system.mkdir(name)
    for path in sorted((tmp_path / "shards").iterdir()):
        system.pipe_file(f"{name}/shards/{path.name}", path.read_bytes())
    return f"s3://{name}"


def put(url, path):
    fsspec.filesystem("s3").pipe_file(url, path.read_bytes())


def remote(bucket, **options):
    return TarSource(f"{bucket}/shards/*.tar", index_dir=f"{bucket}/index", **options)


def test_shards_on_s3_give_the_bits_of_local_ones(bucket, tmp_path):
    here = windowed(source(f"{tmp_path}/shards/*.tar", tmp_path))
    assert expand(f"{bucket}/shards/*.tar") == expand(f"{bucket}/shards/{{00000..00002}}.tar")
    there = windowed(remote(bucket))
    assert_same(batches(there, 18), batches(here, 18))


def test_sidecars_on_s3_spare_the_next_process_the_shards(bucket, monkeypatch):
    first = remote(bucket)
    kept = fsspec.filesystem("s3").ls(f"{bucket}/index")
    assert len(kept) == 3 + 1  # and how many samples each shard has
    reads, read = [], Storage.read
    monkeypatch.setattr(Storage, "read", lambda *arguments: reads.append(arguments[1:]) or read(*arguments))
    second = remote(bucket)
    assert captions(second[i] for i in (0, 124)) == captions(first[i] for i in (0, 124)) == ["number 0", "number 124"]
    assert sum(length for *_, length in reads[:2]) < 10_000  # the second source reads samples only


def test_a_shard_that_changed_on_s3_is_noticed_by_its_etag(bucket, tmp_path):
    """Also one of the same size, and by a process that listed the shards before."""
    tars, sidecars = remote(bucket), Sidecars(Storage(), f"{bucket}/index")
    shard = f"{bucket}/shards/00001.tar"
    before = sidecars.get(shard)
    changed = write_shard(tmp_path / "other.tar", range(40, 65), lambda number: {"caption": f"text {number}"})
    put(shard, changed)
    after = sidecars.get(shard)
    assert (after.stat.size, len(after.samples)) == (before.stat.size, 25)
    assert after.stat.tag != before.stat.tag
    assert tars[40].captions == ("number 40",)


def test_what_a_shard_on_s3_lacks_costs_its_own_slots(bucket, tmp_path):
    tars = remote(bucket, retry_s=0.5)
    assert captions([tars[0], tars[40]]) == ["number 0", "number 40"]  # their indexes are in memory now
    put(f"{bucket}/shards/00000.tar", write_shard(tmp_path / "short.tar", range(3)))
    fsspec.filesystem("s3").rm_file(f"{bucket}/shards/00001.tar")
    (batch,) = batches(windowed(tars, streams=1), 1, batch=125)
    lost = np.sort(batch["index"][batch["bad"] > 0])
    np.testing.assert_array_equal(lost, [*range(3, 40), *range(40, 65)])
    reasons = set()
    for index in (20, 50):
        with pytest.raises(RecordError) as caught:
            tars[index]
        reasons.add(caught.value.reason)
    assert reasons == {"shard_changed", "shard_missing"}


def test_a_bucket_that_is_not_there_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(StorageError, match="s3://nothing-here/0.tar"):
        Storage(60.0).stat("s3://nothing-here/0.tar")


def test_a_run_is_copied_to_s3_and_brought_back(bucket, tmp_path):
    workdir = trained(tmp_path / "run", f"{bucket}/runs")
    assert len(fsspec.filesystem("s3").find(f"{bucket}/runs/run/checkpoints")) > 10
    before = files(workdir)
    shutil.rmtree(workdir)
    with Mirror(f"{bucket}/runs", workdir) as mirror:
        assert mirror.fetch() == [f"brought from {bucket}/runs/run: checkpoints 2, 3"]
    assert files(workdir) == before
    newest = files(download_url(f"{bucket}/runs/run", cache=tmp_path / "cache"))
    assert newest == {name: found for name, found in before.items() if name.startswith("checkpoints/3/")}
