"""LayerNorm: Flax's values and gradients, less that a program for CPUs keeps and adds; and one without gains."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import compiled_gradient, kept_by_a_block
from flax.errors import ScopeParamNotFoundError
from jax import export

from clip_jax.models import layers
from clip_jax.models.norm import EPSILON, LayerNorm

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


def test_parameters_that_are_missing_are_not_taken_for_taken_up():
    with pytest.raises(ScopeParamNotFoundError, match='"scale"'):
        LayerNorm(jnp.float32).apply({"params": {"bias": jnp.zeros(8)}}, jnp.ones((2, 8)))


@pytest.mark.slow
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
