"""Random weights in which every tensor has a visible effect."""

import math

import jax
import numpy as np

from clip_jax.rules import leaf_paths


def random_like(shapes, *, dtype=np.float64, seed=0):
    """Fills a tree of parameters or variables: none is near 0 on average, gains and variances are near 1.

    exp(logit_scale) is 20.
    """
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path.endswith("logit_scale"):
            return np.full(shape, math.log(20))
        if path.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, shape)
        if path.endswith(("bias", "mean")):
            return rng.normal(0, 0.3, shape)
        if path.endswith(("embedding", "positions", "class_token")):
            return rng.normal(0, 0.5, shape)
        return rng.normal(0, math.prod(shape[:-1]) ** -0.5, shape)

    leaves = [
        draw(path, leaf.shape).astype(dtype)
        for path, leaf in zip(leaf_paths(shapes), jax.tree.leaves(shapes), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
