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
from clip_jax.models.precision import wide_dtype
from clip_jax.models.text_groups import Groups

WHOLE = 64  # tokens of a block
SMALLEST = 16  # side of a matrix that a GPU's matrix units multiply
WARPS = 4
QUERY, KEY, VALUE = range(3)  # of the packed array


class Block(NamedTuple):
    """Tokens that are taken together, WHOLE of them behind as many of each block before; the last one has the rest, and
    may reach behind the last token."""

    number: Any
    size: int
    last: bool

    @property
    def first(self) -> Any:
        return self.number * WHOLE

    @property
    def positions(self) -> jax.Array:
        return self.first + jnp.arange(self.size)


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

    @property
    def stages(self) -> int:
        """Blocks of a loop that are read or computed at a time; of few, more cost what they save."""
        return 3 if self.whole > 3 else 2

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def attend_packed(
    packed: Float[Array, "b l qkv"], heads: int, causal: bool, groups: Groups = (), interpret: bool = False
) -> Float[Array, "b l d"]:
    """Mixes values by softmax(query·key / √c) within each head, with logits and softmax in float32 or wider.

    It has no forward-mode derivative. It is not partitioned: rows on several devices are each device's own.

    Args:
      packed: queries, keys and values, each of them its heads' channels one after the other, which are a power of two.
      heads: how many.
      causal: a query sees no later position than its own.
      groups: (sequences, length) of what a row holds one after the other, in which tokens see their own sequence; none
        means that a row is one. Tokens behind the last group give 0.
      interpret: without a GPU, slowly.
    """
    return _forward(packed, heads, causal, groups, interpret)[0]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))  # so that a tower's blocks lower them once
def _forward(
    packed: jax.Array, heads: int, causal: bool, groups: Groups, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, list[jax.Array]]]:
    batch, tokens, _ = packed.shape
    packed = packed.reshape(batch, tokens, 3, heads, -1)
    mixed, sums = _result(packed[:, :, QUERY], groups), []
    for part in _parts(groups, tokens, causal):
        of_part = jax.ShapeDtypeStruct((batch, part.count * heads, part.blocks.padded), wide_dtype(packed.dtype))
        mixed, of_part = _run(_attention_forward, part, packed, (), (mixed, of_part), interpret)
        sums.append(of_part)
    return mixed.reshape(batch, tokens, -1), (packed, mixed, sums)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(
    heads: int, causal: bool, groups: Groups, interpret: bool, kept: tuple, gradient: jax.Array
) -> tuple[jax.Array]:
    packed, mixed, sums = kept
    gradient, of_packed = gradient.reshape(mixed.shape), _result(packed, groups)
    for part, of_part in zip(_parts(groups, packed.shape[1], causal), sums, strict=True):
        (of_packed,) = _run(_attention_backward, part, packed, (mixed, gradient, of_part), (of_packed,), interpret)
    return (of_packed.reshape(*packed.shape[:2], -1),)


attend_packed.defvjp(_forward, _backward)


class _Part(NamedTuple):
    """Sequences of one length that follow one another in every row, from its token `first` on."""

    first: int
    count: int
    blocks: Blocks

    def sequence(self) -> "_Sequence":
        """Returns a program's own."""
        own = (pl.program_id(1) * self.blocks.tokens).astype(int) if self.count > 1 else 0
        return _Sequence(self.blocks, self.first + own)


def _parts(groups: Groups, tokens: int, causal: bool) -> list[_Part]:
    parts, first = [], 0
    for count, length in groups or ((1, tokens),):
        parts.append(_Part(first, count, Blocks(length, causal)))
        first += count * length
    return parts


def _result(like: jax.Array, groups: Groups) -> Any:
    """Returns what kernels write a result of that shape into: where each writes a part, zeros."""
    return jnp.zeros_like(like) if groups else jax.ShapeDtypeStruct(like.shape, like.dtype)


