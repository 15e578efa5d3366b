"""Attention by cuDNN's kernels, and by JAX's own for GPUs, beside its definition, forward and backward: time and error,
at the towers' lengths.

  python -m benchmarks.attention [--rows=256] [--rounds=5]

Operands are bfloat16. An error is the norm of what differs from the definition in float32 over that one's norm, the
largest of the result's and the three gradients'. Needs an NVIDIA GPU.
"""

import argparse
import functools
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

from benchmarks.figures import Figure, report
from benchmarks.turns import in_turns
from clip_jax.command_line import one_line_errors
from clip_jax.config import MeshConfig
from clip_jax.models.attention import attend
from clip_jax.partition import make_mesh


class Shape(NamedTuple):
    """What a tower's attention is given."""

    name: str
    tokens: int
    heads: int
    causal: bool = False


SHAPES = (
    Shape("ViT-B/32, images", 50, 12),
    Shape("ViT-L/14, images", 257, 16),
    Shape("ViT-B/32, texts", 77, 8, causal=True),
)
HEAD = 64
CALLS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="images or texts")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    arguments = parser.parse_args()
    with (
        one_line_errors(),
        jax.sharding.use_abstract_mesh(make_mesh(MeshConfig(), devices=jax.devices()[:1]).abstract_mesh),
    ):
        figures = [figure for shape in SHAPES for figure in measure(shape, arguments.rows, arguments.rounds)]
    report(f"Attention of {arguments.rows}, forward and backward; {jax.devices()[0].device_kind}", figures)


def measure(shape: Shape, rows: int, rounds: int) -> list[Figure]:
    """Returns time and error of a shape."""
    keys = jax.random.split(jax.random.key(0), 4)
    given = [jax.random.normal(key, (rows, shape.tokens, shape.heads, HEAD), jnp.bfloat16) for key in keys]
    by = {name: jax.jit(functools.partial(_both_ways, kernel, shape.causal)) for name, kernel in KERNELS.items()}
    with jax.default_matmul_precision("highest"):
        exact = by[DEFINITION](*(x[:8].astype(jnp.float32) for x in given))
    errors = {name: _error(function(*(x[:8] for x in given)), exact) for name, function in by.items()}

    def repeat(function: Callable[..., Any]) -> None:
        jax.block_until_ready([function(*given) for _ in range(CALLS)])

    seconds = in_turns({name: functools.partial(repeat, function) for name, function in by.items()}, rounds)
    times = {name: 1e3 * median(found) / CALLS for name, found in seconds.items()}
    return [
        figure
        for name in KERNELS
        if name != DEFINITION
        for figure in (
            Figure(
                f"{shape.name}: {name}, time",
                times[name],
                "ms",
                DEFINITION,
                times[DEFINITION],
                times[DEFINITION] / times[name],
            ),
            Figure(f"{shape.name}: {name}, error", errors[name], "", DEFINITION, errors[DEFINITION]),
        )
    ]


def by_pallas(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool, block: int = 64, interpret: bool = False
) -> jax.Array:
    """Returns attention by JAX's kernel in Pallas, of rows padded to whole blocks that see only themselves."""
    rows, tokens, _, head = query.shape
    missing = -tokens % block
    query, key, value = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (query, key, value))
    segments = jnp.broadcast_to((jnp.arange(tokens + missing) >= tokens).astype(jnp.int32), (rows, tokens + missing))
    sizes = BlockSizes(block, block, block, block, block, block)
    mixed = mha(query, key, value, segments, head**-0.5, causal, block_sizes=sizes, interpret=interpret)
    return mixed[:, :tokens]


DEFINITION = "the definition"
KERNELS: dict[str, Callable[..., jax.Array]] = {
    "cuDNN": functools.partial(attend, kind="cudnn"),
    "Pallas": by_pallas,
    DEFINITION: functools.partial(attend, kind="xla"),
}


def _both_ways(
    kernel: Callable[..., jax.Array],
    causal: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gradient: jax.Array,
) -> list[jax.Array]:
    mixed, pull = jax.vjp(functools.partial(kernel, causal=causal), query, key, value)
    return [mixed, *pull(gradient)]


def _error(found: list[jax.Array], exact: list[jax.Array]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(float(jnp.linalg.norm(a.astype(b.dtype) - b) / jnp.linalg.norm(b)) for a, b in pairs)


if __name__ == "__main__":
    main()
