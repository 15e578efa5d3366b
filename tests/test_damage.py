"""Damaged checkpoints: whatever happens to a file, a restore gives the saved bits, or the checkpoint before."""

import collections
import dataclasses
import gc
import json
import logging
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from etils import epath
from random_weights import random_like
from states import assert_same_bits, small_state, target_of
from tiny import TINY

from clip_jax.checkpoints.checkpoint import Checkpoints
from clip_jax.checkpoints.checksum import checksums
from clip_jax.checkpoints.model import read_run
from clip_jax.config import CheckpointConfig, MeshConfig
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.partition import make_mesh
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import TrainState, abstract_state

# a coroutine of Orbax's ends in an exception that Orbax does not hear of
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

KEPT = CheckpointConfig(best_metric="zero_shot/photo/top1")


@pytest.fixture(autouse=True)
def collected():
    """Here, where the warnings are expected, and not in a later test."""
    yield
    gc.collect()


def write(workdir: Path, states: dict[int, TrainState], config: CheckpointConfig = KEPT) -> None:
    with Checkpoints(workdir, config) as checkpoints:
        for step, state in states.items():
            checkpoints.save(
                step,
                state,
                position=32 * step,
                config=TINY,
                data={"name": "made up"},
                metrics={config.best_metric: 0.5},
            )


def placed(state: TrainState, target: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding), state, target)


def files_of(workdir: Path, step: int) -> list[Path]:
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def judged(workdir: Path, states: dict[int, TrainState]) -> str:
    """Restores, checks every bit of what comes, and returns whether the damage was harmless or noticed."""
    with Checkpoints(workdir, KEPT) as checkpoints:
        found = checkpoints.restore_latest(target_of(states[2]))
    assert found is not None
    step, restored = found
    assert_same_bits(states[step], restored.state)
    assert restored.position == 32 * step
    assert (workdir / "checkpoints" / "damaged-2").exists() == (step == 1)
    return "harmless" if step == 2 else "noticed"


def damaged(tmp_path: Path, damage, *, devices: int, times: int) -> collections.Counter:
    """Does one damage at a time to every file of a checkpoint; returns file name -> outcome counts."""
    states = {step: small_state(step, devices) for step in (1, 2)}
    write(tmp_path / "whole", states)
    outcomes = collections.Counter()
    rng = random.Random(devices)
    files = files_of(tmp_path / "whole", 2)
    large = max(files, key=lambda file: file.stat().st_size * ("/d/" in str(file)))  # most of the arrays' bytes
    for number, file in enumerate([*files, *[large] * 4] * times):
        workdir = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", workdir)
        damage(workdir / file.relative_to(tmp_path / "whole"), rng)
        outcomes[judged(workdir, states), str(file.relative_to(tmp_path / "whole" / "checkpoints" / "2"))] += 1
        shutil.rmtree(workdir)
    return outcomes


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_one_flipped_bit_in_any_file_is_harmless_or_noticed(tmp_path, times, caplog):
    outcomes = damaged(tmp_path / "one", flip, devices=1, times=times)
    outcomes += damaged(tmp_path / "two", flip, devices=2, times=times)
    verdicts = collections.Counter(verdict for verdict, _ in outcomes.elements())
    print(f"{outcomes.total()} flips in {len({file for _, file in outcomes})} files: {dict(verdicts)}")
    assert len({file for _, file in outcomes}) >= 25
    assert outcomes.total() >= 40 * times
    for name in ("data", "config", "metadata", "record", "metrics"):
        assert any(file.startswith(f"{name}/m") for verdict, file in outcomes if verdict == "noticed"), name
    assert re.search("has changed in (params|opt_state|ema)/", caplog.text)  # by a checksum, where Orbax saw nothing


@pytest.mark.parametrize("damage", [truncate, delete])
def test_truncated_and_deleted_files_are_harmless_or_noticed(tmp_path, damage):
    """Also what a power loss leaves, for Orbax does not wait until the disk has its JSON files."""
    outcomes = damaged(tmp_path, damage, devices=1, times=1)
    noticed = {file for verdict, file in outcomes if verdict == "noticed"}
    for name in ("data/metadata", "config/metadata", "metadata/metadata", "record/metadata", "metrics/metrics"):
        assert name in noticed


def test_orbax_alone_restores_a_flipped_bit_as_a_wrong_weight(tmp_path):
    """Why there are checksums: this test fails when they are no longer needed."""
    state = small_state(2)
    write(tmp_path, {2: state})
    largest = max(files_of(tmp_path, 2), key=lambda file: file.stat().st_size * ("/d/" in str(file)))
    wrong = 0
    for seed in range(8):
        kept = largest.read_bytes()
        flip(largest, random.Random(seed))
        folder = epath.Path(tmp_path / "checkpoints" / "2" / "state")
        try:
            found = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(target_of(state)))
            wrong += checksums(found) != checksums(state)
        except Exception:
            pass
        largest.write_bytes(kept)
    assert wrong


def test_the_warning_names_the_leaf(tmp_path, caplog):
    states = {step: small_state(step) for step in (1, 2)}
    write(tmp_path, states)
    record = tmp_path / "checkpoints" / "2" / "state"
    other = {2: states[2].replace(params=states[2].params | {"scale": states[2].params["scale"] + 1})}
    write(tmp_path / "other", other)
    shutil.rmtree(record)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "2" / "state", record)
    with caplog.at_level(logging.WARNING):
        assert judged(tmp_path, states) == "noticed"
    assert "checkpoints/2 has changed in params/scale; an older one is taken; it is damaged-2 now" in caplog.text