def _run(
    kernel: Callable[..., None],
    part: _Part,
    packed: jax.Array,
    others: tuple[jax.Array, ...],
    results: tuple[Any, ...],
    interpret: bool,
) -> Any:
    """Returns results: new ones of given shapes and dtypes, or given ones with what the kernel writes into them.

    A program is one head of one sequence. It is given its head's queries, keys and values, then what it has of the
    other arrays, then of the results; those of a sequence's heads follow one another.
    """
    batch, tokens, _, heads, channels = packed.shape
    reach = tokens + WHOLE  # what a mask hides may lie behind the row

    by_rank = {
        5: pl.BlockSpec((None, reach, 3, None, channels), lambda h, s, b: (b, 0, 0, h, 0)),
        4: pl.BlockSpec((None, reach, None, channels), lambda h, s, b: (b, 0, h, 0)),
        3: pl.BlockSpec((None, None, part.blocks.padded), lambda h, s, b: (b, s * heads + h, 0)),
    }
    one = (None, reach, None, None, channels)
    parts = [pl.BlockSpec(one, lambda h, s, b, i=i: (b, 0, i, h, 0)) for i in (QUERY, KEY, VALUE)]
    given = len(parts) + len(others)
    written = {i: x for i, x in enumerate(results) if isinstance(x, jax.Array)}

    def run(*refs: Any) -> None:
        kernel(part.sequence(), *refs[:given], *refs[given + len(written) :], scale=channels**-0.5)

    return pl.pallas_call(
        run,
        grid=(heads, part.count, batch),
        in_specs=(*parts, *(by_rank[x.ndim] for x in (*others, *written.values()))),
        out_specs=tuple(by_rank[x.ndim] for x in results),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results),
        input_output_aliases={given + n: i for n, i in enumerate(written)},
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=part.blocks.stages),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(packed, packed, packed, *others, *written.values())


class _Sequence(NamedTuple):
    """A program's own sequence: where its blocks are in arrays that hold all tokens of a row."""

    blocks: Blocks
    start: Any

    def load(self, ref: Any, block: Block) -> jax.Array:
        """Returns a block's channels, 0 behind the last token."""
        mask = self._mask(block)
        return triton.load(ref.at[self._tokens(block), :], mask=mask, other=None if mask is None else 0)

    def store(self, ref: Any, block: Block, values: jax.Array) -> None:
        triton.store(ref.at[self._tokens(block), :], values.astype(ref.dtype), mask=self._mask(block))

    def store_packed(self, ref: Any, block: Block, values: jax.Array, which: int) -> None:
        mask = self._mask(block)
        at = ref.at[self._tokens(block), pl.ds(which, 1), :]
        triton.store(at, values.astype(ref.dtype)[:, None], mask=None if mask is None else mask[:, None])

    def _tokens(self, block: Block) -> Any:
        return pl.ds(self.start + block.first, block.size)

    def _mask(self, block: Block) -> jax.Array | None:
        return (block.positions < self.blocks.tokens)[:, None] if block.last else None


def _attention_forward(
    own: _Sequence, query_ref: Any, key_ref: Any, value_ref: Any, mixed_ref: Any, sums_ref: Any, *, scale: float
) -> None:
    """Writes a head's mixed values, and the logarithm to base 2 of each row's sum."""
    blocks = own.blocks

    def mix(rows: Block, _: tuple) -> tuple:
        query = own.load(query_ref, rows)
        wide = wide_dtype(query.dtype)

        def visit(columns: Block, carry: Any) -> Any:
            mixed, top, total = carry
            logits = _logits(query, own.load(key_ref, columns), rows, columns, blocks, scale)
            new_top = jnp.maximum(top, logits.max(axis=1))
            kept, shares = jnp.exp2(top - new_top), jnp.exp2(logits - new_top[:, None])
            value = own.load(value_ref, columns)
            mixed = mixed * kept[:, None] + _dot(shares.astype(value.dtype), value)
            return mixed, new_top, total * kept + shares.sum(axis=1)

        start = jnp.zeros(query.shape, wide), jnp.full(rows.size, -jnp.inf, wide), jnp.zeros(rows.size, wide)
        mixed, top, total = blocks.fold_seen(rows, visit, start)
        own.store(mixed_ref, rows, mixed / total[:, None])
        sums_ref[pl.ds(rows.first, rows.size)] = top + jnp.log2(total)
        return ()

    blocks.fold(mix, ())


