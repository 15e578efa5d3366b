"""When a training step is computed by kernels for NVIDIA's GPUs instead of what XLA makes for them."""

import os
import re

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.chips import chip_of
from clip_jax.errors import ConfigError
from clip_jax.partition import traced_for, traced_kind

FIRST_CAPABILITY = 8.0  # of the GPUs that have them: A100
HOPPER = 9  # the whole part of the capability of H100 and H200
TRITON_PRODUCTS = "xla_gpu_enable_triton_gemm"


def product_options(platform: str) -> dict[str, bool]:
    """Returns with which of XLA's options a program for devices multiplies matrices: on GPUs by cuBLAS's kernels alone.

    The compiler would try Triton's beside them, for minutes, and take cuBLAS's nearly always (`benchmarks/LOG.md`).
    What XLA_FLAGS says of it holds.
    """
    is_said = TRITON_PRODUCTS in os.environ.get("XLA_FLAGS", "")
    return {TRITON_PRODUCTS: False} if platform == "gpu" and not is_said else {}


def in_a_step() -> bool:
    """Whether a step is traced for a mesh; only there kernels are used."""
    return not jax.sharding.get_abstract_mesh().empty


def lacking(dtype: DTypeLike) -> str:
    """Returns what all kernels want and a step in that dtype does not have; empty if nothing."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"config.model.dtype is {dtype}, not bfloat16"
    if traced_for() != "gpu" or capability() < FIRST_CAPABILITY:
        return "the devices are not NVIDIA GPUs since A100"
    return ""


def are_used(kind: str, *, best: bool) -> bool:
    """Whether our own kernels compute what a key of the model's config is about: in a step, where they are asked for.

    Args:
      kind: the key's value. `auto` asks for them on GPUs of the only kind that has timed them.
      best: whether they can be used, and were the fastest there.
    """
    asked_for = kind == "pallas" or (kind == "auto" and best and int(capability()) == HOPPER)
    return asked_for and in_a_step()


def refusal(key: str, kind: str, reason: str) -> ConfigError:
    """Returns the error of a key of the model's config that asks for kernels which cannot be used."""
    return ConfigError(f"config.model.{key} is {kind}, and {reason}; auto uses what can be used")


def capability() -> float:
    """Returns the CUDA compute capability of the GPUs that a step is traced for; 0 for other makers'.

    Where they are of no kind that `clip_jax.chips` knows, that of this process's GPUs; where it has none, they are
    elsewhere, and are taken for some of the first that will do.
    """
    if chip := chip_of(traced_kind()):
        return chip.capability
    try:
        found = getattr(jax.local_devices(backend="gpu")[0], "compute_capability", "")
    except RuntimeError:
        return FIRST_CAPABILITY
    return float(found) if re.fullmatch(r"\d+\.\d+", str(found)) else 0.0
