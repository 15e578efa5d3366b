"""The state that a run begins with: random weights, or trained ones that the config names."""

from typing import TYPE_CHECKING

from clip_jax.config import RunConfig
from clip_jax.training.program import Program
from clip_jax.training.state import TrainState, start_from

if TYPE_CHECKING:
    from clip_jax.interop.initial import Initial


def initial_of(config: RunConfig, program: Program) -> "Initial | None":
    """Returns the weights that the config names to start from, refused where they do not fit."""
    if not config.init_from:
        return None
    from clip_jax.interop.initial import read_initial  # a run from random weights does without the readers

    return read_initial(config, program.target.variables)


def fresh_state(program: Program, initial: "Initial | None") -> TrainState:
    """Returns the state that a run begins with."""
    state = program.fresh()
    return state if initial is None else start_from(state, initial.arrays)
