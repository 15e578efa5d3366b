"""How a benchmark reports: a table of figures, each beside its counterpart of the same run.

Where the environment names a file (`benchmarks/run.py` does), the figures are appended to it too, as JSON lines.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clip_jax.console import print_table

FILE = "CLIP_JAX_FIGURES"
COLUMNS = ("what", "measured", "unit", "beside it", "counterpart", "ratio")


class Figure(NamedTuple):
    """One number that was measured, and what it stands beside.

    Attributes:
      what: was measured, and under which conditions.
      value: measured.
      unit: of both numbers, such as `pairs/s`.
      beside: what the counterpart is; empty where there is none.
      counterpart: measured in the same run.
      ratio: how many times better than the counterpart; over 1 where the value is better.
    """

    what: str
    value: float
    unit: str
    beside: str = ""
    counterpart: float | None = None
    ratio: float | None = None


def report(title: str, figures: Sequence[Figure]) -> None:
    """Shows a table of figures, and hands them to who started this process.

    Args:
      title: what was measured, where and how.
      figures: in the order in which they are shown.
    """
    print_table(title, COLUMNS, [cells(figure) for figure in figures])
    if path := os.environ.get(FILE):
        with Path(path).open("a") as file:
            file.write(json.dumps({"title": title, "figures": [figure._asdict() for figure in figures]}) + "\n")


def cells(figure: Figure) -> list[str]:
    """Returns a figure as the cells of a row."""
    counterpart = "" if figure.counterpart is None else number(figure.counterpart)
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}x"
    return [figure.what, number(figure.value), figure.unit, figure.beside, counterpart, ratio]


def number(value: float) -> str:
    """Returns a number with three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
