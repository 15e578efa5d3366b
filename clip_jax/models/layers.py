"""Pre-LN transformer blocks, and the two initialisations that the paper's models can start from.

A row of a transformer's input may hold several sequences, one after the other, in groups of equal length (`Groups`):
dense layers and norms see tokens, only attention sees where a sequence begins. And the last block can be asked for some
rows of its result: keys and values are of all tokens, but the rest of the block is applied to those rows alone.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clip_jax.array_types import Array, Float, Int, Num
from clip_jax.models.activations import ACTIVATIONS, activate, activates_by_kernels
from clip_jax.models.attention import attend_in_groups, attend_packed, takes_packed
from clip_jax.models.dense import add_parameter, dense_of
from clip_jax.models.fences import fence
from clip_jax.models.norm import LayerNorm
from clip_jax.models.text_groups import Groups
from clip_jax.models.variants import ModelConfig, Remat, TextConfig, ViTConfig, mlp_width
from clip_jax.partition import constrain_rows

Initializer = Callable[..., jax.Array]


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
    def torch_default(cls, sizes: ViTConfig | TextConfig) -> "BlockInit":
        """What torch gives unasked, and the released ViTs therefore have: fan-in uniform, Xavier for q, k, v."""
        width = sizes.width
        mlp_in, mlp_out = symmetric_uniform(width**-0.5), symmetric_uniform(mlp_width(sizes) ** -0.5)
        return cls(
            qkv=symmetric_uniform(math.sqrt(6 / (4 * width))),
            out=symmetric_uniform(width**-0.5),
            mlp_in=mlp_in,
            mlp_out=mlp_out,
            mlp_in_bias=mlp_in,
            mlp_out_bias=mlp_out,
        )

    @classmethod
    def scaled(cls, sizes: ViTConfig | TextConfig) -> "BlockInit":
        """The text tower's scheme: branches into the residual stream are scaled by 1/sqrt(2·layers).

        It goes by the width of the stream alone, whatever the MLP's, as open_clip's does.
        """
        width = sizes.width
        into_stream = nn.initializers.normal(width**-0.5 * (2 * sizes.layers) ** -0.5)
        return cls(
            qkv=nn.initializers.normal(width**-0.5),
            out=into_stream,
            mlp_in=nn.initializers.normal((2 * width) ** -0.5),
            mlp_out=into_stream,
            mlp_in_bias=symmetric_uniform(width**-0.5),
            mlp_out_bias=symmetric_uniform(mlp_width(sizes) ** -0.5),
        )


def pick(x: Num[Array, "b l d"], rows: Int[Array, "b r"]) -> Num[Array, "b r d"]:
    """Returns some rows of each element of a batch."""
    return jnp.take_along_axis(x, rows[:, :, None], axis=1, mode="clip")


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for q, k and v.

    Where it has a `query_bias`, that is all that is left of this one's bias: see `take_up`.
    """

    heads: int
    causal: bool
    init_from: BlockInit
    model: ModelConfig
    groups: Groups = ()

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], rows: Int[Array, "b r"] | None = None) -> Float[Array, "b r d"]:
        """Returns all rows, or those that `rows` names, one of each sequence."""
        width, kind = x.shape[-1], self.model.attention
        dense = dense_of(self.model)
        left = self.has_variable("params", "query_bias")
        qkv = dense(3 * width, use_bias=not left, kernel_init=self.init_from.qkv, name="qkv")(x)
        if left:
            qkv = add_parameter(qkv, self.get_variable("params", "query_bias"))
        if rows is None and takes_packed(kind, qkv, self.heads, self.groups):
            mixed = attend_packed(qkv, self.heads, causal=self.causal, groups=self.groups)
        else:
            query, key, value = jnp.split(qkv, 3, axis=-1)
            query = query if rows is None else pick(query, rows)
            mixed = attend_in_groups(
                query, key, value, self.heads, causal=self.causal, groups=self.groups, rows=rows, kind=kind
            )
        return dense(width, kernel_init=self.init_from.out, name="out")(mixed)


class MLP(nn.Module):
    """Two dense layers, `hidden` channels wide between them."""

    hidden: int
    init_from: BlockInit
    model: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        width, init, model = x.shape[-1], self.init_from, self.model
        dense = dense_of(model)
        first = dense(self.hidden, kernel_init=init.mlp_in, bias_init=init.mlp_in_bias, name="in")
        if activates_by_kernels(model.mlp, model.dtype, self.hidden, model.activation):
            product, bias = first.summands(x)
            hidden = activate(product, bias, model.activation)
        else:
            hidden = ACTIVATIONS[model.activation](first(x))
        return dense(width, kernel_init=init.mlp_out, bias_init=init.mlp_out_bias, name="out")(hidden)


class Block(nn.Module):
    """A pre-LN transformer block; `rows` as in `Attention`."""

    sizes: ViTConfig | TextConfig
    causal: bool
    init_from: BlockInit
    model: ModelConfig
    groups: Groups = ()

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], rows: Int[Array, "b r"] | None = None) -> Float[Array, "b r d"]:
        dtype = self.model.dtype
        attention = Attention(self.sizes.heads, self.causal, self.init_from, self.model, self.groups, name="attention")
        mixed = attention(LayerNorm(dtype, name="ln_1")(x), rows)
        # Without walls XLA's compiler for GPUs lets a product add to a copy of the stream, where a norm could add.
        x = (x if rows is None else pick(x, rows)) + fence(mixed, "cuda")
        mlp = MLP(mlp_width(self.sizes), self.init_from, self.model, name="mlp")
        x = x + fence(mlp(LayerNorm(dtype, name="ln_2")(x)), "cuda")
        x = constrain_rows(x)
        record(self, "output", x)
        return x


