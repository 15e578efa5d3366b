"""Preparing on a real Ray cluster of two nodes on loopback, one of which goes away in mid-job."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tars import noise_shards
from test_prepare import open_prepared, tree

from clip_jax.data.prepare import Job, prepare

pytestmark = [
    pytest.mark.slow,
    # Ray leaves pipes and files of the processes that it started to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[1]
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a cluster on loopback
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return noise_shards(tmp_path_factory.mktemp("ray") / "shards", shards=10, samples=80)


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory):
    """What a pool of processes makes of it."""
    return tree(prepare(Job("pairs", data_dir=str(tmp_path_factory.mktemp("pool")), tars=shards)))


@pytest.fixture
def cluster(monkeypatch):
    """A head and a second node, each with one core, that listen on loopback only."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    node = {"object_store_memory": 80 << 20, "num_cpus": 1}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        cluster.second = cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()


def start(root, shards, address):
    arguments = ["data", "prepare", "pairs", f"--data-dir={root}", f"--tars={shards}", "--runner=ray"]
    return subprocess.Popen(
        [sys.executable, "-m", "clip_jax.cli", *arguments, *([f"--address={address}"] if address else [])],
        cwd=ROOT,
        env=os.environ | QUIET,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(reached, process):
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_node_that_goes_away_in_mid_job_loses_nothing(cluster, shards, expected, tmp_path):
    process = start(tmp_path, shards, cluster.address)
    folder = tmp_path / "pairs" / "1.0.0.preparing"
    try:
        # Both cores, one of each node, are within a shard.
        wait_until(
            lambda: (
                len(list(folder.glob(".*array_record*.tmp"))) == 2
                and len(list((folder / "work").glob("*.done.json"))) >= 2
            ),
            process,
        )
        done = len(list((folder / "work").glob("*.done.json")))
        cluster.remove_node(cluster.second, allow_graceful=False)
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert 2 <= done < 10
    assert tree(tmp_path / "pairs" / "1.0.0") == expected
    assert len(open_prepared(tmp_path)) == 800
    print(f"{done} of 10 shards were done when the node went away\n{stdout}")


def test_a_cluster_started_for_the_job_listens_on_loopback_only(shards, expected, tmp_path):
    pytest.importorskip("ray")
    process = start(tmp_path, shards, "")
    try:
        work = tmp_path / "pairs" / "1.0.0.preparing" / "work"
        wait_until(lambda: any(work.glob("*.done.json")), process)
        family = psutil.Process(process.pid).children(recursive=True)
        listening = {
            connection.laddr.ip
            for member in family
            for connection in member.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        listening = {address.removeprefix("::ffff:") for address in listening}
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert listening == {"127.0.0.1"}
    assert tree(tmp_path / "pairs" / "1.0.0") == expected
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_no_cluster_is_one_line(shards, tmp_path):
    pytest.importorskip("ray")
    process = start(tmp_path, shards, "127.0.0.1:1")
    _, stderr = process.communicate(timeout=120)
    assert stderr.startswith("error: no Ray cluster at --address=127.0.0.1:1: ")
    assert stderr.count("\n") == 1
    assert process.returncode == 2
