"""Ends a run that hangs: the stacks of all threads to the log, and an exit code on which schedulers start it again."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from clip_jax.errors import RESTART

_REPORT_S = 10.0
"""How long the report may take: what hangs may be the disk that it goes to."""


class Watchdog:
    """A thread that ends the process when nothing has moved for too long; for use in `with`.

    It needs Python's interpreter lock: a C extension that hangs with it in hand is not noticed.

    Args:
      minutes: without a sign of progress; 0 means for ever.
      file: gets the stacks, as stderr does.
      leave: ends the process with an exit code.
    """

    def __init__(self, minutes: float, file: Path, *, leave: Callable[[int], object] = os._exit) -> None:
        self._seconds, self._file, self._leave = 60 * minutes, file, leave
        self._last, self._over = time.monotonic(), threading.Event()

    def __enter__(self) -> "Watchdog":
        self.progress()
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def progress(self) -> None:
        """Says that the run moves."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 10, 5)):
            if time.monotonic() - self._last > self._seconds:
                report = threading.Thread(target=self._report, daemon=True)
                report.start()
                report.join(_REPORT_S)
                self._leave(RESTART)
                return

    def _report(self) -> None:
        faulthandler.dump_traceback(file=2, all_threads=True)
        print(
            f"error: no step has ended for {self._seconds / 60:g} minutes (config.health.hang_minutes); the stacks of "
            f"all threads are above and in {self._file}; started again, the run goes on from its newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        with suppress(OSError), self._file.open("a") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
