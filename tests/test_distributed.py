"""Several processes as one run: real ones on this machine, and what is refused before they could hang or crash."""

import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import outputs, simulating, start_script
from jax._src.clusters import cloud_tpu_cluster

from clip_jax.config import DistributedConfig
from clip_jax.errors import UserError
from clip_jax.processes import distributed
from clip_jax.processes.distributed import SLURM, detect, free_port, half_set

ROOT = Path(__file__).parent.parent
SMALL = (
    "--config=configs/demo.py",
    "--config.model.vision.layers=1",
    "--config.model.text.layers=1",
    "--config.batch=48",
    "--config.samples=288",
    "--config.optim.warmup_steps=2",
    "--config.checkpoint.every=4",
    "--config.log.every=1",
)


def start(*arguments: str, devices: int, prepare: Callable[[], None] | None = None) -> subprocess.Popen:
    """Starts a run; `prepare` is called in its process before."""
    return subprocess.Popen(
        [sys.executable, "train.py", *SMALL, *arguments],
        cwd=ROOT,
        env=simulating(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def peers(
    *arguments: str, count: int = 2, devices: int = 4, prepare: Mapping[int, Callable[[], None]] | None = None
) -> list[subprocess.Popen]:
    """Starts the processes of a run; `prepare` as in `start`, for some of them."""
    address = f"127.0.0.1:{free_port()}"
    keys = {"mode": "explicit", "coordinator": address, "bind": address, "processes": count, "timeout": 120}
    shared = [f"--config.distributed.{key}={value}" for key, value in keys.items()]
    return [
        start(
            *arguments,
            *shared,
            f"--config.distributed.process_id={i}",
            devices=devices,
            prepare=(prepare or {}).get(i),
        )
        for i in range(count)
    ]


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_one_run(digits_dir, tmp_path):
    """Two processes of four devices and one of eight: the same losses, checkpoints and report, written once.

    One process goes on from their copy, after their folder is lost. By a form of the loss without reduce-scatter:
    behind one, Gloo adds up a step's gradients in 12 s instead of 0.04.
    """
    data = (
        f"--config.data.data_dir={digits_dir}",
        "--config.loss.form=ring",
        "--config.eval.held_out=split=test",
        "--config.eval.held_out_pairs=99",
    )
    alone = start(*data, f"--workdir={tmp_path / 'one'}", devices=8)
    _, errors = alone.communicate(timeout=400)
    assert alone.returncode == 0, errors
    copied = f"--config.checkpoint.mirror={tmp_path / 'copies'}"
    both = peers(*data, copied, f"--workdir={tmp_path / 'two'}")
    out = outputs(both, timeout=400)
    assert [process.returncode for process in both] == [0, 0], out
    said = re.sub("Gloo|Rank|is connected to|peer ranks|Expected number of connected|is :", "", out[1][0])
    assert not re.search("[A-Za-z]", said), out[1][0]  # nothing but Gloo's lines, which its threads mix
    assert "nine" in out[0][0]

    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(one, two, strict=True) if "loss" in a]
    difference = np.max([abs(a / b - 1) for a, b in pairs])
    print(f"largest relative difference of {len(pairs)} losses, one process against two: {difference:.1e}")
    assert len(pairs) == 6
    assert difference <= 1e-6
    held_out = [row["held_out/loss"] for rows in (one, two) for row in rows if "held_out/loss" in row]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6)
    reports = [json.loads((tmp_path / name / "zero_shot.json").read_text()) for name in ("one", "two")]
    assert [row["acc1"] for row in reports[0]] == [row["acc1"] for row in reports[1]]

    shutil.rmtree(tmp_path / "two")
    longer = ("--config.samples=336", "--config.eval.dataset=")
    resumed = start(*data, copied, f"--workdir={tmp_path / 'two'}", *longer, devices=8)  # in one process
    text, errors = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, errors
    assert "resuming at step 6" in text
    assert [row["step"] for row in lines(tmp_path / "two") if "loss" in row] == list(range(1, 8))


LONG_IN_ONE_PROCESS = """
import dataclasses, sys
from pathlib import Path

sys.path.insert(0, "tests")
from tiny import TINY

from clip_jax.config import DistributedConfig, MeshConfig
from clip_jax.data.loader import TrainingData
from clip_jax.data.order import rows_of_process
from clip_jax.data.synthetic import synthetic_batches
from clip_jax.processes.distributed import processes

workdir, address, index, count, init_from = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
explicit = DistributedConfig("explicit", address, count, index, address, 120)
run = dataclasses.replace(
    TINY,
    text_groups=("6:0.5",),
    mesh=MeshConfig(fsdp=2),
    samples=32 * 6,
    init_from=init_from,
    distributed=explicit if count > 1 else DistributedConfig("off"),
)


def batches(position):
    import jax

    rows = rows_of_process(32, jax.process_index(), jax.process_count())
    stream = synthetic_batches(
        batch=32, image_size=16, context=12, vocab_size=128, seed=0, position=position,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )
    for step, batch in enumerate(stream):
        tokens = batch["tokens"] % 126
        tokens[:, 4] = 127
        if step % 2:
            tokens[[row >= 16 for row in rows], 4] = 5
            tokens[:, 11] = 127
        yield batch | {"tokens": tokens}


with processes(run.distributed):
    from clip_jax.run.trainer import train

    train(run, Path(workdir), data=TrainingData(batches, {}, "pairs"))
"""


