"""The gradient of a small transformer, for tests of what its program computes, copies and keeps."""

import jax
import jax.numpy as jnp
from tiny import TINY

from clip_jax.config import MeshConfig
from clip_jax.models.fences import compiler_options
from clip_jax.models.layers import BlockInit, Transformer
from clip_jax.models.variants import TextConfig
from clip_jax.partition import make_mesh


def compiled_gradient(depth, shape):
    """Returns the compiled gradient of a transformer's sum by its weights and its argument, of that shape [b, l, d].

    As in a training step on CPUs.
    """
    sizes = TextConfig(width=shape[-1], heads=1, layers=depth)
    tower = Transformer(sizes, False, BlockInit.scaled(sizes), TINY.model)
    x, rows = jnp.ones(shape), jnp.zeros((shape[0], 1), jnp.int32)
    weights = tower.init(jax.random.key(0), x, rows)
    gradient = jax.grad(lambda weights, x: tower.apply(weights, x, rows).sum(), argnums=(0, 1))
    options = compiler_options(make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    return jax.jit(gradient, compiler_options=options).lower(weights, x).compile()


def kept_by_a_block(shape):
    """Returns the bytes that the compiled gradient holds at once more for each block more."""
    two, four = (compiled_gradient(depth, shape).memory_analysis().temp_size_in_bytes for depth in (2, 4))
    return (four - two) / 2