def _attention_backward(
    own: _Sequence,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    mixed_ref: Any,
    gradient_ref: Any,
    sums_ref: Any,
    of_packed_ref: Any,
    *,
    scale: float,
) -> None:
    """Writes the gradients of a head's queries, keys and values."""
    blocks = own.blocks

    def rows_of(rows: Block) -> tuple:
        query, mixed, gradient = (own.load(ref, rows) for ref in (query_ref, mixed_ref, gradient_ref))
        wide = wide_dtype(query.dtype)
        offset = (mixed.astype(wide) * gradient.astype(wide)).sum(axis=1)
        return query, gradient, offset, sums_ref[pl.ds(rows.first, rows.size)]

    def columns_of(columns: Block) -> tuple:
        return own.load(key_ref, columns), own.load(value_ref, columns)

    def pair(rows: Block, columns: Block, of_rows: tuple, of_columns: tuple) -> tuple[jax.Array, jax.Array]:
        """Returns the shares of a pair of blocks and their logits' gradient, but for the scale."""
        (query, gradient, offset, sums), (key, value) = of_rows, of_columns
        shares = jnp.exp2(_logits(query, key, rows, columns, blocks, scale) - sums[:, None])
        of_logits = shares * (_dot(gradient, value, (1, 1)) - offset[:, None])
        return shares.astype(query.dtype), of_logits.astype(query.dtype)

    def pull_columns(columns: Block, of_queries: tuple) -> tuple:
        """Writes the gradients of some keys and values; returns those of all queries with what these add, if asked."""
        of_columns = columns_of(columns)
        zeros = jnp.zeros(of_columns[0].shape, wide_dtype(of_columns[0].dtype))

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
        own.store_packed(of_packed_ref, columns, scale * of_key, KEY)
        own.store_packed(of_packed_ref, columns, of_value, VALUE)
        return of_queries

    def pull_rows(rows: Block, _: tuple) -> tuple:
        of_rows = rows_of(rows)

        def visit(columns: Block, of_query: jax.Array) -> jax.Array:
            of_columns = columns_of(columns)
            return of_query + _dot(pair(rows, columns, of_rows, of_columns)[1], of_columns[0])

        zeros = jnp.zeros(of_rows[0].shape, wide_dtype(of_rows[0].dtype))
        own.store_packed(of_packed_ref, rows, scale * blocks.fold_seen(rows, visit, zeros), QUERY)
        return ()

    if not blocks.few:
        blocks.fold(pull_columns, ())
        blocks.fold(pull_rows, ())
        return
    every = blocks.fold(lambda block, found: (*found, block), ())
    wide, channels = wide_dtype(query_ref.dtype), query_ref.shape[-1]
    of_queries = tuple(jnp.zeros((rows.size, channels), wide) for rows in every)
    for rows, of_query in zip(every, blocks.fold(pull_columns, of_queries), strict=True):
        own.store_packed(of_packed_ref, rows, scale * of_query, QUERY)


def _logits(query: jax.Array, key: jax.Array, rows: Block, columns: Block, blocks: Blocks, scale: float) -> jax.Array:
    """Returns logits to base 2, -inf where a query does not see a key."""
    logits = _dot(query, key, (1, 1)) * (scale * math.log2(math.e))
    if blocks.causal:
        return jnp.where(rows.positions[:, None] >= columns.positions[None], logits, -jnp.inf)
    return jnp.where(columns.positions[None] < blocks.tokens, logits, -jnp.inf) if columns.last else logits


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """Returns the product over an axis of each."""
    dimensions = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=wide_dtype(a.dtype))
