"""What a run shows: a progress bar on a terminal, plain lines elsewhere; and small tables."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

_CLOSED = (BrokenPipeError, ValueError, OSError)  # what writing to a closed stream raises; training goes on


class Progress:
    """Shows the steps of a run on stdout; for use in `with`.

    Args:
      total_steps: steps of the whole run.
      start_step: steps done before.
      chance_loss: the loss of a model that knows nothing, shown beside the loss.
      log_every: steps between lines where there is no terminal.
    """

    def __init__(self, total_steps: int, *, start_step: int = 0, chance_loss: float, log_every: int) -> None:
        self._total, self._start, self._log_every = total_steps, start_step, log_every
        self._chance_loss = chance_loss
        self._console = Console(highlight=False)
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, eta="-:--:--")
        self._live = Live(self._bar, console=self._console)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(*_CLOSED):
            self._live.stop()

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows the numbers of a finished step.

        Args:
          step: counted from 1.
          scalars: `loss`, `accuracy` (0..1), `logit_scale`, `step_time` (s), `samples_per_second`, `data_wait` (0..1).
        """
        numbers, eta = self._numbers(scalars), clock((self._total - step) * scalars["step_time"])
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, eta=eta)
            with suppress(*_CLOSED):
                self._live.update(Group(self._bar, Text(numbers)))
        elif step % self._log_every == 0 or step in (self._start + 1, self._total):
            self.print(f"step {step}/{self._total}  {numbers}  ETA {eta}")

    def print(self, text: str) -> None:
        """Shows a line, above the bar if there is one."""
        _print(self._console, text)

    def _numbers(self, scalars: Mapping[str, float]) -> str:
        return (
            f"loss {scalars['loss']:.4f} (chance {self._chance_loss:.2f})  "
            f"accuracy {scalars['accuracy']:.1%}  scale {scalars['logit_scale']:.2f}  "
            f"{scalars['step_time'] * 1000:.0f} ms/step  {scalars['samples_per_second']:,.0f} images/s  "
            f"data-wait {scalars['data_wait']:.0%}"
        )


def clock(seconds: float) -> str:
    """Returns h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Shows a table on stdout: ruled on a terminal, aligned plain text elsewhere."""
    console = Console(highlight=False)
    if not console.is_terminal:
        _print(console, plain_table(title, columns, rows))
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as text with aligned columns."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join([title, *("  " + line.rstrip() for line in aligned)])


def _print(console: Console, text: str) -> None:
    with suppress(*_CLOSED):
        if console.is_terminal:
            console.print(text, markup=False)
        else:
            print(text, file=console.file, flush=True)  # rich would wrap it at 80 columns
