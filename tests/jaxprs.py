"""What is counted in a program before it is compiled."""

from typing import Any

from jax.extend.core import jaxprs_in_params


def runs_of(kernel: str, jaxpr: Any) -> int:
    """Returns how often a program without loops runs a primitive, or a kernel of that name."""
    return sum(
        kernel in (equation.primitive.name, equation.params.get("name"))
        or sum(runs_of(kernel, inner) for inner in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )
