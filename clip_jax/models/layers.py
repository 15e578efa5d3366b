"""Pre-LN transformer blocks, and the two initialisations that the paper's models can start from.

Unlike Linen's defaults, LayerNorm has epsilon 1e-5, takes its variance in two passes (E[x²]-E[x]² errs by 1e-3 on
channels whose mean is 100, and ViT residual streams have such channels), keeps its statistics in float32, and
returns the compute dtype.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Float
from clip_jax.models.variants import Activation, Remat
from clip_jax.partition import constrain_rows

Initializer = Callable[..., jax.Array]


def quick_gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns x·sigmoid(1.702x), CLIP's activation (openai/CLIP `clip/model.py`, QuickGELU)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns x·Φ(x), the exact GELU, as the models have that open_clip trained (Hendrycks & Gimpel, 2016)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def layer_norm(dtype: DTypeLike, *, name: str) -> nn.LayerNorm:
    """Returns a LayerNorm with float32 statistics whose result has `dtype`."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)


def symmetric_uniform(bound: float) -> Initializer:
    """Returns an initializer for U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@dataclass(frozen=True)
class BlockInit:
    """Initializers of a block's weights; `qkv_bias` and `out_bias` are 0 in both schemes."""

    qkv: Initializer
    out: Initializer
    mlp_in: Initializer
    mlp_out: Initializer
    mlp_in_bias: Initializer
    mlp_out_bias: Initializer

    @classmethod
    def torch_default(cls, width: int) -> "BlockInit":
        """What torch gives unasked, and the released ViTs therefore have: fan-in uniform, Xavier for q, k, v."""
        mlp_in, mlp_out = symmetric_uniform(width**-0.5), symmetric_uniform((4 * width) ** -0.5)
        return cls(
            qkv=symmetric_uniform(math.sqrt(6 / (4 * width))),
            out=symmetric_uniform(width**-0.5),
            mlp_in=mlp_in,
            mlp_out=mlp_out,
            mlp_in_bias=mlp_in,
            mlp_out_bias=mlp_out,
        )

    @classmethod
    def scaled(cls, width: int, layers: int) -> "BlockInit":
        """The text tower's scheme: branches into the residual stream are scaled by 1/sqrt(2·layers)."""
        into_stream = nn.initializers.normal(width**-0.5 * (2 * layers) ** -0.5)
        return cls(
            qkv=nn.initializers.normal(width**-0.5),
            out=into_stream,
            mlp_in=nn.initializers.normal((2 * width) ** -0.5),
            mlp_out=into_stream,
            mlp_in_bias=symmetric_uniform(width**-0.5),
            mlp_out_bias=symmetric_uniform((4 * width) ** -0.5),
        )


