"""Contenders: how a command line names runs to compare; and timed in turns, so that what else the machine does falls on
all of them alike.

Without JAX, so that what only starts other benchmarks does without it.
"""

import argparse
import time
from collections.abc import Callable, Mapping


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Adds the option whose values `benchmarks.step.load_runs` takes."""
    changed = "also measure with this key changed; given again, with those before as well"
    parser.add_argument("--compare", metavar="KEY=VALUE", action="append", default=[], help=changed)


def in_turns(
    calls: Mapping[str, Callable[[], None]], rounds: int, *, settle: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """Returns the seconds of each call in every round, after one round that does not count, which compiles.

    Args:
      calls: by the contenders' names; each returns when its work is done.
      rounds: that count.
      settle: called before each with its name, untimed: where calls take gigabytes, the first one in a turn would pay
        for pages that the contender before it gave back to the system.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if settle and turn:
                settle(name)
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds
