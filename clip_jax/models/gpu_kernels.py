"""When a training step is computed by kernels for NVIDIA's GPUs instead of what XLA makes for them."""

import re

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.errors import ConfigError
from clip_jax.partition import traced_for

FIRST_CAPABILITY = 8.0  # of the GPUs that have them: A100


def in_a_step() -> bool:
    """Whether a step is traced for a mesh; only there kernels are used."""
    return not jax.sharding.get_abstract_mesh().empty


def lacking(dtype: DTypeLike) -> str:
    """Returns what all kernels want and a step in that dtype does not have; empty if nothing."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"config.model.dtype is {dtype}, not bfloat16"
    if traced_for() != "gpu" or capability() < FIRST_CAPABILITY:
        return "the devices are not NVIDIA GPUs since A100"
    return ""


def refusal(key: str, kind: str, reason: str, instead: str) -> ConfigError:
    """Returns the error of a key of the model's config that asks for kernels which cannot be used."""
    return ConfigError(f"config.model.{key} is {kind}, and {reason}; {instead}")


def capability() -> float:
    """Returns the CUDA compute capability of this process's GPUs; 0 for other makers'.

    Where it has none, a step is compiled for GPUs that are elsewhere, and is taken for one of the first that will do.
    """
    try:
        found = getattr(jax.local_devices(backend="gpu")[0], "compute_capability", "")
    except RuntimeError:
        return FIRST_CAPABILITY
    return float(found) if re.fullmatch(r"\d+\.\d+", str(found)) else 0.0
