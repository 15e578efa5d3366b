"""Checkpoints: bits survive the trip, on any mesh; what is damaged is noticed, and what cannot be written said."""

import dataclasses
import logging
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from states import assert_same_bits, small_state, target_of
from tiny import TINY

from clip_jax.checkpoints.checkpoint import Checkpoints
from clip_jax.checkpoints.model import read_run
from clip_jax.config import CheckpointConfig, MeshConfig, as_json
from clip_jax.data.images import Preprocess
from clip_jax.models.clip import CLIP
from clip_jax.models.variants import ResNetConfig
from clip_jax.partition import make_mesh
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import abstract_state, create_state

MODEL, OPTIMIZER = CLIP(TINY.model), make_optimizer(TINY.optim, steps=TINY.steps)


def state_on(mesh_config: MeshConfig, *, seed: int = 0):
    return create_state(MODEL, OPTIMIZER, mesh=make_mesh(mesh_config), seed=seed)


def save(checkpoints: Checkpoints, step: int, state) -> None:
    checkpoints.save(step, state, position=step * TINY.batch, config=TINY, data={"name": "made up"}, now=True)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    yield opened
    opened.close()


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1), MeshConfig(2, 4), MeshConfig(1, 8)], ids=str)
def test_any_mesh_restores_the_same_bits(tmp_path, mesh):
    state = state_on(MeshConfig(4, 2))
    writer = Checkpoints(tmp_path, CheckpointConfig())
    save(writer, 3, state)
    writer.close()
    reader = Checkpoints(tmp_path, CheckpointConfig())
    restored, position, _ = reader.restore(3, abstract_state(MODEL, OPTIMIZER, mesh=make_mesh(mesh)))
    assert position == 96
    assert_same_bits(state, restored)
    assert restored.params["text"]["projection"]["kernel"].sharding.mesh.shape["fsdp"] == mesh.fsdp
    reader.close()


