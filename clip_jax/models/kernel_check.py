"""Our kernels for GPUs on one that is there, beside what they stand for: whether they can be relied on."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clip_jax.array_types import Array, Float
from clip_jax.config import MeshConfig
from clip_jax.models import activations, gpu_kernels
from clip_jax.models.attention import attend_in_groups, attend_packed
from clip_jax.models.text_groups import Groups
from clip_jax.models.variants import AttentionKind
from clip_jax.partition import make_mesh

HEADS, CHANNELS = 4, 64
ROWS = 8  # of which each is checked
GROUPS = ((40, 16), (20, 24), (20, 32), (12, 48), (8, 77))
MLP = (1_000, 1_024)
OPTIONS = {"xla_gpu_autotune_level": 0, gpu_kernels.TRITON_PRODUCTS: False}
"""The compiler's: without them it tries algorithms for the definitions' products for more than a minute."""


class Check(NamedTuple):
    """What a kernel's results and gradients differ from its definition's in float32.

    Attributes:
      key: of the model's config, which can do without it.
      what: was computed.
      error: the norm of the difference over the norm.
      usual: the same of the definition in bfloat16.
    """

    key: str
    what: str
    error: float
    usual: float

    @property
    def has_passed(self) -> bool:
        """Whether they differ no more than their dtype lets them; a wrong mask gives 0.1 and more."""
        return self.error <= 2 * self.usual


def check_kernels() -> list[Check]:
    """Returns the checks of all kernels in bfloat16 on this process's first device; none where it cannot use them."""
    with jax.sharding.use_abstract_mesh(make_mesh(MeshConfig(), devices=jax.local_devices()[:1]).abstract_mesh):
        if gpu_kernels.lacking(jnp.bfloat16):
            return []
        together = sum(count * length for count, length in GROUPS)
        return [
            _check_attention("attention, 50 tokens", (ROWS, 50)),
            _check_attention("attention, 257 tokens", (ROWS, 257)),
            _check_attention("causal attention, 77 tokens", (ROWS, 77), causal=True),
            _check_attention("causal attention in groups", (1, together), causal=True, groups=GROUPS),
            _check_activation(),
        ]


def attend_by(
    kind: AttentionKind, packed: Float[Array, "b l qkv"], heads: int, *, causal: bool, groups: Groups = ()
) -> Float[Array, "b l d"]:
    """Mixes what one product leaves, each sequence of every group within itself, by kernels of a kind; in a step.

    Args:
      kind: see `ModelConfig.attention`.
      packed: queries, keys and values, each of them its heads' channels.
      heads: how many.
      causal: a query sees no later position than its own.
      groups: (sequences, length) that make up a row; none means that it is one.
    """
    if kind == "pallas":
        return attend_packed(packed, heads, causal=causal, groups=groups)
    query, key, value = jnp.split(packed, 3, axis=-1)
    return attend_in_groups(query, key, value, heads, causal=causal, groups=groups, kind=kind)


def both_ways(
    function: Callable[..., jax.Array], arguments: Sequence[jax.Array], gradient: jax.Array
) -> list[jax.Array]:
    """Returns a function's result, and what its backward pass makes of that one's gradient."""
    result, pull = jax.vjp(function, *arguments)
    return [result, *pull(gradient)]


def relative_error(found: Sequence[jax.Array], exact: Sequence[jax.Array]) -> float:
    """Returns the norm of the difference over that of what is exact, of the array where it is the largest."""
    pairs = zip(found, exact, strict=True)
    return float(jnp.max(jnp.array([jnp.linalg.norm(a.astype(b.dtype) - b) / jnp.linalg.norm(b) for a, b in pairs])))


def _check_attention(what: str, shape: tuple[int, int], *, causal: bool = False, groups: Groups = ()) -> Check:
    width = HEADS * CHANNELS
    packed, gradient = (_random((*shape, parts * width)) for parts in (3, 1))
    ours, definition = (
        functools.partial(attend_by, kind, heads=HEADS, causal=causal, groups=groups) for kind in ("pallas", "xla")
    )
    return Check("attention", what, *_errors(ours, definition, [packed], gradient))


def _check_activation() -> Check:
    def definition(product: jax.Array, bias: jax.Array) -> jax.Array:
        return activations.quick_gelu(product + bias.astype(product.dtype))

    def ours(product: jax.Array, bias: jax.Array) -> jax.Array:
        return activations.activate(product, bias, "quick_gelu")

    product, gradient = _random((1, *MLP)), _random((1, *MLP))[:, ::-1]
    return Check(
        "mlp", "QuickGELU", *_errors(ours, definition, [product, _random(MLP[1:]).astype(jnp.float32)], gradient)
    )


def _random(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape) + shape[-1]), shape, jnp.bfloat16)


def _errors(
    ours: Callable[..., jax.Array],
    definition: Callable[..., jax.Array],
    arguments: Sequence[jax.Array],
    gradient: jax.Array,
) -> tuple[float, float]:
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in (*arguments, gradient)]
        exact = _jitted(definition)(wide[:-1], wide[-1])
    found = [_jitted(each)(arguments, gradient) for each in (ours, definition)]
    return relative_error(found[0], exact), relative_error(found[1], exact)


def _jitted(function: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    return jax.jit(functools.partial(both_ways, function), compiler_options=OPTIONS)
