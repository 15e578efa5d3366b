"""LayerNorm: Flax's values and gradients, less that a program for CPUs keeps and adds, and gains that in a program for
GPUs the next layer takes up."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import compiled_gradient, kept_by_a_block
from flax.errors import ScopeParamNotFoundError
from gradients import batch_of, gradients, largest_difference
from jax import export
from tiny import TINY

from clip_jax import towers
from clip_jax.config import MeshConfig
from clip_jax.models import layers
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.layers import Block, BlockInit, take_up_gains
from clip_jax.models.norm import EPSILON, LayerNorm
from clip_jax.partition import make_mesh

TAKEN_UP = {"scale": None, "bias": None}


def flax_norm(dtype, *, name):
    return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)


def result_and_gradients(make, shape, dtype):
    """A function of a norm's variables and argument, and random ones."""
    keys = jax.random.split(jax.random.key(0), 3)
    wide = jnp.promote_types(dtype, jnp.float32)
    parameters = {
        "scale": jax.random.normal(keys[0], shape[-1:], wide),
        "bias": jax.random.normal(keys[1], shape[-1:], wide),
    }
    module, x = make(dtype, name="norm"), (3 * jax.random.normal(keys[2], shape) + 2).astype(dtype)

    def value(variables, x):
        result = module.apply(variables, x)
        return (result.astype(wide) ** 3).sum(), result

    return jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True)), {"params": parameters}, x


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 3, 2, 8)])
def test_values_and_gradients_are_those_of_flax(shape):
    with jax.enable_x64(True):
        (ours, *arguments), (theirs, *_) = (
            result_and_gradients(make, shape, jnp.float64) for make in (LayerNorm, flax_norm)
        )
        (gradients, result), (expected, their_result) = ours(*arguments), theirs(*arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves((gradients, result))} == {jnp.dtype("float64")}
    np.testing.assert_array_equal(result, their_result)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), gradients, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_numbers_keep_their_types_and_flax_values(dtype):
    (ours, *arguments), (theirs, *_) = (result_and_gradients(make, (4, 64), dtype) for make in (LayerNorm, flax_norm))
    (gradients, result), (expected, their_result) = ours(*arguments), theirs(*arguments)
    np.testing.assert_array_equal(result, their_result)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), gradients, expected)
    unit = float(jnp.finfo(dtype).eps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float64(a), np.float64(b), atol=2 * unit * float(abs(b).max())),
        gradients,
        expected,
    )


@pytest.mark.parametrize(
    "parameters", [{"scale": jnp.ones(768), "bias": jnp.zeros(768)}, TAKEN_UP], ids=["own", "taken up"]
)
def test_it_is_exact_where_the_mean_is_large(parameters):
    """E[x²]-E[x]² in float32 errs by more than 1e-3 here."""

    def apply(x):
        return LayerNorm(jnp.float32, name="norm").apply({"params": parameters}, jnp.asarray(x, jnp.float32))

    x = 100 + np.random.default_rng(0).standard_normal((4, 768))
    exact = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(apply(x), exact, atol=5e-5)
    small = np.full((1, 768), 1e-3) * np.sign(np.arange(768) % 2 - 0.5)
    np.testing.assert_allclose(np.abs(apply(small)), 1e-3 / math.sqrt(1e-6 + 1e-5), rtol=1e-4)  # epsilon 1e-5, not 1e-6


@pytest.mark.parametrize(("platform", "products"), [("cpu", 2), ("cuda", 0), ("tpu", 0)])
def test_only_programs_for_cpus_sum_by_products(platform, products):
    function, *arguments = result_and_gradients(LayerNorm, (2, 3, 8), jnp.bfloat16)
    text = export.export(function, platforms=[platform])(*arguments).mlir_module()
    assert text.count("stablehlo.dot_general") == products


@pytest.mark.parametrize(("platform", "walls"), [("cpu", 0), ("cuda", 1), ("tpu", 0)])
@pytest.mark.parametrize("own", [True, False], ids=["own gains", "taken up"])
def test_only_programs_for_gpus_compute_again_in_the_backward_pass(platform, walls, own):
    function, variables, x = result_and_gradients(LayerNorm, (2, 3, 8), jnp.bfloat16)
    arguments = (variables if own else {"params": TAKEN_UP}, x)
    text = export.export(function, platforms=[platform])(*arguments).mlir_module()
    assert text.count("stablehlo.optimization_barrier") == walls


def block_both_ways(dtype, take_up, seed=0):
    """Returns a block's result and gradients by parameters and rows; random ones, whose norms do much."""
    rng = np.random.default_rng(seed)
    block = Block(2, False, "quick_gelu", BlockInit.scaled(32, 1), dtype)
    x, weights = 2 + 3 * rng.standard_normal((8, 50, 32)), rng.standard_normal((8, 50, 32))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    wide = jnp.promote_types(dtype, jnp.float32)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape) * leaf.shape[0] ** -0.5, shapes)
    for name in ("ln_1", "ln_2"):
        params[name] = {"scale": 1 + rng.standard_normal(32), "bias": 2 * rng.standard_normal(32)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, wide), params)

    def apply(params, x):
        return block.apply({"params": take_up_gains(params) if take_up else params}, x)

    @jax.jit
    def both_ways(params, x):
        result, pull = jax.vjp(apply, params, x)
        return result, pull(jnp.asarray(weights, result.dtype))

    return both_ways, params, jnp.asarray(x, dtype)


