"""The train state, born sharded: shapes first, then shardings, then one jitted initialisation into them."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clip_jax.models.clip import CLIP, Variables, init_variables
from clip_jax.partition import split_over_data, state_shardings


class TrainState(flax.struct.PyTreeNode):
    """All that a step reads and writes; also a tree of these leaves' shapes or shardings.

    Attributes:
      step: int32 scalar, updates done so far.
      params: float32, nested dicts.
      batch_stats: running statistics of a ResNet's BatchNorms; empty for a ViT.
      opt_state: optax's.
    """

    step: Any
    params: dict[str, Any]
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> Variables:
        """What the model is applied to."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def new_state(model: CLIP, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns a fresh state; pure, so that it can be traced and jitted into shardings."""
    variables = init_variables(model, jax.random.key(seed))
    return TrainState(step=jnp.zeros((), jnp.int32), opt_state=optimizer.init(variables["params"]), **variables)


def abstract_state(
    model: CLIP, optimizer: optax.GradientTransformation, *, mesh: Mesh, zero1: bool = False
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state without making it; `zero1` as in `MeshConfig`."""
    shapes = jax.eval_shape(lambda: new_state(model, optimizer, 0))
    shardings = state_shardings(shapes, mesh)
    if zero1:
        shardings = shardings.replace(opt_state=split_over_data(shapes.opt_state, shardings.opt_state))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create_state(
    model: CLIP, optimizer: optax.GradientTransformation, *, mesh: Mesh, seed: int, zero1: bool = False
) -> TrainState:
    """Returns a fresh state on the mesh; the same values for every mesh."""
    target = abstract_state(model, optimizer, mesh=mesh, zero1=zero1)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    return jax.jit(lambda: new_state(model, optimizer, seed), out_shardings=shardings)()


def start_from(state: TrainState, variables: Variables) -> TrainState:
    """Returns a fresh state with other variables, laid out as the state's own are.

    Args:
      state: as `create_state` gives it.
      variables: `params` and `batch_stats` of the same model, float32 NumPy arrays; the same in every process.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.variables)
    return state.replace(**jax.device_put(variables, shardings))


def count_parameters(params: Any) -> int:
    """Returns the number of parameters; arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