def test_a_position_that_was_changed_is_noticed(tmp_path):
    states = {step: small_state(step) for step in (1, 2)}
    write(tmp_path, states)
    file = tmp_path / "checkpoints" / "2" / "data" / "metadata"
    assert json.loads(file.read_text()) == {"position": 64, "skips": []}
    file.write_text('{"position": 65, "skips": []}')
    assert judged(tmp_path, states) == "noticed"


def test_directories_that_are_no_checkpoints(tmp_path):
    """Empty ones and half-deleted ones neither count nor keep a later step from being saved."""
    states = {step: small_state(step) for step in (1, 2)}
    write(tmp_path, states)
    folder = tmp_path / "checkpoints"
    (folder / "9").mkdir()
    shutil.copytree(folder / "2", folder / "8")
    shutil.rmtree(folder / "8" / "config")
    (folder / "0").mkdir()
    (folder / "0" / "state").mkdir()
    assert judged(tmp_path, states) == "harmless"
    assert {path.name for path in folder.iterdir()} == {"0", "1", "2", "damaged-8"}
    write(tmp_path, {8: states[2], 9: states[2]})
    with Checkpoints(tmp_path, KEPT) as checkpoints:
        assert checkpoints.latest() == 9


def test_an_older_damaged_checkpoint_is_never_the_best_and_stops_nothing(tmp_path):
    """Orbax reads the metrics of all when it opens a folder, and dies of one that is cut."""
    states = {step: small_state(step) for step in (1, 2)}
    write(tmp_path, states)
    truncate(tmp_path / "checkpoints" / "1" / "metrics" / "metrics", random.Random(0))
    with Checkpoints(tmp_path, KEPT) as checkpoints:
        assert checkpoints.restore_latest(target_of(states[2]))[0] == 2
        assert checkpoints.save(3, states[1], position=96, config=TINY, data={}, now=True)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "3", "damaged-1"}


def test_no_good_checkpoint_is_an_error_and_no_fresh_start(tmp_path):
    states = {step: small_state(step) for step in (1, 2)}
    write(tmp_path, states)
    for step in states:
        truncate(files_of(tmp_path, step)[0].parent / "data" / "metadata", random.Random(0))
    for _ in range(2):  # the second time as well, when they have other names
        checkpoints = Checkpoints(tmp_path, KEPT)
        with pytest.raises(UserError, match=r"holds no checkpoint that can be used, .*damaged-1, damaged-2; bring"):
            checkpoints.restore_latest(target_of(states[2]))
    shutil.rmtree(tmp_path / "checkpoints")
    assert Checkpoints(tmp_path, KEPT).restore_latest(target_of(states[2])) is None


def test_another_state_is_no_damage(tmp_path):
    state = small_state(2)
    write(tmp_path, {2: state})
    target = target_of(state)
    other = jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=target.params["scale"].sharding)
    with pytest.raises(UserError, match=r"checkpoints/2 holds another state.*params/scale is .*float32.*bfloat16"):
        Checkpoints(tmp_path, KEPT).restore_latest(target.replace(params=target.params | {"scale": other}))
    fewer = {name: leaf for name, leaf in target.params.items() if name != "extra"}
    with pytest.raises(UserError, match=r"another state.*params/extra is .*float32.* there and None here"):
        Checkpoints(tmp_path, KEPT).restore_latest(target.replace(params=fewer))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_rewind_takes_an_earlier_checkpoint_and_abandons_the_later_ones(tmp_path):
    states = {step: small_state(step) for step in (2, 4, 6)}
    write(tmp_path, states)
    with Checkpoints(tmp_path, KEPT) as checkpoints:
        checkpoints.save(7, states[2], position=1, skips=((64, 96),), config=TINY, data={}, now=True)
        step, restored = checkpoints.restore_before(6, target_of(states[2]))
        assert step == 4
        assert_same_bits(states[4], restored.state)
        assert checkpoints.latest() == 4
        assert checkpoints.save(6, states[6], position=2, skips=((64, 96),), config=TINY, data={}, now=True)
        checkpoints.wait()
        assert checkpoints.restore(6, target_of(states[6])).skips == ((64, 96),)
        assert checkpoints.restore_before(2, target_of(states[2]))[0] == 6  # none is earlier: no beginning anew
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "6", "abandoned-6", "abandoned-7"}


def test_readers_of_weights_verify_too(tmp_path, caplog):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    config = dataclasses.replace(TINY.checkpoint, keep=2)
    target = abstract_state(CLIP(TINY.model), make_optimizer(TINY.optim, steps=TINY.steps), mesh=mesh)
    states = {step: placed(random_like(target, seed=step), target) for step in (1, 2)}
    with Checkpoints(tmp_path, config) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, position=0, config=TINY, data={}, now=True)
    for file in files_of(tmp_path, 2):
        if "/d/" in str(file):  # whichever of them hold the weights, and not the moments
            content = bytearray(file.read_bytes())
            for place in range(len(content) // 10, len(content) * 9 // 10, 97):
                content[place] ^= 4
            file.write_bytes(content)
    before = {path: path.read_bytes() for path in files_of(tmp_path, 2)}
    with caplog.at_level(logging.WARNING):
        _, variables, _ = read_run(tmp_path)
    assert "checkpoint 2 of" in caplog.text
    assert_same_bits(variables["params"], states[1].params)
    assert before == {path: path.read_bytes() for path in files_of(tmp_path, 2)}
