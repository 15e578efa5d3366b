"""Train states of few leaves, for tests that write and read many."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.config import MeshConfig
from clip_jax.partition import make_mesh
from clip_jax.training.state import TrainState


def small_state(seed: int, devices: int = 1, *, extra: int = 0) -> TrainState:
    """Leaves of every kind, some of them split over the devices; `extra` numbers more."""
    mesh = make_mesh(MeshConfig(fsdp=devices), devices=jax.devices()[:devices])
    rng = np.random.default_rng(seed)

    def leaf(*shape: int, dtype=np.float32, split: bool = False):
        spec = PartitionSpec(None, "fsdp") if split else PartitionSpec()
        return jax.device_put(rng.standard_normal(shape).astype(dtype), NamedSharding(mesh, spec))

    params = {"kernel": leaf(96, 64, split=True), "scale": leaf(5), "logit_scale": leaf(), "extra": leaf(extra + 1)}
    moments = {"mu": leaf(96, 64, dtype=jnp.bfloat16, split=True), "count": jax.device_put(seed, leaf().sharding)}
    return TrainState(moments["count"], params, {"mean": leaf(3)}, moments, {"kernel": leaf(96, 64)})


def target_of(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same_bits(one, two) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
