"""The train step: the same on one device and on eight, and what it must do to its state."""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import synthetic
from devices import simulating
from gradients import widened
from tiny import TINY

from clip_jax.config import LossConfig, MeshConfig, OptimConfig
from clip_jax.models.clip import CLIP, image_features
from clip_jax.models.variants import ResNetConfig
from clip_jax.partition import make_mesh, place_rows
from clip_jax.planning.hlo import collectives
from clip_jax.rules import leaf_paths
from clip_jax.training import towers
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import abstract_state, create_state
from clip_jax.training.step import _sample_keys, make_train_step
from clip_jax.training.towers import Towers

ROOT = Path(__file__).parent.parent


def slow_after(fast, cases):
    return [case if i < fast else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


def setup(run, devices):
    mesh, create, step = compiled(run, devices)
    return mesh, create(), step


@functools.cache
def compiled(run, devices):
    mesh = make_mesh(run.mesh, devices=jax.devices()[:devices])
    model, optimizer = CLIP(run.model), make_optimizer(run.optim, steps=run.steps)
    layout = {"mesh": mesh, "zero1": run.mesh.zero1, "ema": run.optim.ema_decay > 0}
    step = make_train_step(model, optimizer, run, mesh=mesh, state=abstract_state(model, optimizer, **layout))
    return mesh, functools.partial(create_state, model, optimizer, seed=run.seed, **layout), step


def losses(run, devices, count=20):
    mesh, state, step = setup(run, devices)
    found = []
    for batch in synthetic(run, count):
        state, metrics = step(state, place_rows(batch, mesh))
        found.append(float(metrics["loss"]))
    return np.array(found), state


@pytest.fixture(scope="module")
def alone():
    return losses(TINY, 1)


SIGMOID = dataclasses.replace(
    TINY,
    model=dataclasses.replace(TINY.model, logit_bias=True, temperature=0.1),
    loss=LossConfig(kind="sigmoid"),
)


@pytest.mark.parametrize("mesh", slow_after(1, [MeshConfig(2, 4), MeshConfig(8, 1)]), ids=str)
def test_one_device_and_eight_train_alike(alone, mesh):
    sharded, _ = losses(dataclasses.replace(TINY, mesh=mesh), 8)
    difference = np.abs(sharded / alone[0] - 1).max()
    print(f"largest relative difference of 20 losses, 1 device against {mesh}: {difference:.1e}")
    assert len(set(alone[0])) == 20
    assert difference <= 1e-5


EVERY_MESH = [
    MeshConfig(2, 2, dcn_data=2),
    MeshConfig(4, 2, zero1=True),
    MeshConfig(1, 8),
    MeshConfig(2, 4),
    MeshConfig(4, 2),
    MeshConfig(8, 1),
]


def setup_in_f64(run, devices):
    """As `setup`, where parameters, moments and statistics are float64 too; for use with x64."""
    mesh, state, step = setup(dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="float64")), devices)
    return mesh, jax.device_put(widened(state), jax.tree.map(lambda x: x.sharding, state)), step


def losses_in_f64(run, devices):
    """Losses of five steps."""
    with jax.enable_x64(True):
        mesh, state, step = setup_in_f64(run, devices)
        found = []
        for batch in synthetic(run, 5):
            state, metrics = step(state, place_rows(batch, mesh))
            found.append(float(metrics["loss"]))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float64", "int32"}
    return np.array(found)


def resnet(group):
    vision = ResNetConfig(image_size=32, width=16, heads=4, layers=(1, 1, 1, 1))
    return dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, vision=vision, bn_group=group))


@functools.cache
def alone_in_f64(run):
    return losses_in_f64(run, 1)


def assert_alike_in_f64(run, mesh):
    one, eight = alone_in_f64(run), losses_in_f64(dataclasses.replace(run, mesh=mesh), 8)
    difference = np.abs(eight / one - 1).max()
    print(f"largest relative difference of 5 losses in float64, 1 device against {mesh}: {difference:.1e}")
    assert len(set(one)) == 5
    assert difference <= 1e-9