READERS = {"ln_1": ("attention", "qkv"), "ln_2": ("mlp", "in")}
"""Of a block's norms, the dense layer that reads it, and the module that this belongs to."""


def take_up(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters of the same function, in which a block's dense layers have taken up what is before them.

    For rows u of mean 0 and variance 1, (u·scale + bias)·W + b is u·(scale·W) + (bias·W + b). As every query's shares
    add up to 1, a bias of the values adds itself to what attention gives, and the next layer takes it up likewise; one
    of the keys adds the same to all logits of a query, which is nothing.

    Differentiated through this, what is taken up gets its gradient from those of the weights, and nothing is summed
    over all tokens for it. In a program for GPUs norms then move a quarter less. In one for CPUs the new weights would
    be copies, and on a TPU nothing is gained (`benchmarks/LOG.md`).

    Args:
      params: of a model, of a tower or of a block; float32 or wider.

    Returns:
      The same tree, where None stands for a norm's parameters, and `query_bias` for the bias of queries, keys and
      values; what is no block's stays.
    """
    if not READERS.keys() <= params.keys():
        return {name: take_up(part) if isinstance(part, Mapping) else part for name, part in params.items()}
    block = dict(params)
    for norm, (module, layer) in READERS.items():
        dense = _take_up_bias(block[module][layer], block[norm]["bias"])
        dense["kernel"] *= block[norm]["scale"][:, None]
        block[module], block[norm] = {**block[module], layer: dense}, dict.fromkeys(block[norm])
    qkv, out = block["attention"]["qkv"], block["attention"]["out"]
    query, _, value = jnp.split(qkv["bias"], 3)
    block["attention"] = {"qkv": {"kernel": qkv["kernel"]}, "query_bias": query, "out": _take_up_bias(out, value)}
    return block


def _take_up_bias(dense: Mapping[str, jax.Array], bias: jax.Array) -> dict[str, jax.Array]:
    """Returns a layer that adds to its argument what was added before."""
    # Not as a product, which GPUs may compute of narrower numbers.
    return {**dense, "bias": dense["bias"] + (dense["kernel"] * bias[:, None]).sum(axis=0)}


class Transformer(nn.Module):
    """A stack of blocks, of whose result one row of each sequence is wanted.

    The last block is applied to nothing else, unless `dead_tokens` asks for it. The stream after block i is the
    intermediate `block_i/output`, with all its rows. Neither `remat` nor `scan_layers` changes a name or a value.

    Attributes:
      sizes: layers, heads and the MLPs' width.
      causal: a token sees no later one.
      init_from: initializers of every block.
      model: how all of that is computed.
      groups: of the sequences that a row holds; none means that it is one.
    """

    sizes: ViTConfig | TextConfig
    causal: bool
    init_from: BlockInit
    model: ModelConfig
    groups: Groups = ()

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], rows: Int[Array, "b r"]) -> Float[Array, "b r d"]:
        model = self.model
        block = functools.partial(Block, self.sizes, self.causal, self.init_from, model, self.groups)
        last = self.sizes.layers - 1
        x = apply_blocks(self, block, range(last), x, model)
        module = _rematerialised(block, model.remat)(name=f"block_{last}")
        if model.dead_tokens == "compute" or self.is_mutable_collection("intermediates"):
            return pick(module(x), rows)
        return module(x, rows)


def apply_blocks(
    parent: nn.Module, block: functools.partial, numbers: range, x: jax.Array, model: ModelConfig, *constants: Any
) -> jax.Array:
    """Applies the submodules `block_i` of a compact module, one after the other.

    Args:
      parent: the module, whose method calls this.
      block: what makes a block, but for its name; all blocks have the same shapes.
      numbers: of the blocks.
      x: what the first one takes, and each gives.
      model: whether to rematerialise, and to loop over the blocks' stacked variables, which is not done where variables
        are made or intermediates asked for.
      constants: what all of them take besides.
    """
    names, remat = [f"block_{i}" for i in numbers], model.remat
    looped = model.scan_layers and len(names) > 1
    if not looped or parent.is_initializing() or parent.is_mutable_collection("intermediates"):
        for name in names:
            x = _rematerialised(block, remat)(name=name)(x, *constants)
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


def _rematerialised(block: functools.partial, remat: Remat) -> functools.partial:
    module = block.func if remat == "none" else nn.remat(block.func, policy=_POLICIES[remat])
    return functools.partial(module, *block.args, **block.keywords)


def _save_products(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Whether a value is kept: results of convolutions, of matrix products but attention's, and of its kernels."""
    if primitive.name in ("conv_general_dilated", "dot_product_attention_fwd_wrapper"):
        return True
    if primitive.name == "pallas_call":
        return parameters["name"].startswith("attention")
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


_POLICIES = {"dots": _save_products, "block": None, "full": None}


def record(module: nn.Module, name: str, value: jax.Array) -> None:
    """Keeps `value` as a named intermediate: costs nothing unless `mutable=["intermediates"]` asks for it."""
    module.sow("intermediates", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
