"""Attention over few tokens on NVIDIA's GPUs: kernels in Pallas that read q, k and v where one product left them.

CLIP's towers attend over 50 to 577 tokens: what their attention moves takes longer than what it multiplies. A library's
kernels want q, k and v apart and lengths even, and give three gradients: around them a step splits, pads, cuts and
joins what was one array. Here a program is one head of one sequence, forward or backward. It reads that head's channels
of the packed array, with a mask behind the last token, and writes those of the result, or of the packed gradient.

The algorithm is FlashAttention-2's (Dao, 2023): no logits are kept; the backward pass computes them again, from the
logarithm of each row's sum. It visits every pair of blocks once where there are two blocks at most, and beyond once for
the gradients of keys and values and once for those of queries, all of which would not fit into registers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from clip_jax.array_types import Array, Float

WHOLE = 64  # tokens of a block
SMALLEST = 16  # side of a matrix that a GPU's matrix units multiply
WARPS = 4
QUERY, KEY, VALUE = range(3)  # of the packed array


class Block(NamedTuple):
    """Tokens that are taken together: of every whole block `number` counts WHOLE of them; the last one has the rest,
    and may reach behind the last token."""

    number: Any
    size: int
    last: bool

    @property
    def tokens(self) -> Any:
        return pl.ds(self.number * WHOLE, self.size)

    @property
    def positions(self) -> jax.Array:
        return self.number * WHOLE + jnp.arange(self.size)


class Blocks(NamedTuple):
    """The blocks of a sequence of so many tokens, of which a causal one sees what is not behind it."""

    tokens: int
    causal: bool

    @property
    def whole(self) -> int:
        return self.tokens // WHOLE

    @property
    def rest(self) -> int:
        """Size of the last block, the smallest power of two that will do; 0 where whole ones are all."""
        left = self.tokens % WHOLE
        return max(SMALLEST, pl.next_power_of_2(left)) if left else 0

    @property
    def padded(self) -> int:
        return self.whole * WHOLE + self.rest

    @property
    def few(self) -> bool:
        return self.whole + bool(self.rest) <= 2

    def fold(self, visit: Callable[[Block, Any], Any], carry: Any) -> Any:
        """Returns what `visit` makes of one block after the other, given what it made of those before."""
        return self._fold(visit, carry, 0, self.whole, rest=True)

    def fold_seen(self, by: Block, visit: Callable[[Block, Any], Any], carry: Any) -> Any:
        """The same of the blocks that a block's queries see."""
        everything = by.last or not self.causal
        return self._fold(visit, carry, 0, self.whole if everything else by.number + 1, rest=everything)

    def fold_seeing(self, keys: Block, visit: Callable[[Block, Any], Any], carry: Any) -> Any:
        """The same of the blocks whose queries see a block's keys."""
        return self._fold(visit, carry, keys.number if self.causal else 0, self.whole, rest=True)

    def _fold(self, visit: Callable[[Block, Any], Any], carry: Any, first: Any, end: Any, *, rest: bool) -> Any:
        def visit_whole(number: Any, carry: Any) -> Any:
            return visit(Block(number, WHOLE, last=False), carry)

        if self.few:
            carry = functools.reduce(lambda carry, number: visit_whole(number, carry), range(first, end), carry)
        else:
            carry = jax.lax.fori_loop(first, end, visit_whole, carry)
        return visit(Block(self.whole, self.rest, last=True), carry) if rest and self.rest else carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def attend_packed(
    packed: Float[Array, "b l qkv"], heads: int, causal: bool, interpret: bool = False
) -> Float[Array, "b l d"]:
    """Mixes values by softmax(query·key / √c) within each head, with logits and softmax in float32 or wider.

    It has no forward-mode derivative. It is not partitioned: rows on several devices are each device's own.

    Args:
      packed: queries, keys and values, each of them its heads' channels one after the other, which are a power of two.
      heads: how many.
      causal: a query sees no later position than its own.
      interpret: without a GPU, slowly.
    """
    return _forward(packed, heads, causal, interpret)[0]


