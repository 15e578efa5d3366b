"""Walls between blocks: where they stand, and that without them each block adds up all blocks' gradients again."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from clip_jax.config import MeshConfig
from clip_jax.fences import compiler_options, fence_gradient
from clip_jax.models import layers
from clip_jax.models.layers import BlockInit, Transformer
from clip_jax.partition import make_mesh


def gradient(depth):
    """The gradient of a small transformer's sum by its weights, with those weights."""
    tower = Transformer(depth, 1, False, "gelu", BlockInit.scaled(8, depth), jnp.float32, "none", False, False)
    x, rows = jnp.ones((2, 3, 8)), jnp.zeros((2, 1), jnp.int32)
    weights = tower.init(jax.random.key(0), x, rows)
    return lambda weights: jax.grad(lambda weights: tower.apply(weights, x, rows).sum())(weights), weights


def additions(depth):
    """How many additions the compiled gradient has, with what fusions compute again."""
    function, weights = gradient(depth)
    options = compiler_options(make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    text = jax.jit(function, compiler_options=options).lower(weights).compile().as_text()
    return len(re.findall(r" add\(", text))


def test_additions_of_the_gradient_are_linear_in_the_depth(monkeypatch):
    three, five, seven = (additions(depth) for depth in (3, 5, 7))
    fenced = (seven - five) / (five - three)
    monkeypatch.setattr(layers, "fence_gradient", lambda x: x)
    three, five, seven = (additions(depth) for depth in (3, 5, 7))
    unfenced = (seven - five) / (five - three)
    print(f"additions of blocks 6 and 7 to those of blocks 4 and 5: {fenced:.2f} with walls, {unfenced:.2f} without")
    assert fenced == pytest.approx(1, abs=0.05)
    assert unfenced > 1.2


def test_a_wall_changes_no_gradient(monkeypatch):
    function, weights = gradient(3)
    fenced = jax.jit(function)(weights)
    monkeypatch.setattr(layers, "fence_gradient", lambda x: x)
    jax.tree.map(np.testing.assert_array_equal, fenced, jax.jit(gradient(3)[0])(weights))


@pytest.mark.parametrize(("platform", "walls"), [("cpu", 1), ("cuda", 0), ("tpu", 0)])
def test_only_programs_for_cpus_have_walls(platform, walls):
    squares = jax.jit(jax.grad(lambda x: (fence_gradient(x) ** 2).sum()))
    text = export.export(squares, platforms=[platform])(jnp.ones(3)).mlir_module()
    assert text.count("stablehlo.optimization_barrier") == walls


def test_what_is_only_applied_has_no_wall():
    text = jax.jit(lambda x: fence_gradient(x) + 1).lower(jnp.ones(3)).as_text()
    assert "barrier" not in text
    assert "case" not in text
