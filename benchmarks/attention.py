"""Attention by cuDNN's kernels and by ours beside its definition, forward and backward: time and error, at the towers'
lengths, and of captions in groups as they are by default.

  python -m benchmarks.attention [--rows=256] [--rounds=5]

From q, k and v as one product leaves them to their gradient as its backward pass takes it, in bfloat16. An error is the
norm of what differs from the definition in float32 over that one's norm, the larger of the result's and the gradient's.
Needs an NVIDIA GPU.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.figures import Figure, report
from benchmarks.turns import in_turns
from clip_jax.command_line import one_line_errors
from clip_jax.config import MeshConfig
from clip_jax.models.kernel_check import attend_by, both_ways, relative_error
from clip_jax.models.text_groups import DEFAULT, Groups, groups_of
from clip_jax.models.variants import AttentionKind
from clip_jax.partition import make_mesh


class Shape(NamedTuple):
    """What a tower's attention is given."""

    name: str
    tokens: int
    heads: int
    causal: bool = False
    groups: Groups = ()


SHAPES = (
    Shape("ViT-B/32, images", 50, 12),
    Shape("ViT-B/16, images", 197, 12),
    Shape("ViT-L/14, images", 257, 16),
    Shape("ViT-L/14@336, images", 577, 16),
    Shape("ViT-B/32, texts", 77, 8, causal=True),
)
DEFINITION = "the definition"
KINDS: dict[str, AttentionKind] = {"cuDNN": "cudnn", "ours": "pallas", DEFINITION: "xla"}
HEAD = 64
CALLS = 10
SOME = 8  # rows, of which errors are measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="images or texts")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    arguments = parser.parse_args()
    shapes = [*SHAPES, _in_groups(arguments.rows)]
    with one_line_errors():
        figures = measure(shapes, arguments.rows, arguments.rounds)
    report(f"Attention of {arguments.rows}, forward and backward; {jax.devices()[0].device_kind}", figures)


def measure(shapes: Sequence[Shape], rows: int, rounds: int) -> list[Figure]:
    """Returns time and error of each shape."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1]).abstract_mesh
    programs = {}
    with jax.sharding.use_abstract_mesh(mesh), ThreadPoolExecutor() as pool:
        for shape in shapes:
            given = jax.eval_shape(functools.partial(_given, shape, rows))
            for name, kind in KINDS.items():
                lowered = _program(shape, kind).lower(*given)
                programs[shape.name, name] = pool.submit(lowered.compile)
        return [
            figure
            for shape in shapes
            for figure in _measure(shape, rows, rounds, {name: programs[shape.name, name].result() for name in KINDS})
        ]


def _measure(shape: Shape, rows: int, rounds: int, by: Mapping[str, Callable[..., Any]]) -> Iterator[Figure]:
    given = _given(shape, rows)
    with jax.default_matmul_precision("highest"):
        exact = _program(shape, "xla")(*(x[:SOME].astype(jnp.float32) for x in given))
    errors = {name: relative_error([x[:SOME] for x in function(*given)], exact) for name, function in by.items()}

    def repeat(function: Callable[..., Any]) -> None:
        jax.block_until_ready([function(*given) for _ in range(CALLS)])

    seconds = in_turns({name: functools.partial(repeat, function) for name, function in by.items()}, rounds)
    times = {name: 1e3 * median(found) / CALLS for name, found in seconds.items()}
    for name in KINDS:
        if name != DEFINITION:
            ratio = times[DEFINITION] / times[name]
            yield Figure(f"{shape.name}: {name}, time", times[name], "ms", DEFINITION, times[DEFINITION], ratio)
            yield Figure(f"{shape.name}: {name}, error", errors[name], "", DEFINITION, errors[DEFINITION])


def _program(shape: Shape, kind: AttentionKind) -> Any:
    def compute(packed: jax.Array, gradient: jax.Array) -> list[jax.Array]:
        mix = functools.partial(attend_by, kind, heads=shape.heads, causal=shape.causal, groups=shape.groups)
        return both_ways(mix, [packed], gradient)

    return jax.jit(compute)


def _in_groups(texts: int) -> Shape:
    groups = groups_of(DEFAULT, rows=texts, context=77)
    return Shape("ViT-B/32, texts in groups", sum(count * length for count, length in groups), 8, True, groups)


def _given(shape: Shape, rows: int) -> list[jax.Array]:
    """Returns what one product leaves, and a gradient; in groups all texts are one row."""
    return [
        jax.random.normal(
            jax.random.key(key), (1 if shape.groups else rows, shape.tokens, parts * shape.heads * HEAD), jnp.bfloat16
        )
        for key, parts in enumerate((3, 1))
    ]


if __name__ == "__main__":
    main()