def _forward(packed: jax.Array, heads: int, causal: bool, interpret: bool) -> tuple[jax.Array, tuple]:
    batch, tokens, width = packed.shape
    blocks, channels = Blocks(tokens, causal), width // 3 // heads
    kernel = functools.partial(_mix, blocks=blocks, scale=channels**-0.5)
    head = _Head(blocks, channels)
    mixed, sums = pl.pallas_call(
        kernel,
        grid=(heads, batch),
        in_specs=head.packed,
        out_specs=(head.apart, head.number),
        out_shape=(
            jax.ShapeDtypeStruct((batch, tokens, heads, channels), packed.dtype),
            jax.ShapeDtypeStruct((batch, heads, blocks.padded), _wide(packed.dtype)),
        ),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        interpret=interpret,
        name="attention",
    )(*[packed.reshape(batch, tokens, 3, heads, channels)] * 3)
    mixed = mixed.reshape(batch, tokens, -1)
    return mixed, (packed, mixed, sums)


def _backward(heads: int, causal: bool, interpret: bool, kept: tuple, gradient: jax.Array) -> tuple[jax.Array]:
    packed, mixed, sums = kept
    batch, tokens, width = packed.shape
    blocks, channels = Blocks(tokens, causal), width // 3 // heads
    kernel = functools.partial(_pull, blocks=blocks, scale=channels**-0.5)
    head = _Head(blocks, channels)
    packed = packed.reshape(batch, tokens, 3, heads, channels)
    apart = batch, tokens, heads, channels
    of_packed = pl.pallas_call(
        kernel,
        grid=(heads, batch),
        in_specs=(*head.packed, head.apart, head.apart, head.number),
        out_specs=head.all_packed,
        out_shape=jax.ShapeDtypeStruct(packed.shape, packed.dtype),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        interpret=interpret,
        name="attention_backward",
    )(packed, packed, packed, mixed.reshape(apart), gradient.reshape(apart), sums)
    return (of_packed.reshape(batch, tokens, width),)


attend_packed.defvjp(_forward, _backward)


class _Head(NamedTuple):
    """Which part of an array a program has. Programs of one sequence follow one another."""

    blocks: Blocks
    channels: int

    @property
    def packed(self) -> tuple[pl.BlockSpec, ...]:
        """Of the packed array three times: queries, keys, values."""
        shape = (None, self.blocks.padded, None, None, self.channels)
        return tuple(pl.BlockSpec(shape, lambda h, b, i=i: (b, 0, i, h, 0)) for i in (QUERY, KEY, VALUE))

    @property
    def all_packed(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.blocks.padded, 3, None, self.channels), lambda h, b: (b, 0, 0, h, 0))

    @property
    def apart(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.blocks.padded, None, self.channels), lambda h, b: (b, 0, h, 0))

    @property
    def number(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.blocks.padded), lambda h, b: (b, h, 0))


def _mix(query_ref: Any, key_ref: Any, value_ref: Any, mixed_ref: Any, sums_ref: Any, *, blocks: Blocks, scale: float):
    """Writes a head's mixed values, and the logarithm to base 2 of each row's sum."""

    def mix(rows: Block, _: tuple) -> tuple:
        query = _load(query_ref, rows, blocks)
        wide = _wide(query.dtype)

        def visit(columns: Block, carry: Any) -> Any:
            mixed, top, total = carry
            logits = _logits(query, _load(key_ref, columns, blocks), rows, columns, blocks, scale)
            new_top = jnp.maximum(top, logits.max(axis=1))
            kept, shares = jnp.exp2(top - new_top), jnp.exp2(logits - new_top[:, None])
            value = _load(value_ref, columns, blocks)
            mixed = mixed * kept[:, None] + _dot(shares.astype(value.dtype), value)
            return mixed, new_top, total * kept + shares.sum(axis=1)

        start = jnp.zeros(query.shape, wide), jnp.full(rows.size, -jnp.inf, wide), jnp.zeros(rows.size, wide)
        mixed, top, total = blocks.fold_seen(rows, visit, start)
        _store(mixed_ref, rows, blocks, mixed / total[:, None])
        sums_ref[rows.tokens] = top + jnp.log2(total)
        return ()

    blocks.fold(mix, ())