def test_gains_that_are_taken_up_change_no_value_and_no_gradient():
    def computed(take_up):
        function, *given = block_both_ways(jnp.float64, take_up)
        return jax.tree.leaves_with_path(function(*given))

    with jax.enable_x64(True):
        found, expected = computed(True), computed(False)
    for (path, a), (_, b) in zip(found, expected, strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-13 * float(np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


def test_in_bf16_they_are_as_close_to_the_definition():
    def computed(dtype, take_up, seed):
        function, *given = block_both_ways(dtype, take_up, seed)
        return jax.tree_util.tree_leaves_with_path(jax.device_get(function(*given)))

    def errors(take_up):
        totals = {}
        for seed in range(5):
            with jax.enable_x64(True):
                exact = computed(jnp.float64, False, seed)
            for (path, a), (_, b) in zip(computed(jnp.bfloat16, take_up, seed), exact, strict=True):
                name = jax.tree_util.keystr(path)
                totals[name] = totals.get(name, 0) + np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b) / 5
        return totals

    taken_up, applied = errors(True), errors(False)
    for name, error in applied.items():
        print(f"{name}: {taken_up[name]:.2e}, {error:.2e} where the norm applies its gains")
        assert taken_up[name] <= 1.2 * error, name


def test_on_gpus_gains_that_are_taken_up_are_no_sums_over_rows():
    """Of a program's sums over rows, which are of float32, only those of four biases remain."""

    def sums(take_up):
        function, *given = block_both_ways(jnp.bfloat16, take_up)
        text = function.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        return len(re.findall(r"across dimensions = \[0, 1\] : \(tensor<8x50x", text))

    assert sums(False) == 4 + 2 * 2
    assert sums(True) == 4


def test_parameters_that_are_missing_are_not_taken_for_taken_up():
    with pytest.raises(ScopeParamNotFoundError, match='"scale"'):
        LayerNorm(jnp.float32).apply({"params": {"bias": jnp.zeros(8)}}, jnp.ones((2, 8)))


def test_what_is_no_block_takes_up_nothing():
    tower = {"ln_pre": {"scale": 1}, "block_0": {"conv_1": {"kernel": 2}}, "positions": 3}
    assert take_up_gains(tower) == tower


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_step_for_gpus_has_the_gradients_of_others(monkeypatch, scan_layers):
    """In float64, on 8 devices with split parameters and in groups."""
    text = dataclasses.replace(TINY.model.text, layers=3)
    model = dataclasses.replace(TINY.model, dtype="float64", text=text, scan_layers=scan_layers)
    run = dataclasses.replace(TINY, model=model, batch=64, text_groups=("4:0.25", "8:0.375"), mesh=MeshConfig(2, 4))
    with jax.enable_x64(True):
        batch = batch_of(run)
        _, expected, _ = gradients(run, 8, batch)
        taken_up = []
        monkeypatch.setattr(towers, "traced_for", lambda: "gpu")
        monkeypatch.setattr(towers, "take_up_gains", lambda params: taken_up.append(params) or take_up_gains(params))
        _, found, _ = gradients(dataclasses.replace(run, samples=run.samples + 64), 8, batch)  # not the same program
    assert taken_up
    error, where = largest_difference(found, expected)
    print(f"largest relative difference of a gradient {error:.1e}")
    assert error <= 1e-12, where


@pytest.mark.parametrize(
    ("platform", "micro_batch", "expected"),
    [("gpu", 0, True), ("gpu", 32, True), ("gpu", 16, False), ("cpu", 0, False), ("tpu", 0, False)],
)
def test_who_takes_up_gains(monkeypatch, platform, micro_batch, expected):
    monkeypatch.setattr(towers, "traced_for", lambda: platform)
    run = dataclasses.replace(TINY, micro_batch=micro_batch)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])

    def variables():
        params = init_variables(CLIP(run.model), jax.random.key(0))["params"]
        return towers.Towers(CLIP(run.model), run, params, {}, mesh)._variables({})

    block = jax.eval_shape(variables)["params"]["image"]["transformer"]["block_0"]
    assert (block["ln_1"] == TAKEN_UP) == expected


def test_additions_of_the_gradient_are_linear_in_the_depth(monkeypatch):
    """How many there are in the compiled program, with what its fusions compute again."""

    def growth():
        three, five, seven = (
            len(re.findall(r" add\(", compiled_gradient(depth, (2, 3, 8)).as_text())) for depth in (3, 5, 7)
        )
        return (seven - five) / (five - three)

    ours = growth()
    monkeypatch.setattr(layers, "LayerNorm", flax_norm)
    theirs = growth()
    print(f"additions of blocks 6 and 7 to those of blocks 4 and 5: {ours:.2f}, {theirs:.2f} with Flax's norms")
    assert ours == pytest.approx(1, abs=0.05)
    assert theirs > 1.2


def test_a_block_keeps_less_than_with_flax_norms(monkeypatch):
    shape = (4, 50, 64)
    ours = kept_by_a_block(shape)
    monkeypatch.setattr(layers, "LayerNorm", flax_norm)
    theirs = kept_by_a_block(shape)
    print(f"kept of a block of {shape} floats: {ours:,.0f} bytes, {theirs:,.0f} with Flax's norms")
    assert theirs - ours >= 2 * 2 * np.prod(shape) * 4  # deviations and repeated gains of two norms