@pytest.mark.parametrize("mesh", slow_after(2, EVERY_MESH), ids=str)
def test_a_vit_trains_alike_on_every_mesh_in_f64(mesh):
    assert_alike_in_f64(TINY, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("group", [8, 0])
@pytest.mark.parametrize("mesh", EVERY_MESH, ids=str)
def test_a_resnet_trains_alike_on_every_mesh_in_f64(mesh, group):
    """BatchNorm's statistics are over the whole batch, or over groups of samples, wherever these lie."""
    assert_alike_in_f64(resnet(group), mesh)


def test_initial_parameters_and_keys_depend_neither_on_the_mesh_nor_on_jaxs_generator():
    """Those of `rbg`, which JAX can be told to use, depend on what they are drawn together with."""
    mesh, one, _ = setup(TINY, 1)
    drawn = [jax.random.key_data(_sample_keys(seed, jnp.int32(at), 8, mesh)) for seed, at in ((0, 3), (0, 4), (1, 3))]
    keys = np.asarray(drawn[0])
    assert len(np.unique(np.concatenate(drawn), axis=0)) == 24  # of each pair, step and seed its own
    with jax.default_prng_impl("rbg"):
        mesh, eight, _ = setup(dataclasses.replace(TINY, mesh=MeshConfig(2, 4)), 8)
        np.testing.assert_array_equal(jax.random.key_data(_sample_keys(0, jnp.int32(3), 8, mesh)), keys)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_parameter_learns(alone):
    _, before, _ = setup(TINY, 1)
    after = alone[1]
    paths = leaf_paths(before.params)
    for path, a, b in zip(paths, jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert (a != b).any(), path
    assert int(after.step) == 20


def test_the_temperature_is_clamped_after_the_update_and_can_come_back():
    run = dataclasses.replace(TINY, optim=OptimConfig(lr=1e-2, warmup_steps=0, max_scale=15.0))
    mesh, state, step = setup(run, 1)
    top = float(np.log(np.float32(15.0)))
    scales = []
    for batch in synthetic(run, 20):
        state = state.replace(params=state.params | {"logit_scale": jnp.minimum(state.params["logit_scale"] + 0.5, 5)})
        state, _ = step(state, place_rows(batch, mesh))
        scales.append(float(state.params["logit_scale"]))
    assert max(scales) <= top
    assert top in [pytest.approx(scale, rel=1e-7) for scale in scales]


def test_the_temperature_has_a_gradient_at_the_limit():
    run = dataclasses.replace(TINY, optim=OptimConfig(lr=1e-2, warmup_steps=0, max_scale=1 / 0.07))
    mesh, state, step = setup(run, 1)
    state, _ = step(state, place_rows(synthetic(run, 1)[0], mesh))
    assert float(state.params["logit_scale"]) < float(np.log(1 / 0.07))  # at random features a lower scale is better


def test_weight_zero_pairs_do_not_count():
    """A pair of weight 0 may hold anything."""
    mesh, state, step = setup(TINY, 8)
    batch = synthetic(TINY, 1)[0]
    batch["weight"][5:9] = 0
    other = {name: rows.copy() for name, rows in batch.items()}
    other["image"][5:9] = 255 - other["image"][5:9]
    other["tokens"][5:9] = other["tokens"][9:13]
    _, one = step(state, place_rows(batch, mesh))
    _, state, _ = setup(TINY, 8)
    _, two = step(state, place_rows(other, mesh))
    assert float(one["pairs"]) == 28
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-6, err_msg=name)


def test_pixels_are_normalised_as_the_data_say():
    run = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    mesh, state, _ = setup(TINY, 1)
    [batch] = synthetic(TINY, 1)
    towers = Towers(CLIP(run.model), run, state.params, {}, mesh)
    found, _ = towers.image(state.params["image"], place_rows(batch, mesh))
    pixels = (batch["image"] / 255 - np.array(run.data.mean)) / np.array(run.data.std)
    expected = image_features(CLIP(run.model), state.variables, jnp.float32(pixels))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_image_tower_is_told_each_pairs_key_and_whether_it_counts(monkeypatch):
    mesh, state, _ = setup(TINY, 1)
    [batch] = synthetic(TINY, 1)
    batch["weight"][[3, 17]] = 0
    keys = _sample_keys(0, state.step, TINY.batch, mesh)
    monkeypatch.setattr(towers, "image_features_train", lambda *_, **told: (keys, told))
    _, told = Towers(CLIP(TINY.model), TINY, state.params, {}, mesh).image({}, place_rows(batch, mesh) | {"key": keys})
    assert told["keys"] is keys
    assert np.flatnonzero(~np.asarray(told["kept"])).tolist() == [3, 17]
    assert told["train"]


def test_the_state_is_donated():
    mesh, state, step = setup(TINY, 8)
    old = jax.tree.leaves(state.params)
    step(state, place_rows(synthetic(TINY, 1)[0], mesh))
    assert all(leaf.is_deleted() for leaf in old)


@pytest.mark.parametrize("form", ["chunked", "ring"])
def test_the_step_holds_no_rows_of_the_similarity_matrix(form):
    """No array of the compiled step on eight devices has as many elements as a device's rows of the logits."""
    loss = LossConfig(form=form, tile=64)
    run = dataclasses.replace(TINY, batch=2048, samples=2048 * 10, loss=loss)
    text = compiled_text(run)
    assert f"f32[64,{2048 if form == 'chunked' else 256}]" in text  # a tile of logits
    kinds = {each.kind for each in collectives(text, devices=8)}
    assert kinds == (
        {"all-gather", "reduce-scatter", "all-reduce"} if form == "chunked" else {"collective-permute", "all-reduce"}
    )
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w+\[([\d,]+)\]", text))
    assert largest < 256 * 2048
    reference = compiled_text(dataclasses.replace(run, loss=LossConfig(form="reference")))
    assert "f32[256,2048]" in reference
    assert "2048,2048]" not in reference


def compiled_text(run):
    mesh, state, step = setup(run, 8)
    return step.lower(state, place_rows(synthetic(run, 1)[0], mesh)).compile().as_text()


@pytest.mark.slow
def test_the_forms_of_a_loss_train_alike(alone):
    sigmoid, _ = losses(SIGMOID, 1, count=5)
    for run, form, one in ((TINY, "reference", alone[0][:5]), (SIGMOID, "ring", sigmoid)):
        loss = dataclasses.replace(run.loss, form=form)
        found, _ = losses(dataclasses.replace(run, loss=loss, mesh=MeshConfig(2, 4)), 8, count=5)
        assert np.abs(found / one - 1).max() <= 1e-5


def test_sigmoid_trains_scale_and_bias():
    found, state = losses(SIGMOID, 8, count=3)
    assert found[0] == pytest.approx(10, rel=0.2)  # -log σ(-10), and little from the negatives
    assert float(state.params["logit_bias"]) not in (-10, 0)
    assert float(state.params["logit_scale"]) != pytest.approx(np.log(10), abs=1e-6)
    paths = leaf_paths(state.opt_state)
    assert sum(path.endswith("logit_bias") for path in paths) == 2


def with_optim(run, **changes):
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, warmup_steps=0, **changes))


