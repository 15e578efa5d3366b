"""Dense layers: Flax's values and gradients, no transposed copies in programs for CPUs, no sums of narrow numbers."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import compiled_gradient
from jax import export
from tiny import TINY

from clip_jax.models import layers
from clip_jax.models.dense import Dense, add_parameter
from clip_jax.models.variants import ResNetConfig
from clip_jax.planning.plan import lower_step


def gradients(layer, shape, dtype):
    """A function of the layer's variables and arguments, which gives both gradients, with such arguments."""
    module = layer(5, dtype=dtype, param_dtype=dtype, bias_init=nn.initializers.normal())
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    variables = module.init(jax.random.key(1), x)
    return jax.grad(lambda *arguments: (module.apply(*arguments) ** 2).sum(), argnums=(0, 1)), variables, x


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_values_and_gradients_are_those_of_flax(shape):
    with jax.enable_x64(True):
        (ours, *arguments), (theirs, *_) = (gradients(layer, shape, jnp.float64) for layer in (Dense, nn.Dense))
        found, expected = ours(*arguments), theirs(*arguments)
    assert jax.tree.leaves(found)[0].dtype == jnp.float64
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), found, expected)


def test_a_bias_gradient_of_narrow_numbers_is_summed_in_wide_ones():
    rng = np.random.default_rng(0)
    x, gradient = (jnp.asarray(rng.standard_normal((16, 50, 8)), jnp.bfloat16) for _ in range(2))
    exact = np.asarray(gradient, np.float64).sum((0, 1))

    def error(layer):
        module = layer(8, dtype=jnp.bfloat16)
        variables = module.init(jax.random.key(0), x)
        (found,) = jax.vjp(lambda variables: module.apply(variables, x), variables)[1](gradient)
        assert found["params"]["bias"].dtype == jnp.float32
        return float(np.abs(np.asarray(found["params"]["bias"], np.float64) - exact).max() / np.abs(exact).max())

    ours, theirs = error(Dense), error(nn.Dense)
    print(f"error of a bias' gradient over 800 rows of bfloat16: {ours:.1e}, {theirs:.1e} with Flax's layer")
    assert ours < 1e-6


@pytest.mark.parametrize("shape", [(8,), (5,), (50, 8)], ids=["bias", "of the first channels", "positions"])
def test_so_is_what_is_added_to_all_rows(shape):
    rng = np.random.default_rng(0)
    gradient = jnp.asarray(rng.standard_normal((800, 50, 8)), jnp.bfloat16)
    exact = np.asarray(gradient, np.float64)[..., : shape[-1]].sum(tuple(range(3 - len(shape))))

    def error(add):
        (found,) = jax.vjp(lambda parameter: add(jnp.zeros_like(gradient), parameter), jnp.zeros(shape))[1](gradient)
        return float(np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max())

    def plainly(x, parameter):
        missing = [(0, 0)] * (len(shape) - 1) + [(0, x.shape[-1] - shape[-1])]
        return x + jnp.pad(parameter, missing).astype(x.dtype)

    ours, theirs = error(add_parameter), error(plainly)
    print(f"error of the gradient of what is added to 800 rows: {ours:.1e}, {theirs:.1e} as JAX sums it")
    assert ours < 1e-6


@pytest.mark.parametrize("groups", [(), ("4:0.25", "8:0.375")], ids=["whole rows", "groups"])
@pytest.mark.parametrize("vision", [TINY.model.vision, ResNetConfig(32, 8, 4, (1, 1, 1, 1))], ids=["vit", "resnet"])
def test_a_step_sums_nothing_in_narrow_numbers(vision, groups):
    model = dataclasses.replace(TINY.model, vision=vision, dtype="bfloat16")
    run = dataclasses.replace(TINY, model=model, batch=64, text_groups=groups)
    text = lower_step(run, jax.devices()[:4])[1].as_text()
    summed = re.findall(r"applies stablehlo\.add across dimensions = \[.*\] : \(tensor<\S*x(\w+)>", text)
    assert summed.count("f32") > 50
    assert "bf16" not in summed


def products(layer, platform):
    """What a program for a platform multiplies, in no order."""
    function, *arguments = gradients(layer, (2, 3, 4), jnp.bfloat16)
    text = export.export(jax.jit(function), platforms=[platform])(*arguments).mlir_module()
    found = re.findall(r"stablehlo\.(?:dot_general|transpose) .*?-> tensor<\S*>", text)
    return sorted(re.sub(r"%\w+", "%", line) for line in found)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_multiply_as_in_flax(platform):
    assert products(Dense, platform) == products(nn.Dense, platform)


def test_programs_for_cpus_multiply_rows():
    found = "\n".join(products(Dense, "cpu"))
    assert "contracting_dims = [0] x [0] : (tensor<6x4xbf16>, tensor<6x5xbf16>)" in found
    assert "contracting_dims = [0, 1]" not in found
    assert "contracting_dims = [0, 1]" in "\n".join(products(nn.Dense, "cpu"))


def copied(depth):
    """The bytes of transposed copies in the compiled gradient of a transformer, by its weights and its argument."""
    text = compiled_gradient(depth, (4, 8, 32)).as_text()
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    return sum(4 * int(np.prod([int(side) for side in shape.split(",")])) for shape in shapes)


def test_a_block_copies_less_than_with_flax_layers(monkeypatch):
    ours = copied(4) - copied(3)
    monkeypatch.setattr(layers, "dense_of", lambda model: functools.partial(nn.Dense, dtype=model.dtype))
    theirs = copied(4) - copied(3)
    print(f"transposed copies of a block of 4 x 8 tokens of 32 floats: {ours:,} bytes, {theirs:,} with Flax's layers")
    results = 4 * 8 * 32 * 4 * (3 + 1 + 4 + 1)  # of the four dense layers
    assert theirs - ours >= results
