"""From a run's config to the program that trains it, before there is any data or any array."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from clip_jax.config import RunConfig
from clip_jax.errors import ConfigError
from clip_jax.models.clip import CLIP
from clip_jax.partition import check_batch, make_mesh
from clip_jax.training.gradient_cache import check_micro_batch
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import TrainState, abstract_state, create_state
from clip_jax.training.step import TrainStep, make_train_step


class Program(NamedTuple):
    """What follows from a config and devices.

    Attributes:
      model: the towers.
      mesh: the devices.
      target: shapes and shardings of the state.
      train_step: jitted, not yet compiled.
      fresh: makes a state from the config's seed.
    """

    model: CLIP
    mesh: Mesh
    target: TrainState
    train_step: TrainStep
    fresh: Callable[[], TrainState]


def make_program(config: RunConfig, *, devices: Sequence[Any] | None = None) -> Program:
    """Returns a run's program for all devices, or those given.

    Raises:
      ConfigError: mesh or batch do not fit the devices, `mesh.overlap` asks of them what they cannot, or JAX would
        compute a float64 model in float32.
    """
    if config.model.dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise ConfigError(
            "config.model.dtype is 'float64', which JAX computes in float32 unless it is told to in the environment; "
            "use float32 or bfloat16, or set JAX_ENABLE_X64=1"
        )
    mesh = make_mesh(config.mesh, devices=devices)
    check_batch("batch", config.batch, mesh)
    check_micro_batch(config, mesh)
    model, optimizer = CLIP(config.model), make_optimizer(config.optim, steps=config.steps)
    layout = {"mesh": mesh, "zero1": config.mesh.zero1, "ema": config.optim.ema_decay > 0}
    target = abstract_state(model, optimizer, **layout)
    return Program(
        model,
        mesh,
        target,
        make_train_step(model, optimizer, config, mesh=mesh, state=target),
        lambda: create_state(model, optimizer, seed=config.seed, **layout),
    )
