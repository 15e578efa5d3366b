"""Pairs that could not be used: named in the workdir, counted by reason, and too many of them end the run."""

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from clip_jax.data.records import REASONS, UNREACHABLE
from clip_jax.errors import OutageError, UserError
from clip_jax.run.metrics import Unwritten

_PREFIX = "bad/"
_JUDGED_FROM = 1_000
_WINDOW_PAIRS, _WINDOW_STEPS = 10_000, 50
_MOST_LINES = 10_000


class BadRecords:
    """What a run knows of its bad pairs, since this process began.

    Args:
      workdir: gets `bad_records-<process>.jsonl`, a line for each bad pair of the process, 10,000 at most.
      where: record number to what to call it.
      batch: pairs of a step, over all processes.
      max_share: a larger share of the last 10,000 pairs, or of the last 50 steps' if these are more, ends the run: an
        outage of the data does so soon, after however many good steps.
    """

    def __init__(self, workdir: Path, where: Callable[[int], str], *, batch: int, max_share: float) -> None:
        self._file = workdir / f"bad_records-{jax.process_index()}.jsonl"
        self._unwritten = Unwritten(self._file)
        self._where, self._batch, self._max_share = where, batch, max_share
        self._lines = 0
        self._totals: Counter[str] = Counter()
        self._window: deque[Counter[str]] = deque(maxlen=max(_WINDOW_STEPS, math.ceil(_WINDOW_PAIRS / batch)))
        self._in_window: Counter[str] = Counter()

    def note(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
        """Names the bad pairs among this process's rows of a batch."""
        rows = np.flatnonzero(batch["bad"])[: _MOST_LINES - self._lines]
        if not len(rows):
            return
        self._lines += len(rows)
        with self._unwritten, self._file.open("a", encoding="utf-8") as file:
            for row in rows:
                index = int(batch["index"][row])
                reason = REASONS[int(batch["bad"][row]) - 1]
                line = {"step": step, "index": index, "reason": reason, "record": self._where(index)}
                file.write(json.dumps(line) + "\n")

    def count(self, metrics: dict[str, float]) -> dict[str, float]:
        """Adds up a step's metrics; returns them with the reasons that occurred so far, counted over all steps.

        All processes see the same metrics, so they agree on whether there are too many.

        Args:
          metrics: of a step, with `bad/<reason>` for pairs of that step.

        Raises:
          UserError: there are too many; an OutageError where there were not but for a store that does not answer.
        """
        found = Counter({name: round(count) for name, count in metrics.items() if name.startswith(_PREFIX)})
        if len(self._window) == self._window.maxlen:
            self._in_window.subtract(self._window[0])
        self._window.append(found)
        self._in_window.update(found)
        self._totals.update(found)
        bad, pairs = self._in_window.total(), self._batch * len(self._window)
        if pairs >= _JUDGED_FROM and bad > self._max_share * pairs:
            of_stores = self._in_window[_PREFIX + UNREACHABLE]
            kind = OutageError if bad - of_stores <= self._max_share * pairs else UserError
            raise kind(
                f"{bad:,} of the last {pairs:,} pairs could not be used ({self._by_reason()}), more than "
                f"config.data.max_bad_share={self._max_share}; see {self._file}"
            )
        kept = {name: value for name, value in metrics.items() if not name.startswith(_PREFIX)}
        return kept | {name: float(count) for name, count in self._totals.items() if count}

    def _by_reason(self) -> str:
        counts = self._in_window.most_common()
        return ", ".join(f"{name.removeprefix(_PREFIX)} {count:,}" for name, count in counts if count)
