"""Contenders timed in turns, so that what else the machine does falls on all of them alike."""

import time
from collections.abc import Callable, Mapping


def in_turns(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each call in every round, after one round that does not count, which compiles.

    Args:
      calls: by the contenders' names; each returns when its work is done.
      rounds: that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds
