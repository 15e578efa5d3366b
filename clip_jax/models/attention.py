"""Attention, as it is defined, by cuDNN's kernels for NVIDIA's GPUs, or by ours for them.

Kernels keep no matrix of logits in memory (Dao et al., 2022, FlashAttention), which for the lengths of CLIP's towers is
what most of attention's time goes to. They serve training steps in bfloat16; all else is computed by the definition.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Float, Int
from clip_jax.errors import ConfigError
from clip_jax.models import gpu_kernels
from clip_jax.models.precision import wide_dtype
from clip_jax.models.text_groups import Groups
from clip_jax.models.variants import AttentionKind
from clip_jax.partition import on_each_device

CUDNN_HEADS = range(8, 129, 8)  # channels of a head that the kernels take, on every GPU that has them
PALLAS_HEADS = (16, 32, 64, 128)
PALLAS_TOKENS = 257  # on an H200 our kernels were faster at 50 to 257, cuDNN's at 577 (docs/results.md)


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
    if kind in ("auto", "cudnn") and gpu_kernels.in_a_step() and at is None and query.shape == key.shape:
        lacking = _lacking(query.dtype, query.shape[-1], "cudnn")
        if not lacking:
            return _by_cudnn(query, key, value, causal=causal)
        if kind == "cudnn":
            raise _refusal(kind, lacking)
    return _by_definition(query, key, value, causal=causal, at=at)


def attend_in_groups(
    query: Float[Array, "b q d"],
    key: Float[Array, "b l d"],
    value: Float[Array, "b l d"],
    heads: int,
    *,
    causal: bool,
    groups: Groups = (),
    rows: Int[Array, "b q"] | None = None,
    kind: AttentionKind = "xla",
) -> Float[Array, "b q d"]:
    """Returns what `attend` would within each sequence of every group, and zeros for tokens behind the last one.

    Args:
      query: of all tokens, or of `rows`.
      key: each of its heads' channels one after the other, as those of the others.
      value: of all tokens.
      heads: how many.
      causal: a query sees no later position than its own.
      groups: (sequences, length) that follow one another in a row; none means that it is one sequence.
      rows: the queries' tokens, one of each sequence; None means all.
      kind: see `attend`.
    """
    batch, tokens, width = key.shape
    mixed, sequence, token = [], 0, 0
    for count, length in groups or ((1, tokens),):
        shape = (batch * count, -1, heads, width // heads)
        inside = slice(token, token + count * length)
        wanted, at = inside, None
        if rows is not None:
            wanted = slice(sequence, sequence + count)
            starts = token + length * jnp.arange(count)
            at = (rows[:, wanted] - starts).reshape(batch * count, 1)
        parts = (x[:, some].reshape(shape) for x, some in ((query, wanted), (key, inside), (value, inside)))
        mixed.append(attend(*parts, causal=causal, at=at, kind=kind).reshape(batch, -1, width))
        sequence, token = sequence + count, inside.stop
    missing = 0 if rows is not None else tokens - token
    return jnp.concatenate([*mixed, jnp.zeros((batch, missing, width), mixed[0].dtype)], axis=1)


def attend_packed(
    packed: Float[Array, "b l qkv"], heads: int, *, causal: bool, groups: Groups = ()
) -> Float[Array, "b l d"]:
    """Returns what `attend` would of all queries of every sequence, by our kernels; call it where `takes_packed`.

    Args:
      packed: queries, keys and values as one product leaves them, each of them its heads' channels.
      heads: how many.
      causal: a query sees no later position than its own.
      groups: of the sequences that a row holds; none means that it is one.

    Raises:
      ConfigError: the kernels cannot be used.
    """
    lacking = _lacking(packed.dtype, packed.shape[-1] // 3 // heads, "pallas")
    if lacking:
        raise _refusal("pallas", lacking)
    from clip_jax.models import attention_kernel  # Pallas takes a while to import, and other devices do without

    return on_each_device(lambda rows: attention_kernel.attend_packed(rows, heads, causal, groups), packed)


def takes_packed(kind: AttentionKind, packed: Float[Array, "b l qkv"], heads: int, groups: Groups = ()) -> bool:
    """Whether such attention is computed from queries, keys and values in one array: by our kernels, in a step."""
    tokens = max((length for _, length in groups), default=packed.shape[1])
    lacking = _lacking(packed.dtype, packed.shape[-1] // 3 // heads, "pallas")
    return gpu_kernels.are_used(kind, best=not lacking and tokens <= PALLAS_TOKENS)


def _by_definition(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool, at: jax.Array | None
) -> jax.Array:
    """Not `jax.nn.dot_product_attention`, whose softmax is float32 even where its arguments are float64."""
    wide = wide_dtype(query.dtype)
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


def _refusal(kind: AttentionKind, lacking: str) -> ConfigError:
    return gpu_kernels.refusal("attention", kind, lacking)


def _lacking(dtype: DTypeLike, channels: int, kind: Literal["cudnn", "pallas"]) -> str:
    """Returns what kernels want and a training step with such heads does not have; empty if nothing."""
    if kind == "cudnn" and channels not in CUDNN_HEADS:
        return f"a head has {channels} channels, not a multiple of 8 up to {CUDNN_HEADS[-1]}"
    if kind == "pallas" and channels not in PALLAS_HEADS:
        return f"a head has {channels} channels, not {' or '.join(map(str, PALLAS_HEADS))}"
    return gpu_kernels.lacking(dtype)
