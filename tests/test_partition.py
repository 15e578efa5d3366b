"""The mesh, the axes of parameters, and batches on it; on 8 simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import MeshConfig, OptimConfig
from clip_jax.errors import ConfigError
from clip_jax.models.clip import create_model, init_variables
from clip_jax.optim import make_optimizer
from clip_jax.partition import PARAMETER_AXES, check_batch, make_mesh, place_rows, state_shardings
from clip_jax.rules import apply_rules, leaf_paths
from clip_jax.state import new_state


def test_mesh_takes_the_rest():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(MeshConfig(fsdp=4)).shape) == {"data": 2, "fsdp": 4}
    assert dict(make_mesh(MeshConfig(), devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize("sizes", [MeshConfig(fsdp=3), MeshConfig(data=4, fsdp=4), MeshConfig(fsdp=16)])
def test_mesh_that_does_not_fit_says_what_would(sizes):
    with pytest.raises(ConfigError, match=r"there are 8 devices; data x fsdp must be 8 \(fsdp can be 1, 2, 4, 8,"):
        make_mesh(sizes)


def test_batch_that_does_not_fit_says_what_would():
    mesh = make_mesh(MeshConfig())
    check_batch("batch", 16, mesh)
    with pytest.raises(ConfigError, match=r"config.batch is 12, not divisible by the mesh's 8 devices; use 8 or 16"):
        check_batch("batch", 12, mesh)
    with pytest.raises(ConfigError, match=r"use 8$"):
        check_batch("batch", 3, mesh)


def variables_of(name):
    return jax.eval_shape(lambda: init_variables(create_model(name), jax.random.key(0)))


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14@336", "RN50", "RN50x64"])
def test_every_matrix_is_split_and_every_vector_whole(name):
    variables = variables_of(name)
    shardings = state_shardings(variables, make_mesh(MeshConfig(fsdp=8)))
    leaves = zip(leaf_paths(variables), jax.tree.leaves(variables), jax.tree.leaves(shardings), strict=True)
    for path, leaf, sharding in leaves:
        split = leaf.size // np.prod(sharding.shard_shape(leaf.shape))
        assert split == (1 if leaf.ndim < 2 or "stem_conv" in path else 8), path


def test_every_rule_is_some_models():
    apply_rules(PARAMETER_AXES, {name: variables_of(name) for name in ("ViT-B/32", "RN50")})


def test_moments_are_sharded_like_their_parameters():
    model = create_model("ViT-B/32")
    state = jax.eval_shape(lambda: new_state(model, make_optimizer(OptimConfig(), steps=9000), 0))
    shardings = state_shardings(state, make_mesh(MeshConfig(fsdp=8)))
    moments = shardings.opt_state[0]
    assert moments.mu == moments.nu == shardings.params


def test_a_dimension_that_fsdp_does_not_divide_is_named():
    leaf = {"x/projection/kernel": jax.ShapeDtypeStruct((12, 4), jnp.float32)}
    with pytest.raises(ConfigError, match=r"config.mesh.fsdp is 8, which does not divide a model dimension of 12"):
        state_shardings(leaf, make_mesh(MeshConfig(fsdp=8)))


def test_rows_keep_their_order():
    rows = np.arange(32).reshape(16, 2)
    placed = place_rows({"x": rows}, make_mesh(MeshConfig(fsdp=2)))["x"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding.shard_shape(placed.shape) == (2, 2)
