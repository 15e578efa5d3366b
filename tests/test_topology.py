"""A run that goes on with other devices and processes, in the middle of an epoch: the same leaves, the same losses.

That leaves are the same on every mesh is in `test_checkpoint.py` as well, in the fast tier.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import outputs, simulating
from states import assert_same_bits
from topology_leg import leg

from clip_jax.config import MeshConfig
from clip_jax.processes.distributed import free_port

ROOT = Path(__file__).parent.parent


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def difference(found: dict[int, float], straight: dict[int, float]) -> float:
    assert found.keys() == straight.keys()
    return np.max([abs(found[step] / straight[step] - 1) for step in straight])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_8_then_2_then_4_devices(x64, model, tmp_path):
    """fsdp on 8 devices, then data alone on 2, then both with ZeRO-1 on 4; against 8 all the way."""
    straight, _, _ = leg(tmp_path / "straight", model, MeshConfig(2, 4), until=6)
    losses, _, last = leg(tmp_path / "moved", model, MeshConfig(2, 4), until=2)
    for mesh, until in ((MeshConfig(2, 1), 4), (MeshConfig(2, 2, zero1=True), 6)):
        more, begun, after = leg(tmp_path / "moved", model, mesh, until=until)
        assert_same_bits(begun, last)
        losses, last = losses | more, after
    far = difference(losses, straight)
    print(f"{model}: largest relative difference of 6 losses in float64, 8 -> 2 -> 4 devices: {far:.1e}")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(last)} == {"float64", "int32"}
    assert len(set(straight.values())) == 6
    assert far <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_2_then_1_then_2_processes(model, tmp_path):
    """Four devices, in two processes, in one, and in two; against one process all the way."""
    straight = in_processes(1, tmp_path / "straight", model, "2x2", 6)
    losses = {}
    for count, mesh, until in ((2, "1x4", 2), (1, "4x1", 4), (2, "2x2", 6)):
        losses |= in_processes(count, tmp_path / "moved", model, mesh, until)
    far = difference(losses, straight)
    print(f"{model}: largest relative difference of 6 losses in float64, 2 -> 1 -> 2 processes: {far:.1e}")
    assert far <= 1e-9


def in_processes(count: int, workdir, model: str, mesh: str, until: int) -> dict[int, float]:
    """Runs a leg in processes of their own; returns process 0's losses."""
    environment = simulating(4 // count) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "tests/topology_leg.py", *map(str, (i, count, address, workdir, model, mesh, until))],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    out = outputs(started, timeout=550)
    assert [process.returncode for process in started] == [0] * count, out
    return {int(step): loss for step, loss in json.loads(out[0][0].splitlines()[-1]).items()}