def test_a_reader_of_the_weights_knows_their_pixels(tmp_path):
    run = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state_on(MeshConfig()), position=0, config=run, data={}, now=True)
    assert read_run(tmp_path)[2] == Preprocess(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_the_state_may_be_donated_while_it_is_written(checkpoints):
    state = state_on(MeshConfig())
    kept = jax.tree.map(np.array, state)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    save(checkpoints, 1, state)
    for _ in range(3):
        state = double(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, _, _ = checkpoints.restore(1, abstract_state(MODEL, OPTIMIZER, mesh=make_mesh(MeshConfig())))
    assert_same_bits(kept, restored)


def test_a_save_does_not_count_where_processes_agree_to_end(tmp_path, monkeypatch):
    """JAX has one counter for that, and `Preemption` counts in it."""
    asked = []
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", asked.append)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        save(checkpoints, 7, small_state(1))
    assert asked == []


def test_the_newest_are_kept(checkpoints, tmp_path):
    assert checkpoints.latest() is None
    assert not (tmp_path / "checkpoints").exists()  # looking writes nothing
    state = small_state(0)
    for step in (1, 2, 3):
        save(checkpoints, step, state)
    checkpoints.wait()
    assert checkpoints.latest() == 3
    assert steps_in(tmp_path) == [2, 3]


def steps_in(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def run_steps(workdir: Path, config: CheckpointConfig, metrics: dict[int, float], *, steps: int = 12) -> list[int]:
    """Calls `save` after every step, as a run does; returns the steps that were written."""
    written = []
    with Checkpoints(workdir, config) as checkpoints:
        for step in range(1, steps + 1):
            measured = {"top1": metrics[step], "other": 0.0} if step in metrics else None
            if checkpoints.save(
                step, small_state(0), position=0, config=TINY, data={}, metrics=measured, now=step == steps
            ):
                written.append(step)
                checkpoints.wait()
    return written


@pytest.mark.parametrize(
    ("config", "metrics", "written", "kept"),
    [
        (CheckpointConfig(every=5, keep=9), {}, [5, 10, 12], [5, 10, 12]),
        (CheckpointConfig(every=2, keep=1, keep_every=4), {}, [2, 4, 6, 8, 10, 12], [4, 8, 12]),
        (
            CheckpointConfig(every=4, keep=1, best_metric="top1"),
            {3: 0.2, 6: 0.9, 9: float("nan")},
            [3, 4, 6, 8, 9, 12],
            [6, 12],
        ),
        (
            CheckpointConfig(every=4, keep=1, best_metric="top1", best_mode="min"),
            {3: 0.2, 6: 0.9},
            [3, 4, 6, 8, 12],
            [3, 12],
        ),
    ],
    ids=["every", "keep_every", "best", "smallest"],
)
def test_when_checkpoints_are_written_and_which_are_kept(tmp_path, config, metrics, written, kept):
    assert run_steps(tmp_path, config, metrics) == written
    assert steps_in(tmp_path) == kept


def test_the_best_is_known_after_a_restart(tmp_path):
    """And a checkpoint from before any metric was asked for does not stay for ever."""
    config = CheckpointConfig(every=100, keep=1, best_metric="top1")
    run_steps(tmp_path, dataclasses.replace(config, best_metric=""), {}, steps=1)
    run_steps(tmp_path, config, {2: 0.9}, steps=3)
    with Checkpoints(tmp_path, config) as checkpoints:
        step, _ = checkpoints.restore_latest(target_of(small_state(0)))
        assert step == 3
        for step, top1 in ((4, 0.3), (5, 0.4)):
            checkpoints.save(step, small_state(0), position=0, config=TINY, data={}, metrics={"top1": top1})
    assert steps_in(tmp_path) == [2, 5]


def test_less_than_a_second_for_a_write_is_one(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(timeout_s=0.3)) as checkpoints:
        assert not checkpoints.save(1, small_state(0), position=0, config=TINY, data={})


def test_the_clock_decides_too(tmp_path):
    config = CheckpointConfig(every=1_000, minutes=1 / 60, keep=9)
    with Checkpoints(tmp_path, config) as checkpoints:
        written = []
        for step in range(1, 26):
            written += [step] * checkpoints.save(step, small_state(0), position=0, config=TINY, data={})
            time.sleep(0.1)
    assert written[0] == 1
    assert 2 <= len(written) <= 4
    assert steps_in(tmp_path) == written


@pytest.mark.parametrize("minutes", [0.0, 60.0])
def test_what_it_costs_to_ask_after_every_step(tmp_path, minutes):
    """Nothing is due: printed, not asserted, in CPU time, beside what it takes to start a save."""
    with Checkpoints(tmp_path, CheckpointConfig(every=1_000_000, minutes=minutes)) as checkpoints:
        arguments = {"position": 0, "config": TINY, "data": {}}
        began = time.thread_time()
        checkpoints.save(1, small_state(0), **arguments, now=True)
        saving = time.thread_time() - began
        checkpoints.wait()
        state = small_state(0)
        began = time.thread_time()
        assert not any(checkpoints.save(step, state, **arguments) for step in range(2, 1_002))
        asking = (time.thread_time() - began) / 1_000
    print(f"minutes={minutes}: {1e6 * asking:.0f} us to ask, {1e3 * saving:.0f} ms to start a save (CPU time)")


def test_what_is_not_whole_is_passed_over(checkpoints, tmp_path, caplog):
    save(checkpoints, 2, state_on(MeshConfig()))
    checkpoints.wait()
    (tmp_path / "checkpoints" / "9").mkdir()
    (tmp_path / "checkpoints" / "8" / "state").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest() == 2
    assert f"{tmp_path / 'checkpoints' / '9'} lacks state, data, config, metadata, record" in caplog.text
    assert f"{tmp_path / 'checkpoints' / '8'} lacks data, config, metadata, record" in caplog.text


def test_config_and_metadata_travel(checkpoints, tmp_path):
    save(checkpoints, 2, state_on(MeshConfig()))
    checkpoints.wait()
    assert checkpoints.read_contents(2).config == as_json(TINY)
    metadata = (tmp_path / "checkpoints" / "2" / "metadata" / "metadata").read_text()
    for word in ('"quick_gelu"', '"tokenizer": "clip"', '"git_revision"', '"made up"', '"size": 16', '"mean"', '"jax"'):
        assert word in metadata


def test_what_a_run_gives_is_its_average(tmp_path):
    run = dataclasses.replace(TINY, optim=dataclasses.replace(TINY.optim, ema_decay=0.9))
    state = create_state(MODEL, OPTIMIZER, mesh=make_mesh(MeshConfig()), seed=0, ema=True)
    state = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))
    checkpoints = Checkpoints(tmp_path, run.checkpoint)
    checkpoints.save(1, state, position=0, config=run, data={}, now=True)
    checkpoints.close()
    _, variables, _ = read_run(tmp_path)
    for a, b in zip(*map(jax.tree.leaves, (variables["params"], state.ema)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_was_trained_is_read_whatever_its_config_contradicts(checkpoints, tmp_path):
    state, data = state_on(MeshConfig()), dataclasses.replace(TINY.data, crop_scale=(0.5, 1.0))
    checkpoints.save(1, state, position=0, config=dataclasses.replace(TINY, data=data), data={}, now=True)
    checkpoints.wait()
    assert_same_bits(read_run(tmp_path)[1], state.variables)


RESNET = dataclasses.replace(
    TINY.model, vision=ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 1, 1, 1)), bn_group=8
)


@pytest.fixture(scope="module")
def averaging():
    """A run of a ResNet, and a state of it whose average is another model than what was trained."""
    run = dataclasses.replace(TINY, model=RESNET, optim=dataclasses.replace(TINY.optim, ema_decay=0.9))
    state = create_state(CLIP(RESNET), OPTIMIZER, mesh=make_mesh(MeshConfig()), seed=0, ema=True)
    return run, state.replace(**jax.tree.map(lambda x: x + 1, state.variables))


@pytest.mark.slow
def test_what_a_resnet_gives_is_averaged_whole(averaging, tmp_path):
    run, state = averaging
    checkpoints = Checkpoints(tmp_path, run.checkpoint)
    checkpoints.save(1, state, position=0, config=run, data={}, now=True)
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(1, target_of(state)).state, state)
    checkpoints.close()
    assert_same_bits(read_run(tmp_path)[1], state.inference_variables)


@pytest.mark.slow
def test_an_average_without_statistics_is_not_taken_and_goes_on_with_the_trained_ones(averaging, tmp_path, caplog):
    run, state = averaging
    older = state.replace(ema=state.ema["params"])
    checkpoints = Checkpoints(tmp_path, run.checkpoint)
    checkpoints.save(1, older, position=0, config=run, data={}, now=True)
    checkpoints.wait()
    restored = checkpoints.restore(1, target_of(state)).state
    checkpoints.close()
    assert_same_bits(restored, state.replace(ema={"params": older.ema, "batch_stats": state.batch_stats}))
    assert_same_bits(read_run(tmp_path)[1], state.variables)
    assert "averages parameters without BatchNorm's statistics; what was trained is taken" in caplog.text