def attend(
    query: Float[Array, "b q h c"], key: Float[Array, "b k h c"], value: Float[Array, "b k h c"], *, causal: bool
) -> Float[Array, "b q h c"]:
    """Mixes values by softmax(query·key / √c), with logits and softmax in float32 or wider.

    Not `jax.nn.dot_product_attention`, whose softmax is float32 even where its arguments are float64.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=wide) * query.shape[-1] ** -0.5
    if causal:
        logits = jnp.where(jnp.tri(logits.shape[-1], dtype=bool), logits, -jnp.inf)
    return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits).astype(value.dtype), value)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for q, k and v."""

    heads: int
    causal: bool
    init_from: BlockInit
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        batch, length, width = x.shape
        qkv = nn.Dense(3 * width, kernel_init=self.init_from.qkv, dtype=self.dtype, name="qkv")(x)
        query, key, value = (
            part.reshape(batch, length, self.heads, width // self.heads) for part in jnp.split(qkv, 3, axis=-1)
        )
        mixed = attend(query, key, value, causal=self.causal)
        return nn.Dense(width, kernel_init=self.init_from.out, dtype=self.dtype, name="out")(
            mixed.reshape(batch, length, width)
        )


class MLP(nn.Module):
    """Two dense layers, four times as wide between them."""

    activation: Activation
    init_from: BlockInit
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        width, init = x.shape[-1], self.init_from
        hidden = nn.Dense(4 * width, kernel_init=init.mlp_in, bias_init=init.mlp_in_bias, dtype=self.dtype, name="in")(
            x
        )
        return nn.Dense(width, kernel_init=init.mlp_out, bias_init=init.mlp_out_bias, dtype=self.dtype, name="out")(
            ACTIVATIONS[self.activation](hidden)
        )


class Block(nn.Module):
    """A pre-LN transformer block."""

    heads: int
    causal: bool
    activation: Activation
    init_from: BlockInit
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        attention = Attention(self.heads, self.causal, self.init_from, self.dtype, name="attention")
        x = x + attention(layer_norm(self.dtype, name="ln_1")(x))
        x = x + MLP(self.activation, self.init_from, self.dtype, name="mlp")(layer_norm(self.dtype, name="ln_2")(x))
        x = constrain_rows(x)
        record(self, "output", x)
        return x


class Transformer(nn.Module):
    """A stack of blocks; the stream after block i is the intermediate `block_i/output`.

    Neither `remat` nor `scan` changes a name or a value; see `ModelConfig`.
    """

    layers: int
    heads: int
    causal: bool
    activation: Activation
    init_from: BlockInit
    dtype: DTypeLike
    remat: Remat
    scan: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        block = functools.partial(Block, self.heads, self.causal, self.activation, self.init_from, self.dtype)
        return apply_blocks(self, block, range(self.layers), x, remat=self.remat, scan=self.scan)


def apply_blocks(
    parent: nn.Module,
    block: functools.partial,
    numbers: range,
    x: jax.Array,
    *constants: Any,
    remat: Remat,
    scan: bool,
) -> jax.Array:
    """Applies the submodules `block_i` of a compact module, one after the other.

    Args:
      parent: the module, whose method calls this.
      block: what makes a block, but for its name; all blocks have the same shapes.
      numbers: of the blocks.
      x: what the first one takes, and each gives.
      constants: what all of them take besides.
      remat: as in `ModelConfig`.
      scan: loop over the blocks' stacked variables. Not where variables are made or intermediates asked for.
    """
    names = [f"block_{i}" for i in numbers]
    if not scan or not names or parent.is_initializing() or parent.is_mutable_collection("intermediates"):
        module = block.func if remat == "none" else nn.remat(block.func, policy=_POLICIES[remat])
        for name in names:
            x = module(*block.args, **block.keywords, name=name)(x, *constants)
        return x

    alone = block(parent=None)
    kinds = [kind for kind in ("params", "batch_stats") if names[0] in parent.variables.get(kind, {})]
    mutable = [kind for kind in kinds if parent.is_mutable_collection(kind)]
    each = [{kind: parent.variables[kind][name] for kind in kinds} for name in names]

    def apply(x: jax.Array, variables: dict[str, Any]) -> tuple[jax.Array, Any]:
        return alone.apply(variables, x, *constants, mutable=mutable)

    body = apply if remat == "none" else jax.checkpoint(apply, policy=_POLICIES[remat], prevent_cse=False)
    x, updated = jax.lax.scan(body, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    for kind in mutable:
        for i, name in enumerate(names):
            parent.put_variable(kind, name, jax.tree.map(lambda leaf, i=i: leaf[i], updated[kind]))
    return x


def _save_products(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Whether a value is kept: results of convolutions, and of matrix products but attention's."""
    if primitive.name == "conv_general_dilated":
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


_POLICIES = {"dots": _save_products, "block": None, "full": None}


def record(module: nn.Module, name: str, value: jax.Array) -> None:
    """Keeps `value` as a named intermediate: costs nothing unless `mutable=["intermediates"]` asks for it."""
    module.sow("intermediates", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
