"""Traces of some steps by JAX's profiler, to be looked at in XProf: a window of the config, or after a signal.

A window holds whole steps and no other: what runs on the devices is waited for before it begins and before it ends. A
trace that fails ends no training.
"""

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from clip_jax.errors import one_line

SIGNAL = signal.SIGUSR1
"""SIGTERM and Ctrl-C end a run (`processes/preemption.py`); nothing else uses this one, and data workers ignore it."""

_LOG = logging.getLogger(__name__)


class Profiler:
    """Writes traces of steps; for use in `with`. Every process traces itself, and only where it was asked to.

    Args:
      folder: gets `plugins/profile/steps-<first>-<last>/<host>.xplane.pb`, as TensorBoard and XProf expect it.
      window: first and last step; empty means none.
      on_signal: steps that are traced after SIGUSR1.
      say: shows a line to the user.
    """

    def __init__(self, folder: Path, window: Sequence[int], *, on_signal: int, say: Callable[[str], None]) -> None:
        self._folder, self._window, self._on_signal, self._say = folder, tuple(window), on_signal, say
        self._asked = False
        self._tracing: tuple[int, int] | None = None
        self._handler: Any = None

    def __enter__(self) -> "Profiler":
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(SIGNAL, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handler is not None:
            signal.signal(SIGNAL, self._handler)
        if self._tracing is not None:  # the run ends within a window
            self._stop()

    def before(self, step: int, state: Any) -> None:
        """Begins a trace if one is due with this step.

        Args:
          step: that is about to start.
          state: what the steps before give.
        """
        if self._tracing is not None:
            return
        if self._window and self._window[0] <= step <= self._window[1]:
            last = self._window[1]
        elif self._asked:
            last, self._asked = step + self._on_signal - 1, False
        else:
            return
        jax.block_until_ready(state)
        self._start(step, last)

    def after(self, step: int, state: Any) -> None:
        """Ends the trace whose last step was just started; `state` is what that step gives."""
        if self._tracing is not None and step >= self._tracing[1]:
            jax.block_until_ready(state)
            self._stop()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def _start(self, first: int, last: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would be in it: slower steps, and a file of gigabytes
        options.session_id = f"steps-{first}-{last}"  # the same on all hosts, which are shown together
        try:
            jax.profiler.start_trace(self._folder, profiler_options=options)
        except Exception as error:  # such as another trace of this process
            self._give_up(error)
        else:
            self._tracing = first, last

    def _stop(self) -> None:
        assert self._tracing is not None
        (first, last), self._tracing = self._tracing, None
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # such as a full disk
            self._give_up(error)
        else:
            self._say(f"profiled steps {first} to {last}: xprof --logdir={self._folder}")

    def _give_up(self, error: Exception) -> None:
        self._window = ()
        _LOG.warning("no profile was written: %s: %s", type(error).__name__, one_line(error))