def long_in_one_process(workdir: Path, *, processes: int, init_from: str | Path = "") -> list[subprocess.Popen]:
    address = f"127.0.0.1:{free_port()}"
    return [
        start_script(LONG_IN_ONE_PROCESS, workdir, address, index, processes, init_from, devices=4 // processes)
        for index in range(processes)
    ]


@pytest.mark.slow
def test_captions_that_do_not_fit_in_one_process_hold_up_no_other(tmp_path):
    """In every second step one process of two has only captions of the whole length: all devices take that way, and
    losses are those of one process."""

    for name, processes in (("two", 2), ("one", 1)):
        started = long_in_one_process(tmp_path / name, processes=processes)
        out = outputs(started, timeout=400)
        assert not any(process.returncode for process in started), out
    one, two = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    assert [line["text_groups"] for line in two] == [line["text_groups"] for line in one] == [1, 0] * 3
    difference = np.max([abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, two, strict=True)])
    print(f"largest relative difference of 6 losses, one process against two: {difference:.1e}")
    assert difference <= 1e-6


@pytest.mark.slow
def test_several_processes_start_from_the_weights_of_a_run(tmp_path):
    """Each reads all of them, and finds the checkpoint whole; losses are those of one process that does."""
    for name, processes, init_from in (("begun", 1, ""), ("two", 2, "begun"), ("one", 1, "begun")):
        init_from = init_from and tmp_path / init_from
        started = long_in_one_process(tmp_path / name, processes=processes, init_from=init_from)
        out = outputs(started, timeout=400)
        assert not any(process.returncode for process in started), out
    begun, one, two = (
        [line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("begun", "one", "two")
    )
    assert one[0] < begun[0]
    np.testing.assert_allclose(two, one, rtol=1e-6)


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(
            f"--workdir={tmp_path}",
            "--config.distributed.mode=explicit",
            f"--config.distributed.coordinator=127.0.0.1:{port}",
            "--config.distributed.processes=2",
            "--config.distributed.process_id=0",
            devices=1,
        )
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert (
        f"coordinator: port {port} cannot be listened on (Address already in use); use another one in every" in errors
    )
    assert errors.count("\n") == 1


def test_a_coordinator_that_is_not_there_is_one_line(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    process = start(
        f"--workdir={tmp_path}",
        "--config.distributed.mode=explicit",
        f"--config.distributed.coordinator={address}",
        "--config.distributed.processes=2",
        "--config.distributed.process_id=1",
        "--config.distributed.timeout=1",
        devices=1,
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"error: config.distributed.coordinator: nobody answers at {address} within 1 s" in errors
    assert errors.count("\n") == 1


STEP = dict.fromkeys(SLURM, "0") | {"SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (STEP, "SLURM"),
        (STEP | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # a shell of salloc
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "Cloud TPU"),
        ({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "a"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_what_brings_processes_together(environment, expected):
    assert detect(DistributedConfig(), environment) == expected
    assert detect(DistributedConfig(mode="off"), environment) is None
    assert detect(dataclasses.replace(DistributedConfig(), mode="explicit"), environment) == "the config"


EIGHT = ",".join(map(str, range(8)))


@pytest.mark.parametrize(
    ("environment", "given"),
    [
        (
            {"SLURM_STEP_NUM_NODES": "4", "CUDA_VISIBLE_DEVICES": EIGHT},
            [],
        ),  # one task a node, as launch/slurm.sbatch has it
        ({"SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": EIGHT}, None),
        ({"SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0"}, []),  # each task is shown its own
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),  # JAX is told
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_a_process_has_all_the_devices_that_it_does_not_share(monkeypatch, environment, given, mode):
    """JAX would give a task of SLURM's or Open MPI's one, however many it sees."""
    known: dict[str, object] = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: known.update(options))
    for name in (*SLURM, "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (STEP if "SLURM_STEP_NUM_NODES" in environment else {}).items() | environment.items():
        monkeypatch.setenv(name, value)
    distributed._initialize(DistributedConfig(mode, f"127.0.0.1:{free_port()}", 2, 0), "SLURM")
    assert known["local_device_ids"] == given


def test_processes_that_jax_does_not_find_are_one_line(monkeypatch):
    """Such as those of Open MPI 5, whose variables it does not know."""

    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    refused = r"processes that Open MPI brings together \(coord.*\); say which they are with config"
    with pytest.raises(UserError, match=refused), distributed.processes(DistributedConfig()):
        pass


@pytest.mark.filterwarnings("ignore:'maxsplit' is passed as positional")  # by JAX, which Python 3.13 complains of
@pytest.mark.parametrize(("hosts", "slices", "expected"), [(1, "", None), (4, "", "Cloud TPU"), (1, "2", "Cloud TPU")])
def test_a_cloud_tpu_of_several_hosts_is_known_by_its_metadata(monkeypatch, hosts, slices, expected):
    """Its machines have none of it in their environment."""
    metadata = {
        "agent-worker-number": "0",
        "worker-network-endpoints": ",".join(f"unknown:unknown:10.0.0.{host}" for host in range(hosts)),
        "tpu-env": f"MEGASCALE_NUM_SLICES: '{slices}'\n" if slices else "",
    }
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # which JAX sets where there are no TPUs
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    assert detect(DistributedConfig(), {}) == expected
    metadata.clear()
    with pytest.raises(
        UserError, match=r"hosts this TPU has .* \('agent-worker-number'\); say config.distributed.mode="
    ):
        detect(DistributedConfig(), {})


def test_half_set_schedulers_are_named():
    assert half_set({}) == half_set(STEP) == []
    assert half_set({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) == [*SLURM[2:]]
