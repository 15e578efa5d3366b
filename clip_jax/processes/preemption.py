"""Notices that a run shall end: SIGTERM from a scheduler, or Ctrl-C.

A process alone has handlers of its own. Where there are several, `jax.distributed` owns SIGTERM: all processes learn of
it at the same step, about a second after the signal, whichever of them got it; and it takes only the first one.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils

from clip_jax.errors import RESTART, RestartError

_INTERRUPTED = 130
_TWICE = 0.5
"""Seconds in which a signal may come by two ways: from a scheduler, and from a program that started this one."""
_CODES = {signal.SIGTERM: RESTART, signal.SIGINT: _INTERRUPTED}


class PreemptedError(RestartError):
    """The run ended because it was told to; all processes raise it after the same step, and its checkpoint is whole.

    Args:
      message: one line.
      code: exit code; 130 after Ctrl-C, which no scheduler takes for a reason to start again.
    """

    def __init__(self, message: str, *, code: int = RESTART) -> None:
        super().__init__(message)
        self.code = code


class Preemption:
    """Whether the run shall end; for use in `with`.

    A second signal, half a second later or more, ends a process that is alone at once. The grace period ends every
    process.

    Args:
      grace_s: seconds from the signal in which a checkpoint must be written.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._signal: signal.Signals | None = None
        self._since = 0.0
        self._steps = 0
        self._handlers: dict[signal.Signals, object] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Preemption":
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._handlers = {each: signal.signal(each, self._handle) for each in _CODES}
        return self

    def __exit__(self, *exception: object) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)  # pyrefly: ignore
        if self._timer is not None:
            self._timer.cancel()

    def noticed(self) -> bool:
        """Whether the run shall end now; every process must ask after every step, and before every evaluation batch.

        The count of the calls is what processes agree on, since the number of the step goes back when a run does.
        """
        self._steps += 1
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(self._steps):
            self._begin(signal.SIGTERM)
        return self.is_ending

    @property
    def is_ending(self) -> bool:
        """Whether a signal was noticed already; with several processes, one that all of them did."""
        return self._signal is not None

    def ended(self, step: int) -> PreemptedError:
        """Returns what is raised when the checkpoint of that step is written."""
        name, code = (self._signal or signal.SIGTERM).name, _CODES[self._signal or signal.SIGTERM]
        return PreemptedError(f"stopped by {name} after step {step}, which is saved", code=code)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is not None:
            if time.monotonic() - self._since < _TWICE:
                return
            os.write(2, b"error: stopped by a second signal; the newest whole checkpoint holds\n")
            os._exit(_CODES[signal.Signals(number)])
        self._begin(signal.Signals(number))

    def _begin(self, found: signal.Signals) -> None:
        self._signal, self._since = found, time.monotonic()
        self._timer = threading.Timer(self._grace_s, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        limit = f"config.health.grace_s={self._grace_s:g} s"
        print(f"error: no checkpoint was written within {limit}; the one before holds", file=sys.stderr, flush=True)
        os._exit(_CODES[self._signal or signal.SIGTERM])
