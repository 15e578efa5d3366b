"""Activations: values and derivatives by definition, rounded once, and less that a program for CPUs keeps of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import kept_by_a_block
from jax import export

from clip_jax.models.activations import ACTIVATIONS

GATES = {
    "quick_gelu": lambda x: 1 / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x]),
}
SLOPES = {
    "quick_gelu": lambda x, gate: gate + 1.702 * x * gate * (1 - gate),
    "gelu": lambda x, gate: gate + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives(name):
    x = np.linspace(-4, 4, 33)
    gate = GATES[name](x)
    with jax.enable_x64(True):
        value, pull = jax.vjp(jax.jit(ACTIVATIONS[name]), jnp.asarray(x))
        (slope,) = pull(jnp.ones(33))
    np.testing.assert_allclose(value, x * gate, rtol=1e-12)
    np.testing.assert_allclose(slope, SLOPES[name](x, gate), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_bf16_they_are_rounded_once(name):
    given = jnp.linspace(-4, 4, 2048).astype(jnp.bfloat16)
    x = np.float64(given)
    gate = GATES[name](x)
    value, pull = jax.vjp(jax.jit(ACTIVATIONS[name]), given)
    (slope,) = pull(jnp.ones_like(given))
    assert value.dtype == slope.dtype == jnp.bfloat16
    for found, exact in ((value, x * gate), (slope, SLOPES[name](x, gate))):
        error = np.max(np.abs(np.float64(found) - exact) / np.abs(exact))
        print(f"{name}: relative error {error:.1e}, of a rounding {2.0**-8:.1e}")
        assert error < 1.001 * 2.0**-8


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("platform", "walls"), [("cpu", 1), ("cuda", 0), ("tpu", 0)])
def test_a_wall_between_the_passes_only_in_programs_for_cpus(name, platform, walls):
    applied, differentiated = ACTIVATIONS[name], jax.grad(lambda x: ACTIVATIONS[name](x).sum())
    texts = [
        export.export(jax.jit(function), platforms=[platform])(jnp.ones(3)).mlir_module()
        for function in (applied, differentiated)
    ]
    assert [text.count("stablehlo.optimization_barrier") for text in texts] == [0, walls]


def test_a_block_keeps_no_sigmoid(monkeypatch):
    shape = (4, 50, 64)
    anew = kept_by_a_block(shape)
    monkeypatch.setitem(ACTIVATIONS, "quick_gelu", lambda x: x * jax.nn.sigmoid(1.702 * x))
    kept = kept_by_a_block(shape)
    print(f"kept of a block of {shape} floats: {anew:,.0f} bytes, {kept:,.0f} with JAX's derivative of QuickGELU")
    assert kept - anew >= 4 * np.prod(shape) * 4  # four times as wide
