"""Positions that a run passes over: pairs on which its steps went wrong, as ranges of the data position.

A range is [begin, end) in samples consumed since the run began. Which batch follows a position is a pure function of
the ranges, so they and one integer are all that a checkpoint needs.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TypeVar

Skips = tuple[tuple[int, int], ...]
T = TypeVar("T")


def next_position(position: int, *, batch: int, skips: Sequence[tuple[int, int]]) -> int:
    """Returns where the next batch begins: the first position from `position` on whose batch meets no range.

    Ranges are whole batches of the run that found them. With another batch size the pairs between the last whole batch
    and a range are passed over too, fewer than a batch.

    Args:
      position: samples consumed.
      batch: samples a step.
      skips: ranges, in any order.
    """
    for begin, end in sorted(skips):
        if begin < position + batch and position < end:
            position = end
    return position


def batches_between(
    batches: Callable[[int], Generator[T, None, None]], position: int, *, batch: int, skips: Sequence[tuple[int, int]]
) -> Generator[tuple[int, T], None, None]:
    """Yields (where it begins, batch) without end, past the ranges.

    Args:
      batches: position to the batches from there on; opened again after each range, which costs no reading.
      position: samples consumed.
      batch: samples a step.
      skips: ranges.
    """
    while True:
        position = next_position(position, batch=batch, skips=skips)
        with closing(batches(position)) as stream:
            for rows in stream:
                yield position, rows
                position += batch
                if next_position(position, batch=batch, skips=skips) != position:
                    break
            else:
                return
