"""What is counted in a program before it is compiled."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import jaxprs_in_params


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations of a program, those of its loops and functions once."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def runs_of(kernel: str, jaxpr: Any) -> int:
    """Returns how often a program without loops runs a primitive, or a kernel of that name."""
    return sum(kernel in (each.primitive.name, each.params.get("name")) for each in equations(jaxpr))
