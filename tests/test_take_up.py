"""What dense layers take up of norms and biases before them, in programs for GPUs: the same function, fewer sums."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import batch_of, gradients, largest_difference
from tiny import TINY

from clip_jax.config import MeshConfig
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.layers import Block, BlockInit, take_up
from clip_jax.partition import make_mesh
from clip_jax.training import towers


def block_both_ways(dtype, takes_up, seed=0):
    """Returns a block's result and gradients by parameters and rows; random ones, whose norms do much."""
    rng = np.random.default_rng(seed)
    model = dataclasses.replace(TINY.model, dtype=jnp.dtype(dtype).name)
    sizes = TINY.model.text
    block = Block(sizes, False, BlockInit.scaled(sizes), model)
    x, weights = 2 + 3 * rng.standard_normal((8, 50, 32)), rng.standard_normal((8, 50, 32))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    wide = jnp.promote_types(dtype, jnp.float32)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape) * leaf.shape[0] ** -0.5, shapes)
    for name in ("ln_1", "ln_2"):
        params[name] = {"scale": 1 + rng.standard_normal(32), "bias": 2 * rng.standard_normal(32)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, wide), params)

    def apply(params, x):
        return block.apply({"params": take_up(params) if takes_up else params}, x)

    @jax.jit
    def both_ways(params, x):
        result, pull = jax.vjp(apply, params, x)
        return result, pull(jnp.asarray(weights, result.dtype))

    return both_ways, params, jnp.asarray(x, dtype)


def test_what_is_taken_up_changes_no_value_and_no_gradient():
    def computed(takes_up):
        function, *given = block_both_ways(jnp.float64, takes_up)
        return jax.tree.leaves_with_path(function(*given))

    with jax.enable_x64(True):
        found, expected = computed(True), computed(False)
    for (path, a), (_, b) in zip(found, expected, strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-13 * float(np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_in_bf16_they_are_as_close_to_the_definition():
    def computed(dtype, takes_up, seed):
        function, *given = block_both_ways(dtype, takes_up, seed)
        return jax.tree_util.tree_leaves_with_path(jax.device_get(function(*given)))

    def errors(takes_up):
        totals = {}
        for seed in range(5):
            with jax.enable_x64(True):
                exact = computed(jnp.float64, False, seed)
            for (path, a), (_, b) in zip(computed(jnp.bfloat16, takes_up, seed), exact, strict=True):
                name = jax.tree_util.keystr(path)
                totals[name] = totals.get(name, 0) + np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b) / 5
        return totals

    taken_up, applied = errors(True), errors(False)
    for name, error in applied.items():
        print(f"{name}: {taken_up[name]:.2e}, {error:.2e} where the norm applies its gains")
        assert taken_up[name] <= 1.2 * error, name


def test_on_gpus_what_is_taken_up_is_no_sum_over_rows():
    """Of a program's sums over rows, which are of float32, those of biases remain, but not of keys' or values'."""

    def widths(takes_up):
        function, *given = block_both_ways(jnp.bfloat16, takes_up)
        text = function.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        return sorted(map(int, re.findall(r"across dimensions = \[0, 1\] : \(tensor<8x50x(\d+)xf32>", text)))

    query, qkv, out, mlp = 32, 3 * 32, 32, 4 * 32
    assert widths(False) == sorted([qkv, out, mlp, out, *4 * [32]])
    assert widths(True) == sorted([query, out, mlp, out])


def test_keys_that_are_taken_up_have_a_bias_without_gradient():
    function, params, x = block_both_ways(jnp.bfloat16, True)
    of_bias = jnp.split(function(params, x)[1][0]["attention"]["qkv"]["bias"], 3)
    assert [bool(part.any()) for part in of_bias] == [True, False, True]


def test_what_is_no_block_takes_up_nothing():
    tower = {"ln_pre": {"scale": 1}, "block_0": {"conv_1": {"kernel": 2}}, "positions": 3}
    assert take_up(tower) == tower


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_step_for_gpus_has_the_gradients_of_others(monkeypatch, scan_layers):
    """In float64, on 8 devices with split parameters and in groups."""
    text = dataclasses.replace(TINY.model.text, layers=3)
    model = dataclasses.replace(TINY.model, dtype="float64", text=text, scan_layers=scan_layers)
    run = dataclasses.replace(TINY, model=model, batch=64, text_groups=("8:0.5",), mesh=MeshConfig(2, 4))
    with jax.enable_x64(True):
        batch = batch_of(run)
        _, expected, _ = gradients(run, 8, batch)
        taken_up = []
        monkeypatch.setattr(towers, "traced_for", lambda: "gpu")
        monkeypatch.setattr(towers, "take_up", lambda params: taken_up.append(params) or take_up(params))
        _, found, _ = gradients(dataclasses.replace(run, samples=run.samples + 64), 8, batch)  # not the same program
    assert taken_up
    error, where = largest_difference(found, expected)
    print(f"largest relative difference of a gradient {error:.1e}")
    assert error <= 1e-12, where


@pytest.mark.parametrize(
    ("platform", "micro_batch", "expected"),
    [("gpu", 0, True), ("gpu", 32, True), ("gpu", 16, False), ("cpu", 0, False), ("tpu", 0, False)],
)
def test_who_takes_up(monkeypatch, platform, micro_batch, expected):
    monkeypatch.setattr(towers, "traced_for", lambda: platform)
    run = dataclasses.replace(TINY, micro_batch=micro_batch)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])

    def variables():
        params = init_variables(CLIP(run.model), jax.random.key(0))["params"]
        return towers.Towers(CLIP(run.model), run, params, {}, mesh)._variables({})

    block = jax.eval_shape(variables)["params"]["image"]["transformer"]["block_0"]
    assert (block["ln_1"] == {"scale": None, "bias": None}) == expected
