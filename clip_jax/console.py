"""What a run shows: a progress bar on a terminal, plain lines elsewhere; and small tables."""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TextIO, cast, runtime_checkable

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

_NO_ETA = "-:--:--"
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
"""Control characters, line ends, and what turns the direction of writing."""


@runtime_checkable
class Stream(Protocol):
    """What is needed of a text stream, such as `sys.stdout`."""

    def write(self, text: str, /) -> Any:
        """Takes text."""

    def flush(self) -> Any:
        """Sends it on."""

    def isatty(self) -> bool:
        """Whether this is a terminal."""
        ...


class Progress:
    """Shows the steps of a run; for use in `with`. Training goes on where the stream is closed.

    Args:
      total_steps: steps of the whole run.
      start_step: steps done before.
      chance_loss: the loss of a model that knows nothing, shown beside the loss.
      log_every: steps between lines where there is no terminal.
      stream: where to; stdout if None.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        chance_loss: float,
        log_every: int,
        stream: Stream | None = None,
    ) -> None:
        self._total, self._start, self._log_every = total_steps, start_step, log_every
        self._chance_loss = chance_loss
        self._console = _console(stream)
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, eta=_NO_ETA)
        self._live = Live(self._bar, console=self._console)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows the numbers of a finished step.

        Args:
          step: counted from 1.
          scalars: `loss`, `accuracy` (0..1), `logit_scale`; and where steps were timed, `step_time` (s),
            `samples_per_second`, `data_wait` (0..1).
        """
        numbers, is_timed = self._numbers(scalars), "step_time" in scalars
        eta = clock((self._total - step) * scalars["step_time"]) if is_timed else _NO_ETA
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, eta=eta)
            self._live.update(Group(self._bar, Text(numbers)))
        elif step % self._log_every == 0 or step in (self._start + 1, self._total):
            self.print(f"step {step}/{self._total}  {numbers}" + f"  ETA {eta}" * is_timed)

    def print(self, text: str) -> None:
        """Shows a line, above the bar if there is one."""
        _print(self._console, text)

    def _numbers(self, scalars: Mapping[str, float]) -> str:
        numbers = (
            f"loss {scalars['loss']:.4f} (chance {self._chance_loss:.2f})  "
            f"accuracy {scalars['accuracy']:.1%}  scale {scalars['logit_scale']:.2f}"
        )
        if "step_time" not in scalars:
            return numbers
        return (
            f"{numbers}  {scalars['step_time'] * 1000:.0f} ms/step  {scalars['samples_per_second']:,.0f} images/s  "
            f"data-wait {scalars['data_wait']:.0%}"
        )


class WorkProgress:
    """Shows how many pieces of a job are done; for use in `with`.

    Args:
      what: what a piece is called, in the plural.
      total: pieces of the whole job.
      done: pieces done before.
      every: seconds between lines where there is no terminal.
      stream: where to; stdout if None.
    """

    def __init__(
        self, what: str, total: int, *, done: int = 0, every: float = 10.0, stream: Stream | None = None
    ) -> None:
        self._what, self._total, self._before, self._done, self._every = what, total, done, done, every
        self._console = _console(stream)
        self._bar = Bar(
            TextColumn(what),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}  ETA {task.fields[eta]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=total, completed=done, numbers="", eta=_NO_ETA)
        self._began = time.monotonic()
        self._spoke = self._began

    def __enter__(self) -> "WorkProgress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def advance(self, numbers: str) -> None:
        """Shows that one more piece is done, and some numbers beside."""
        self._done += 1
        now = time.monotonic()
        eta = clock((now - self._began) / (self._done - self._before) * (self._total - self._done))
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, numbers=numbers, eta=eta)
        elif now - self._spoke >= self._every or self._done == self._total:
            self._spoke = now
            self.print(f"{self._what} {self._done}/{self._total}  {numbers}  ETA {eta}")

    def print(self, text: str) -> None:
        """Shows a line, above the bar if there is one."""
        _print(self._console, text)


def clock(seconds: float) -> str:
    """Returns h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Shows a table on stdout: ruled on a terminal, aligned plain text elsewhere."""
    console = _console(None)
    if not console.is_terminal:
        _print(console, plain_table(title, columns, rows))
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(_cell, row))
    console.print(table)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as text with aligned columns."""
    lines = [list(columns), *(list(map(_cell, row)) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join([title, *("  " + line.rstrip() for line in aligned)])


def _cell(text: str) -> str:
    """Returns a text on one line that a terminal only shows: captions of the web may hold escape sequences."""
    return _CONTROLS.sub(" ", text)


class _Output:
    """A text stream that drops what it cannot write, so that no display ends a run.

    The exceptions must not reach rich, which exits the process on a broken pipe, and draws from a thread of its own.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether this is a terminal; raises ValueError if closed, which rich takes for no."""
        return self._stream.isatty()

    def write(self, text: str) -> int:
        """Writes text, with escapes for what the stream's encoding lacks."""
        with suppress(OSError, ValueError):
            self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            # What is buffered would fail once more where Python ends, with exit code 120; it can go nowhere but here.
            with suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # pyrefly: ignore[missing-attribute]
        except (OSError, ValueError):
            pass


def _console(stream: Stream | None) -> Console:
    """Returns a console that shows text as it is: a class may well be called "[red]" or ":smile:"."""
    target = stream or sys.stdout  # None where the process was started without a stdout; rich then writes nowhere
    file = cast(TextIO, _Output(target)) if target else None
    return Console(file=file, highlight=False, markup=False, emoji=False)


def _print(console: Console, text: str) -> None:
    if console.is_terminal:
        console.print(text)
    else:
        print(text, file=console.file, flush=True)  # rich would wrap it at 80 columns