def test_the_average_follows_the_parameters_and_is_sharded_like_them():
    run = dataclasses.replace(with_optim(TINY, ema_decay=0.5), mesh=MeshConfig(2, 4))
    mesh, state, step = setup(run, 8)
    expected = jax.device_get(state.params)
    for batch in synthetic(run, 3):
        state, _ = step(state, place_rows(batch, mesh))
        expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * np.asarray(new), expected, state.params)
    for a, b, c in zip(*map(jax.tree.leaves, (state.ema, expected, state.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
        assert a.sharding == c.sharding
        assert (a != c).any()
    assert state.inference_variables["params"] is state.ema
    assert setup(TINY, 1)[1].inference_variables["params"] is not state.ema


def test_the_average_of_a_resnet_holds_its_running_statistics():
    """Else averaged parameters would be normalised by what those of the last steps gave."""
    run = with_optim(resnet(0), ema_decay=0.5)
    mesh, state, step = setup(run, 1)
    expected = jax.device_get(state.variables)
    for batch in synthetic(run, 2):
        state, _ = step(state, place_rows(batch, mesh))
        expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * np.asarray(new), expected, state.variables)
    assert leaf_paths(state.inference_variables) == leaf_paths(expected)
    for a, b in zip(*map(jax.tree.leaves, (state.inference_variables, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    assert not any(same(state.inference_variables["batch_stats"], state.batch_stats))


def same(a, b):
    return [bool((x == y).all()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]


def test_a_frozen_tower_costs_no_backward_pass():
    """Locked image tuning: the image tower stays to the bit, the text tower trains, and less is compiled."""
    dropping = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, patch_dropout=0.5))
    run = with_optim(dropping, freeze=("^image/",))
    mesh, state, step = setup(run, 1)
    before, batch = jax.device_get(state.params), place_rows(synthetic(run, 1)[0], mesh)
    flops = []
    for each in (run, with_optim(TINY)):
        _, fresh, compiled_step = setup(each, 1)
        flops.append(compiled_step.lower(fresh, batch).compile().cost_analysis()["flops"])
    after, metrics = step(state, batch)
    assert all(same(before["image"], after.params["image"]))
    assert not any(same(before["text"], after.params["text"]))
    assert float(metrics["gradient_norm"]) > 0
    assert flops[0] < 0.85 * flops[1]


def test_a_frozen_resnet_keeps_its_statistics():
    run = with_optim(dataclasses.replace(resnet(4), micro_batch=4), freeze=("^image/",))
    mesh, state, step = setup(run, 1)
    state = state.replace(batch_stats=jax.tree.map(lambda x: x + 0.3 / (1 + jnp.arange(len(x))), state.batch_stats))
    before = jax.device_get(state.batch_stats)
    after, _ = step(state, place_rows(synthetic(run, 1)[0], mesh))
    assert all(same(before, after.batch_stats))


@pytest.mark.slow
def test_random_patches_change_with_the_step_and_not_with_the_mesh():
    run = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, patch_dropout=0.5))
    one, _ = losses(run, 1, count=5)
    eight, _ = losses(dataclasses.replace(run, mesh=MeshConfig(2, 4)), 8, count=5)
    whole, _ = losses(TINY, 1, count=5)
    assert np.abs(eight / one - 1).max() <= 1e-5
    assert np.abs(whole / one - 1).min() > 1e-5
    mesh, state, step = setup(with_optim(run, lr=1e-30), 1)
    batch, found = place_rows(synthetic(run, 1)[0], mesh), []
    for _ in range(2):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    assert found[0] != found[1]


BENCHMARK = """
import sys
for name in {absent}:
    sys.modules[name] = None
sys.argv = ["step", "--config=configs/demo.py:batch=16", "--rounds=2", "--matmul=64", *{arguments}]
from benchmarks.step import main
main()
"""


@pytest.mark.slow
def test_the_benchmark_of_the_step_needs_few_packages():
    """Two runs in turns, one of them with something changed; nothing but jax, flax, optax, ml_collections, numpy."""
    absent = ["tensorflow", "tensorflow_datasets", "grain", "array_record", "torch", "tokenizers", "ftfy", "regex"]
    absent += ["simplejpeg", "PIL", "sklearn", "matplotlib", "tensorboardX", "jaxtyping", "cv2", "pandas"]
    arguments = [f"--config.model.{tower}.layers=1" for tower in ("vision", "text")]
    arguments += ["--config.data.source=synthetic", "--config.samples=16000", "--compare=model.dead_tokens=compute"]
    code = BENCHMARK.format(absent=absent, arguments=arguments)
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, env=simulating(1))
    assert found.returncode == 0, found.stderr
    print(found.stdout)
    kind, ours, other, title, _, row, *rates = found.stdout.splitlines()
    assert kind.startswith("1 x cpu, jax ")
    assert ours.startswith("as configured: custom, 16 pairs on 1 device(s), float32; ")
    for figure in (" s a step", " pairs/s", " TFLOP/s a device", " of the matrix product (effective ", "GiB a device"):
        assert figure in ours
        assert figure in other
    assert title.startswith("Training step, custom, 16 pairs on 1 device(s), float32; 1 x cpu, jax ")
    assert re.fullmatch(r"  as configured +[\d.,]+ +ms +model.dead_tokens=compute +[\d.,]+ +[\d.]+x", row)
    runs, figures = ("as configured", "model.dead_tokens=compute"), ("pairs", "share of the peak")
    assert [line.strip().split("  ")[0] for line in rates] == [f"{run}: {what}" for run in runs for what in figures]
