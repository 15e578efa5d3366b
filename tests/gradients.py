"""Gradients of whole training steps in float64, by their parameters' paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from batches import synthetic

from clip_jax.models.clip import CLIP
from clip_jax.partition import make_mesh, place_rows
from clip_jax.rules import leaf_paths
from clip_jax.training.state import abstract_state, create_state
from clip_jax.training.step import make_train_step

NEGLIGIBLE = ("attention/qkv/bias", "attention_pool/key/bias")  # a key's bias has no gradient but for rounding


def batch_of(run):
    """Returns synthetic pairs, three of them with weight 0."""
    (batch,) = synthetic(run, 1)
    batch["weight"][[3, 17, 40]] = 0
    return batch


def gradients(run, devices, batch):
    """Returns metrics, gradients by their paths, and running statistics of one step; for use with x64.

    Weights are random, so that none is where its gradient would vanish.
    """
    step, state, before, mesh = _compiled(run, devices)
    after, metrics = step(state(), place_rows(batch, mesh))
    moved = jax.tree.map(lambda a, b: a - np.asarray(b), before, after.params)
    return (
        {name: float(value) for name, value in metrics.items()},
        by_path(moved),
        jax.device_get(after.batch_stats),
    )


def by_path(tree):
    """Returns the leaves by their paths, as `largest_difference` takes them."""
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def widened(state):
    """Returns the state with float64 for float32; for use with x64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)


def largest_difference(found, expected):
    """Returns the largest difference of a gradient over the leaf's largest value, and where it is; of NaN the first."""
    errors = {
        path: float(np.abs(found[path] - leaf).max() / np.abs(leaf).max())
        for path, leaf in expected.items()
        if not path.endswith(NEGLIGIBLE)
    }
    worst = list(errors)[np.argmax(list(errors.values()))]
    return errors[worst], worst


@functools.cache
def _compiled(run, devices):
    mesh = make_mesh(run.mesh, devices=jax.devices()[:devices])
    model, optimizer = CLIP(run.model), optax.sgd(1.0)
    state = create_state(model, optimizer, mesh=mesh, seed=0)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    wide = widened(state)
    rng = np.random.default_rng(0)
    before = jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape), wide.params)
    host = jax.device_get(wide.replace(params=before))
    step = make_train_step(model, optimizer, run, mesh=mesh, state=abstract_state(model, optimizer, mesh=mesh))
    return step, lambda: jax.device_put(host, shardings), before, mesh
