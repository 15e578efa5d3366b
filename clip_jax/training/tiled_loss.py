"""The contrastive losses without the matrix of logits: tiles of it are made, used and forgotten, forward and backward.

Both losses are sums over the rows and the columns of the same logits s_ik = scale · imageᵢ · textₖ + bias. With the
shares w = weight / Σ weight and the kept pairs K = {i: wᵢ > 0}, in either case

    loss = ½ Σᵢ wᵢ (Rᵢ + Cᵢ) - Σᵢ wᵢ s_ii

softmax (paper, figure 3):             Rᵢ = logΣ_{k∈K} exp s_ik,      ∂Rᵢ/∂s_ik = exp(s_ik - Rᵢ)
sigmoid (Zhai et al., 2023, eq. 1):    Rᵢ = Σ_{k∈K} log(1 + exp s_ik), ∂Rᵢ/∂s_ik = σ(s_ik)

and C the same over columns. The rows of a device's images are taken `tile` at a time against a block of texts, once
forward for R and C and once backward for the gradients, so each logit is computed twice, 8·n·B·D operations for n of
B pairs on a device. The forms differ in what a block is:

- chunked: one block, the texts of all devices, gathered. A device holds O(B·D + tile·B).
- ring: as many blocks as devices, passed from neighbour to neighbour together with what belongs to their columns
  (forward the statistics, backward the gradient). A device holds O(n·D + tile·n): for batches of a million pairs.

A custom derivative is what makes this small: autodiff of such loops would keep every tile.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from clip_jax.array_types import Array, Float
from clip_jax.models.precision import wide_dtype
from clip_jax.partition import AXES, ROWS
from clip_jax.training.losses import LossOutput, shares_of

Kind = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class _Spec:
    """What is fixed when the loss is traced."""

    kind: Kind
    form: Literal["chunked", "ring"]
    tile: int
    products: Literal["full", "bfloat16"]
    mesh: Mesh | None

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def axes(self) -> tuple[str, ...]:
        return AXES


class _Pairs(NamedTuple):
    """Rows of images, or the columns of a block of texts: features [n, d], shares [n], numbers in the batch [n]."""

    features: jax.Array
    share: jax.Array
    index: jax.Array


class _Statistics(NamedTuple):
    """What is known of rows, or of columns, after some of their logits; each [n].

    Attributes:
      top: the largest logit.
      total: softmax, Σ exp(s - top); sigmoid, Σ log(1 + exp s).
      own: the logit with the right partner.
      rival: the largest logit with another one.
    """

    top: jax.Array
    total: jax.Array
    own: jax.Array
    rival: jax.Array


def tiled_loss(
    kind: Kind,
    image: Float[Array, "b e"],
    text: Float[Array, "b e"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    weight: Float[Array, " b"],
    *,
    form: Literal["chunked", "ring"] = "chunked",
    tile: int = 256,
    products: Literal["full", "bfloat16"] = "full",
    mesh: Mesh | None = None,
) -> LossOutput:
    """Returns what `softmax_loss` or `sigmoid_loss` does, value and gradients, in little memory.

    Args:
      kind: which of the two; `softmax` is the same for every bias, whose gradient is then 0.
      image: unit features of the images; float32 or wider; rows on all axes of the mesh.
      text: unit features of the texts, in the same order and of the same dtype.
      scale: exp(logit_scale).
      bias: logit_bias.
      weight: per pair, not negative; weights have no gradient.
      form: see the module's docstring.
      tile: rows of images at a time.
      products: dtype of the matrix products' operands: the features' own (`full`), or bfloat16. Sums and statistics
        are always in the features' dtype.
      mesh: the devices; None means that one device has all rows.
    """
    spec = _Spec(kind, form, tile, products, mesh)
    return _loss(spec, image, text, scale, bias, jax.lax.stop_gradient(shares_of(weight).astype(image.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(spec: _Spec, *arguments: jax.Array) -> LossOutput:
    return _loss_forward(spec, *arguments)[0]


def _loss_forward(spec: _Spec, *arguments: jax.Array) -> tuple[LossOutput, tuple[jax.Array, ...]]:
    row, scalar = ROWS, PartitionSpec()
    forward = _on_every_device(spec, _forward, ins=(row, row, scalar, scalar, row), outs=(scalar, row, row, row))
    output, *sums = forward(*arguments)
    return output, (*arguments, *sums)


def _loss_backward(spec: _Spec, residuals: tuple[jax.Array, ...], cotangent: LossOutput) -> tuple[jax.Array, ...]:
    row, scalar = ROWS, PartitionSpec()
    ins = (row, row, scalar, scalar, row, row, row, row)
    backward = _on_every_device(spec, _backward, ins=ins, outs=(row, row, scalar, scalar))
    gradients = backward(*residuals)
    return (*(cotangent.loss * gradient for gradient in gradients), jnp.zeros_like(residuals[4]))


_loss.defvjp(_loss_forward, _loss_backward)


def _on_every_device(spec: _Spec, function: Callable, *, ins: Any, outs: Any) -> Callable:
    function = functools.partial(function, spec)
    if spec.devices == 1:
        return function
    # The derivative is our own, so nothing is gained from tracking which values differ between devices.
    return jax.shard_map(function, mesh=spec.mesh, in_specs=ins, out_specs=outs, check_vma=False)


def _forward(
    spec: _Spec, image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, share: jax.Array
) -> tuple[LossOutput, jax.Array, jax.Array, jax.Array]:
    """Returns the loss, and of this device's pairs R, C and their own logits."""
    rows, columns = _local_pairs(spec, image, text, share)
    tiles = _in_tiles(spec, rows)

    def visit(block: _Pairs, by_row: _Statistics, by_column: _Statistics) -> tuple[_Statistics, _Statistics]:
        """Adds a block's logits to the statistics of its columns and of all rows."""

        def add_tile(by_column, tile_and_statistics):
            tile, of_tile = tile_and_statistics
            logits = scale * _product("id,kd->ik", tile.features, block.features) + bias
            own = tile.index[:, None] == block.index
            of_tile = _merge(spec, of_tile, _reduce(spec, logits, own, block.share > 0, axis=1))
            by_column = _merge(spec, by_column, _reduce(spec, logits, own, tile.share > 0, axis=0))
            return by_column, of_tile

        by_column, by_row = jax.lax.scan(add_tile, by_column, (tiles, by_row))
        return by_row, by_column

    by_row = _nothing_seen(tiles.share)
    if spec.form == "chunked":
        every = _gather(spec, columns)
        by_row, by_column = visit(every, by_row, _nothing_seen(every.share))
        by_column = _combine(spec, by_column)
    else:

        def step(carry, _):
            block, by_row, by_column = carry
            following = _shift(spec, block)
            by_row, by_column = visit(block, by_row, by_column)
            return (following, by_row, _shift(spec, by_column)), None

        start = columns, by_row, _nothing_seen(share)
        (_, by_row, by_column), _ = jax.lax.scan(step, start, length=spec.devices)

    by_row = jax.tree.map(lambda leaf: leaf.reshape(-1)[: len(share)], by_row)
    by_image, by_text = _finish(spec, by_row), _finish(spec, by_column)
    losses = 0.5 * (by_image + by_text) - by_row.own
    hits = [(side.own > side.rival).astype(share.dtype) for side in (by_row, by_column)]
    means = [jnp.vdot(jnp.where(share > 0, each, 0), share) for each in (losses, *hits)]
    return LossOutput(*_sum(spec, means)), by_image, by_text, by_row.own