def _pull(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    mixed_ref: Any,
    gradient_ref: Any,
    sums_ref: Any,
    of_packed_ref: Any,
    *,
    blocks: Blocks,
    scale: float,
):
    """Writes the gradients of a head's queries, keys and values."""

    def rows_of(rows: Block) -> tuple:
        query, mixed, gradient = (_load(ref, rows, blocks) for ref in (query_ref, mixed_ref, gradient_ref))
        wide = _wide(query.dtype)
        offset = (mixed.astype(wide) * gradient.astype(wide)).sum(axis=1)
        return query, gradient, offset, sums_ref[rows.tokens]

    def columns_of(columns: Block) -> tuple:
        return _load(key_ref, columns, blocks), _load(value_ref, columns, blocks)

    def pair(rows: Block, columns: Block, of_rows: tuple, of_columns: tuple) -> tuple[jax.Array, jax.Array]:
        """Returns the shares of a pair of blocks and their logits' gradient, but for the scale."""
        (query, gradient, offset, sums), (key, value) = of_rows, of_columns
        shares = jnp.exp2(_logits(query, key, rows, columns, blocks, scale) - sums[:, None])
        of_logits = shares * (_dot(gradient, value, (1, 1)) - offset[:, None])
        return shares.astype(query.dtype), of_logits.astype(query.dtype)

    def pull_columns(columns: Block, of_queries: tuple) -> tuple:
        """Writes the gradients of some keys and values; returns those of all queries with what these add, if asked."""
        of_columns = columns_of(columns)
        zeros = jnp.zeros(of_columns[0].shape, _wide(of_columns[0].dtype))

        def visit(rows: Block, carry: Any) -> Any:
            of_key, of_value, of_queries = carry
            of_rows = rows_of(rows)
            shares, of_logits = pair(rows, columns, of_rows, of_columns)
            of_key, of_value = of_key + _dot(of_logits, of_rows[0], (0, 0)), of_value + _dot(shares, of_rows[1], (0, 0))
            if of_queries:
                more = of_queries[rows.number] + _dot(of_logits, of_columns[0])
                of_queries = (*of_queries[: rows.number], more, *of_queries[rows.number + 1 :])
            return of_key, of_value, of_queries

        of_key, of_value, of_queries = blocks.fold_seeing(columns, visit, (zeros, zeros, of_queries))
        _store_packed(of_packed_ref, columns, blocks, scale * of_key, KEY)
        _store_packed(of_packed_ref, columns, blocks, of_value, VALUE)
        return of_queries

    def pull_rows(rows: Block, _: tuple) -> tuple:
        of_rows = rows_of(rows)

        def visit(columns: Block, of_query: jax.Array) -> jax.Array:
            of_columns = columns_of(columns)
            return of_query + _dot(pair(rows, columns, of_rows, of_columns)[1], of_columns[0])

        zeros = jnp.zeros(of_rows[0].shape, _wide(of_rows[0].dtype))
        _store_packed(of_packed_ref, rows, blocks, scale * blocks.fold_seen(rows, visit, zeros), QUERY)
        return ()

    if not blocks.few:
        blocks.fold(pull_columns, ())
        blocks.fold(pull_rows, ())
        return
    every = blocks.fold(lambda block, found: (*found, block), ())
    wide, channels = _wide(query_ref.dtype), query_ref.shape[-1]
    of_queries = tuple(jnp.zeros((rows.size, channels), wide) for rows in every)
    for rows, of_query in zip(every, blocks.fold(pull_columns, of_queries), strict=True):
        _store_packed(of_packed_ref, rows, blocks, scale * of_query, QUERY)


def _logits(query: jax.Array, key: jax.Array, rows: Block, columns: Block, blocks: Blocks, scale: float) -> jax.Array:
    """Returns logits to base 2, -inf where a query does not see a key."""
    logits = _dot(query, key, (1, 1)) * (scale * math.log2(math.e))
    if blocks.causal:
        return jnp.where(rows.positions[:, None] >= columns.positions[None], logits, -jnp.inf)
    return jnp.where(columns.positions[None] < blocks.tokens, logits, -jnp.inf) if columns.last else logits


def _load(ref: Any, block: Block, blocks: Blocks) -> jax.Array:
    """Returns a block's channels, 0 behind the last token."""
    mask = (block.positions < blocks.tokens)[:, None] if block.last else None
    return triton.load(ref.at[block.tokens, :], mask=mask, other=None if mask is None else 0)


def _store(ref: Any, block: Block, blocks: Blocks, values: jax.Array) -> None:
    mask = (block.positions < blocks.tokens)[:, None] if block.last else None
    triton.store(ref.at[block.tokens, :], values.astype(ref.dtype), mask=mask)


def _store_packed(ref: Any, block: Block, blocks: Blocks, values: jax.Array, which: int) -> None:
    mask = (block.positions < blocks.tokens)[:, None, None] if block.last else None
    triton.store(ref.at[block.tokens, pl.ds(which, 1), :], values.astype(ref.dtype)[:, None], mask=mask)


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """Returns the product over an axis of each."""
    dimensions = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=_wide(a.dtype))


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
