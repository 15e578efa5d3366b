"""Attention, as it is defined or by cuDNN's kernels for NVIDIA's GPUs.

Those keep no matrix of logits in memory (Dao et al., 2022, FlashAttention), which for the lengths of CLIP's towers is
what most of attention's time goes to. They serve training steps in bfloat16; all else is computed by the definition.
"""

import re

import jax
import jax.numpy as jnp

from clip_jax.array_types import Array, Float, Int
from clip_jax.errors import ConfigError
from clip_jax.models.variants import AttentionKind
from clip_jax.partition import traced_for

LARGEST_HEAD = 128  # of cuDNN's kernels, on every GPU that has them
FIRST_CAPABILITY = 8.0  # of the GPUs that have them: A100


def attend(
    query: Float[Array, "b q h c"],
    key: Float[Array, "b k h c"],
    value: Float[Array, "b k h c"],
    *,
    causal: bool,
    at: Int[Array, "b q"] | None = None,
    kind: AttentionKind = "xla",
) -> Float[Array, "b q h c"]:
    """Mixes values by softmax(query·key / √c), with logits and softmax in float32 or wider.

    Args:
      query: of the positions whose result is wanted.
      key: of all positions.
      value: of all positions.
      causal: a query sees no later position than its own.
      at: the queries' positions; None means all, in their order.
      kind: see `ModelConfig.attention`; where some queries only are wanted, or outside of a training step, always the
        definition.

    Raises:
      ConfigError: `cudnn`, and it cannot.
    """
    in_a_step = not jax.sharding.get_abstract_mesh().empty
    if kind != "xla" and in_a_step and at is None and query.shape == key.shape:
        lacking = _lacking(query)
        if not lacking:
            return _by_cudnn(query, key, value, causal=causal)
        if kind == "cudnn":
            raise ConfigError(f"config.model.attention is cudnn, and {lacking}; auto uses it where it can be used")
    return _by_definition(query, key, value, causal=causal, at=at)


def _by_definition(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool, at: jax.Array | None
) -> jax.Array:
    """Not `jax.nn.dot_product_attention`, whose softmax is float32 even where its arguments are float64."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=wide) * query.shape[-1] ** -0.5
    if causal:
        keys = jnp.arange(key.shape[1])
        seen = jnp.tri(len(keys), dtype=bool) if at is None else (keys <= at[:, :, None])[:, None]
        logits = jnp.where(seen, logits, -jnp.inf)
    return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits).astype(value.dtype), value)


def _by_cudnn(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool) -> jax.Array:
    """JAX lets cuDNN differentiate even lengths only, so an odd one gets a position more, which nothing sees."""
    batch, tokens = key.shape[:2]
    seen = None
    if tokens % 2:
        query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
        if not causal:
            seen = jnp.full(batch, tokens, jnp.int32)
    mixed = jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, key_value_seq_lengths=seen, implementation="cudnn"
    )
    return mixed[:, :tokens]


def _lacking(query: jax.Array) -> str:
    """Returns what cuDNN's kernels want and a training step with such queries does not have; empty if nothing."""
    head = query.shape[-1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"config.model.dtype is {query.dtype}, not bfloat16"
    if head % 8 or head > LARGEST_HEAD:
        return f"a head has {head} channels, not a multiple of 8 up to {LARGEST_HEAD}"
    if traced_for() != "gpu" or _capability() < FIRST_CAPABILITY:
        return "the devices are not NVIDIA GPUs since A100"
    return ""


def _capability() -> float:
    """Returns the CUDA compute capability of this process's GPUs; 0 for other makers'.

    Where it has none, a step is compiled for GPUs that are elsewhere, and is taken for one of the first that will do.
    """
    try:
        found = getattr(jax.local_devices(backend="gpu")[0], "compute_capability", "")
    except RuntimeError:
        return FIRST_CAPABILITY
    return float(found) if re.fullmatch(r"\d+\.\d+", str(found)) else 0.0