def _backward(
    spec: _Spec,
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    share: jax.Array,
    by_image: jax.Array,
    by_text: jax.Array,
    own: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of this device's images and texts, and of scale and bias.

    A pair's own logit has by far the largest gradient. It is added last: at the head of a sum it would cost all that
    follow their last digits.
    """
    rows, columns = _local_pairs(spec, image, text, share)
    tiles, row_sums = _in_tiles(spec, rows), _in_tiles(spec, by_image)

    def visit(
        block: _Pairs, column_sums: jax.Array, of_rows: jax.Array, of_block: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Adds a block's part to G·text of all rows [tiles, tile, d] and to Gᵀ·image of its texts [m, d]; also ΣG.

        G is ∂loss/∂s of other pairings than the own.
        """

        def add_tile(carry, xs):
            of_block, total = carry
            tile, row_sums, of_tile = xs
            logits = scale * _product("id,kd->ik", tile.features, block.features) + bias
            others = (tile.share[:, None] > 0) & (block.share > 0) & (tile.index[:, None] != block.index)
            shares = tile.share[:, None], block.share
            gradient = jnp.where(others, _gradient(spec, logits, shares, (row_sums[:, None], column_sums)), 0)
            narrow = gradient.astype(tile.features.dtype)
            of_tile += _product("ik,kd->id", narrow, block.features)
            of_block += _product("ik,id->kd", narrow, tile.features)
            return (of_block, total + gradient.sum()), of_tile

        start = of_block, jnp.zeros_like(scale)
        (of_block, total), of_rows = jax.lax.scan(add_tile, start, (tiles, row_sums, of_rows))
        return of_rows, of_block, total

    of_rows = jnp.zeros(tiles.features.shape, share.dtype)
    if spec.form == "chunked":
        every, column_sums = _gather(spec, (columns, by_text))
        of_texts = jnp.zeros(every.features.shape, share.dtype)
        of_rows, of_texts, total = visit(every, column_sums, of_rows, of_texts)
        of_texts = _sum_to_owner(spec, of_texts)
    else:

        def step(carry, _):
            (block, column_sums), of_rows, of_block, total = carry
            following = _shift(spec, (block, column_sums))
            of_rows, of_block, of_visit = visit(block, column_sums, of_rows, of_block)
            return (following, of_rows, _shift(spec, of_block), total + of_visit), None

        start = (columns, by_text), of_rows, jnp.zeros_like(text), jnp.zeros_like(scale)
        (_, of_rows, of_texts, total), _ = jax.lax.scan(step, start, length=spec.devices)

    of_own = jnp.where(share > 0, _gradient(spec, own, (share, share), (by_image, by_text)) - share, 0)
    of_images = of_rows.reshape(-1, image.shape[1])[: len(image)] + of_own[:, None] * text
    of_texts += of_own[:, None] * image
    of_scale, of_bias = _sum(spec, [jnp.vdot(image, of_images), total + of_own.sum()])
    if spec.kind == "softmax":
        of_bias = jnp.zeros_like(of_bias)  # exactly, by shift invariance
    return scale * of_images, scale * of_texts, of_scale, of_bias


def _gradient(
    spec: _Spec, logits: jax.Array, shares: tuple[jax.Array, jax.Array], sums: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Returns ½ Σᵢ wᵢ (∂Rᵢ + ∂Cᵢ) / ∂s, given shares, R and C of the logits' rows and columns."""
    row_share, column_share = shares
    if spec.kind == "softmax":
        return 0.5 * (row_share * jnp.exp(logits - sums[0]) + column_share * jnp.exp(logits - sums[1]))
    return 0.5 * (row_share + column_share) * jax.nn.sigmoid(logits)


def _local_pairs(spec: _Spec, image: jax.Array, text: jax.Array, share: jax.Array) -> tuple[_Pairs, _Pairs]:
    first = 0 if spec.devices == 1 else jax.lax.axis_index(spec.axes) * len(share)
    index = first + jnp.arange(len(share))
    if spec.products == "bfloat16":
        image, text = image.astype(jnp.bfloat16), text.astype(jnp.bfloat16)
    return _Pairs(image, share, index), _Pairs(text, share, index)


def _in_tiles(spec: _Spec, rows: Any) -> Any:
    """Cuts arrays [n, …] into [tiles, tile, …]; the last tile is filled with pairs of share 0."""

    def cut(leaf: jax.Array) -> jax.Array:
        tile = min(spec.tile, len(leaf))
        padded = jnp.pad(leaf, [(0, -len(leaf) % tile)] + [(0, 0)] * (leaf.ndim - 1))
        return padded.reshape(-1, tile, *leaf.shape[1:])

    return jax.tree.map(cut, rows)


def _product(sums: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies in the operands' dtype, and adds in float32 or wider."""
    wide = wide_dtype(a.dtype)
    return jnp.einsum(sums, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)


def _nothing_seen(like: jax.Array) -> _Statistics:
    lowest, zero = jnp.full_like(like, jnp.finfo(like.dtype).min), jnp.zeros_like(like)
    return _Statistics(top=lowest, total=zero, own=lowest, rival=lowest)


def _reduce(spec: _Spec, logits: jax.Array, own: jax.Array, others_kept: jax.Array, *, axis: int) -> _Statistics:
    """Returns the statistics of a tile's rows (axis 1) or columns (axis 0); partners that are not kept are left out."""
    lowest = jnp.finfo(logits.dtype).min
    logits = jnp.where(jnp.expand_dims(others_kept, 1 - axis), logits, lowest)
    of_own = jnp.max(jnp.where(own, logits, lowest), axis)
    rival = jnp.max(jnp.where(own, lowest, logits), axis)
    top = jnp.maximum(of_own, rival)
    if spec.kind == "softmax":
        total = jnp.sum(jnp.exp(logits - jnp.expand_dims(top, axis)), axis)
    else:
        total = jnp.sum(jax.nn.softplus(logits), axis)
    return _Statistics(top, total, of_own, rival)


def _merge(spec: _Spec, a: _Statistics, b: _Statistics) -> _Statistics:
    top = jnp.maximum(a.top, b.top)
    total = _rescaled(spec, a, top) + _rescaled(spec, b, top)
    return _Statistics(top, total, jnp.maximum(a.own, b.own), jnp.maximum(a.rival, b.rival))


def _rescaled(spec: _Spec, statistics: _Statistics, top: jax.Array) -> jax.Array:
    if spec.kind == "sigmoid":
        return statistics.total
    return statistics.total * jnp.exp(statistics.top - top)


def _finish(spec: _Spec, statistics: _Statistics) -> jax.Array:
    """Returns R (or C); of pairs that are not kept, a finite number that nobody reads."""
    return statistics.total if spec.kind == "sigmoid" else statistics.top + jnp.log(statistics.total)


def _combine(spec: _Spec, by_column: _Statistics) -> _Statistics:
    """Merges what all devices' rows say of all columns, and returns this device's columns."""
    if spec.devices == 1:
        return by_column
    top, own, rival = (jax.lax.pmax(leaf, spec.axes) for leaf in (by_column.top, by_column.own, by_column.rival))
    total = jax.lax.psum(_rescaled(spec, by_column, top), spec.axes)
    mine = len(top) // spec.devices
    start = jax.lax.axis_index(spec.axes) * mine
    whole = _Statistics(top, total, own, rival)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, mine), whole)


def _gather(spec: _Spec, tree: Any) -> Any:
    return tree if spec.devices == 1 else jax.lax.all_gather(tree, spec.axes, tiled=True)


def _sum(spec: _Spec, tree: Any) -> Any:
    return tree if spec.devices == 1 else jax.lax.psum(tree, spec.axes)


def _sum_to_owner(spec: _Spec, of_texts: jax.Array) -> jax.Array:
    return of_texts if spec.devices == 1 else jax.lax.psum_scatter(of_texts, spec.axes, tiled=True)


def _shift(spec: _Spec, tree: Any) -> Any:
    """Passes arrays to the next device of the ring."""
    if spec.devices == 1:
        return tree
    ring = [(i, (i + 1) % spec.devices) for i in range(spec.devices)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, spec.axes, ring), tree)
