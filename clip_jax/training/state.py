"""The train state, born sharded: shapes first, then shardings, then one jitted initialisation into them."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from clip_jax.models.clip import CLIP, Variables, init_variables
from clip_jax.partition import split_over_data, state_shardings
from clip_jax.rules import leaf_paths


class TrainState(flax.struct.PyTreeNode):
    """All that a step reads and writes; also a tree of these leaves' shapes or shardings.

    Attributes:
      step: int32 scalar, updates done so far.
      params: float32, nested dicts.
      batch_stats: running statistics of a ResNet's BatchNorms; empty for a ViT.
      opt_state: optax's.
      ema: moving average of what `to_average` gives, and sharded like that; empty without one.
    """

    step: Any
    params: dict[str, Any]
    batch_stats: Any
    opt_state: Any
    ema: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> Variables:
        """What the model is applied to."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def inference_variables(self) -> Variables:
        """What evaluation applies the model to: the average where there is one."""
        return from_average(self.ema) if self.ema else self.variables


def to_average(variables: Variables) -> Any:
    """Returns what is averaged: all variables, which of a ViT are its parameters alone.

    A ResNet's running statistics are those of the activations that the parameters of the last steps gave; averaged
    parameters give others.
    """
    return variables if variables["batch_stats"] else variables["params"]


def from_average(average: Any) -> Variables:
    """Undoes `to_average`."""
    return average if "batch_stats" in average else {"params": average, "batch_stats": {}}


def random_key(seed: int) -> jax.Array:
    """Returns a run's random key: of the generator that knows nothing of batches, whatever JAX's default is."""
    return jax.random.key(seed, impl="threefry2x32")


def new_state(model: CLIP, optimizer: optax.GradientTransformation, seed: int, *, ema: bool = False) -> TrainState:
    """Returns a fresh state; pure, so that it can be traced and jitted into shardings."""
    variables = init_variables(model, random_key(seed))
    params = variables["params"]
    average = jax.tree.map(jnp.copy, to_average(variables)) if ema else {}
    return TrainState(step=jnp.zeros((), jnp.int32), opt_state=optimizer.init(params), ema=average, **variables)


def abstract_state(
    model: CLIP, optimizer: optax.GradientTransformation, *, mesh: Mesh, zero1: bool = False, ema: bool = False
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state without making it.

    Args:
      model: the towers.
      optimizer: as `make_optimizer` gives it.
      mesh: the devices.
      zero1: as in `MeshConfig`.
      ema: with a moving average.
    """
    shapes = jax.eval_shape(lambda: new_state(model, optimizer, 0, ema=ema))
    shardings = state_shardings(shapes, mesh)
    if zero1:
        shardings = shardings.replace(opt_state=split_over_data(shapes.opt_state, shardings.opt_state))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create_state(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    seed: int,
    zero1: bool = False,
    ema: bool = False,
) -> TrainState:
    """Returns a fresh state on the mesh, the same values for every mesh; see `abstract_state`."""
    target = abstract_state(model, optimizer, mesh=mesh, zero1=zero1, ema=ema)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    return jax.jit(lambda: new_state(model, optimizer, seed, ema=ema), out_shardings=shardings)()


def start_from(state: TrainState, arrays: Mapping[str, np.ndarray]) -> TrainState:
    """Returns a fresh state with some of its variables replaced, laid out as the state's own are.

    Args:
      state: as `create_state` gives it.
      arrays: float32, by path within `params` or `batch_stats`; the same in every process.
    """

    def replaced(tree: Any) -> Any:
        leaves = [
            jax.device_put(arrays[path], leaf.sharding) if path in arrays else leaf
            for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    placed = {name: replaced(tree) for name, tree in state.variables.items()}
    average = jax.tree.map(jnp.copy, to_average(placed)) if state.ema else {}
    return state.replace(**placed, ema=average)
