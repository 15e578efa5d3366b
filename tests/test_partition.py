"""The mesh, the axes of parameters, and batches on it; on 8 simulated devices."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import partition
from clip_jax.config import MeshConfig, OptimConfig
from clip_jax.errors import ConfigError
from clip_jax.models.clip import create_model, init_variables
from clip_jax.partition import (
    PARAMETER_AXES,
    check_batch,
    constrain_rows,
    hybrid_grid,
    make_mesh,
    place_rows,
    row_sharding,
    state_shardings,
    traced_for,
)
from clip_jax.rules import apply_rules, leaf_paths
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import abstract_state, new_state


def test_mesh_takes_the_rest():
    assert dict(make_mesh(MeshConfig()).shape) == {"dcn_data": 1, "data": 8, "fsdp": 1}
    assert dict(make_mesh(MeshConfig(fsdp=4)).shape) == {"dcn_data": 1, "data": 2, "fsdp": 4}
    assert dict(make_mesh(MeshConfig(fsdp=2, dcn_data=2)).shape) == {"dcn_data": 2, "data": 2, "fsdp": 2}
    assert dict(make_mesh(MeshConfig(), devices=jax.devices()[:1]).shape) == {"dcn_data": 1, "data": 1, "fsdp": 1}


@pytest.mark.parametrize(
    "sizes", [MeshConfig(fsdp=3), MeshConfig(data=4, fsdp=4), MeshConfig(fsdp=16), MeshConfig(fsdp=8, dcn_data=2)]
)
def test_mesh_that_does_not_fit_says_what_would(sizes):
    with pytest.raises(ConfigError, match=r"there are 8 devices; .* must be 8 \(each can be 1, 2, 4, 8,"):
        make_mesh(sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as the mesh looks at."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "chip"


ISLANDS = {  # 16 devices, in the order in which JAX lists them: two islands of eight
    "slices of a TPU": [Chip(i, process_index=i // 4, slice_index=i // 8) for i in range(16)],
    "nodes of one process": [Chip(i, process_index=i // 8) for i in range(16)],
    "nodes of a process for each device": [Chip(i, process_index=i) for i in range(16)],
}


@pytest.mark.parametrize("kind", ISLANDS)
def test_only_dcn_data_crosses_slices_and_nodes(kind):
    grid = hybrid_grid(2, (2, 4), ISLANDS[kind])
    assert grid.shape == (2, 2, 4)
    assert [{chip.id // 8 for chip in island.flat} for island in grid] == [{0}, {1}]
    assert {chip.id for chip in grid.flat} == set(range(16))


def test_dcn_data_that_is_not_the_slices_says_what_would_fit():
    with pytest.raises(ConfigError, match=r"config.mesh.dcn_data is 4, and the devices are in 2 slices; use 1 or 2$"):
        hybrid_grid(4, (2, 2), ISLANDS["slices of a TPU"])


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
    moments = shardings.opt_state[1][0]
    assert moments.mu == moments.nu == shardings.params


def bytes_of(tree):
    """Bytes on one device."""
    return sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_bytes_a_device_fall_as_the_axes_say(name):
    """Parameters with fsdp, optimizer state with fsdp and, under ZeRO-1, with data; vectors stay, a thousandth."""
    model, optimizer = create_model(name), make_optimizer(OptimConfig(), steps=9000)

    def found(mesh):
        state = abstract_state(model, optimizer, mesh=make_mesh(mesh), zero1=mesh.zero1)
        return bytes_of(state.params), bytes_of(state.opt_state)

    params, moments = found(MeshConfig())
    assert moments == pytest.approx(2 * params, rel=1e-6)
    for mesh, of_params, of_moments in (
        (MeshConfig(fsdp=8), 8, 8),
        (MeshConfig(fsdp=2), 2, 2),
        (MeshConfig(zero1=True), 1, 8),
        (MeshConfig(fsdp=2, zero1=True), 2, 8),
        (MeshConfig(dcn_data=2, zero1=True), 1, 4),
    ):
        a, b = found(mesh)
        print(f"{name} {mesh}: parameters {params / a:.2f}x, optimizer state {moments / b:.2f}x smaller")
        assert params / a == pytest.approx(of_params, rel=0.02)
        assert moments / b == pytest.approx(of_moments, rel=0.02)


def test_a_dimension_that_fsdp_does_not_divide_is_named():
    sizes = {"x/projection/kernel": 16, "y/projection/kernel": 12}
    leaves = {path: jax.ShapeDtypeStruct((size, 5), jnp.float32) for path, size in sizes.items()}
    message = "fsdp is 8, which does not divide 12, a dimension of y/projection/kernel; of this model it must divide 4$"
    with pytest.raises(ConfigError, match=message):
        state_shardings(leaves, make_mesh(MeshConfig(fsdp=8)))


def test_rows_keep_their_order():
    rows = np.arange(32).reshape(16, 2)
    placed = place_rows({"x": rows}, make_mesh(MeshConfig(fsdp=2)))["x"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding.shard_shape(placed.shape) == (2, 2)


@pytest.mark.parametrize("devices", [1, 8])
def test_activations_are_row_major_on_gpus_and_move_nowhere(monkeypatch, devices):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:devices])
    x = jax.ShapeDtypeStruct((16, 4, 3), jnp.float32, sharding=row_sharding(mesh))

    @jax.jit
    def gradient(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(lambda x: (constrain_rows(2 * x) ** 3).sum())(x)

    plain = gradient.lower(x).as_text()
    assert "LayoutConstraint" not in plain
    monkeypatch.setattr(partition, "traced_for", lambda: "gpu")
    jax.clear_caches()
    lowered = gradient.lower(x)
    constraints = [line for line in lowered.as_text().splitlines() if "custom_call @LayoutConstraint" in line]
    assert len(constraints) == 2  # of the value, and of its gradient
    assert all("result_layouts = [dense<[2, 1, 0]>" in line for line in constraints)  # from the innermost axis
    compiled = lowered.compile()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    given = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    np.testing.assert_allclose(compiled(jax.device_put(given, x.sharding)), 24 * given**2, rtol=1e-6)


def test_a_step_is_traced_for_its_meshs_platform():
    assert traced_for() == ""
    with jax.sharding.use_abstract_mesh(make_mesh(MeshConfig()).abstract_mesh):
        assert traced_for() == "cpu"
