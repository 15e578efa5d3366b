"""Input, tokenizer, losses, training step and start, measured one after the other, as one dated table.

  python -m benchmarks.run [--only step input …] [--out=runs/benchmarks] [--tiny]

Each benchmark is a process of its own, whose output is shown. Their figures go into `DATE.md` and `DATE.json` with the
machine, the versions and the commit. `--tiny` measures nothing that means something: it shows that they run.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import COLUMNS, FILE, Figure, cells
from tests.devices import quick_flags

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "tokenizers", "torch", "open_clip_torch", "webdataset")


class Benchmark(NamedTuple):
    """A module of this folder, and what it is given for the table, and for its tiny form.

    Attributes:
      name: of the module.
      full: its arguments.
      tiny: its arguments in the tiny form; None where a test runs the whole of it.
    """

    name: str
    full: tuple[str, ...] = ()
    tiny: tuple[str, ...] | None = ("--tiny",)


QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": quick_flags()}
"""Environment of the tiny form, which compiles in a quarter of the time what then takes longer to run."""
STEP = ("--config=configs/vit_b32.py:batch=64", "--config.model.dtype=float32")
SMALL_STEP = ("--config=configs/demo.py:batch=16,vision.layers=1,text.layers=1", "--rounds=1", "--matmul=64")
DEAD_TOKENS = "--compare=model.dead_tokens=compute"
SUITE = (
    Benchmark("input"),
    Benchmark("tokenizer"),
    Benchmark("loss_time", tiny=("--batch=128", "--width=32", "--rounds=1")),
    Benchmark("loss_memory", tiny=("--batch=256", "--width=32")),
    Benchmark("step", (*STEP, DEAD_TOKENS), (*SMALL_STEP, DEAD_TOKENS)),
    Benchmark("startup", tiny=None),
)


class Outcome(NamedTuple):
    """What a benchmark reported: (title, figures) of each of its tables; and how it ended."""

    name: str
    command: str
    tables: list[tuple[str, list[Figure]]]
    status: int
    seconds: float

    @property
    def has_failed(self) -> bool:
        """Whether it ended in an error, or reported nothing."""
        return self.status != 0 or not self.tables


def main() -> None:
    """Runs the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[each.name for each in SUITE], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the tables")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that all of them run")
    arguments = parser.parse_args()
    chosen = [each for each in SUITE if not arguments.only or each.name in arguments.only]
    session = Session(arguments.out, tiny=arguments.tiny)
    for each in chosen:
        options = each.tiny if arguments.tiny else each.full
        if options is not None:
            session.run(each.name, options)
    session.finish()


class Session:
    """Benchmarks one after the other, and their table, which is written after each: one that hangs takes none along.

    Args:
      out: folder of the tables.
      tiny: that these are the benchmarks' tiny forms.
    """

    def __init__(self, out: Path, *, tiny: bool = False) -> None:
        self._out, self._facts, self._environment = out, about(tiny=tiny), QUICK if tiny else {}
        self._outcomes: list[Outcome] = []
        self._path = self._write()

    def run(self, name: str, options: Sequence[str] = ()) -> Outcome:
        """Runs a module of this folder with these arguments."""
        outcome = run(name, options, self._environment)
        self._outcomes.append(outcome)
        self._write()
        return outcome

    def finish(self) -> None:
        """Says where the table is; exits with 1 if a benchmark failed."""
        print(f"written: {self._path}")
        if failed := [each.name for each in self._outcomes if each.has_failed]:
            sys.exit(f"failed: {', '.join(failed)}")

    def _write(self) -> Path:
        return write(self._outcomes, self._facts, self._out)


def run(name: str, options: Sequence[str], environment: Mapping[str, str]) -> Outcome:
    """Runs one benchmark, its output going to this process's.

    Args:
      name: of its module.
      options: its arguments.
      environment: what is set beside this process's.
    """
    command = " ".join(("python -m", f"benchmarks.{name}", *options))
    print(f"\n$ {command}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.jsonl"
        arguments = [sys.executable, "-m", f"benchmarks.{name}", *options]
        status = subprocess.run(arguments, cwd=ROOT, env={**os.environ, **environment, FILE: str(file)}).returncode
        lines = file.read_text().splitlines() if file.exists() else []
    tables = [(found["title"], [Figure(**figure) for figure in found["figures"]]) for found in map(json.loads, lines)]
    return Outcome(name, command, tables, status, time.monotonic() - began)


def about(*, tiny: bool) -> dict[str, Any]:
    """Returns when, where and of what the figures are."""
    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        "tiny": tiny,
        "commit": _commit(),
        "machine": _machine(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def write(outcomes: list[Outcome], facts: dict[str, Any], folder: Path) -> Path:
    """Writes the dated table as Markdown and as JSON; returns the former's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['date'].replace(':', '')}.md"
    results = [
        each._asdict()
        | {"tables": [[title, [figure._asdict() for figure in figures]] for title, figures in each.tables]}
        for each in outcomes
    ]
    path.with_suffix(".json").write_text(json.dumps({"about": facts, "results": results}, indent=2) + "\n")
    path.write_text(markdown(outcomes, facts))
    return path


def markdown(outcomes: list[Outcome], facts: dict[str, Any]) -> str:
    """Returns the table as text."""
    parts = [f"# Benchmarks, {facts['date']}", ", ".join(f"{name} {value}" for name, value in facts.items() if value)]
    for each in outcomes:
        ended = f", **failed with exit code {each.status}**" if each.has_failed else ""
        parts.append(f"## {each.name}\n\n`{each.command}`, {each.seconds:.0f} s{ended}")
        for title, figures in each.tables:
            rows = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, figures)]
            parts.append(title + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts) + "\n"


def _commit() -> str:
    """Returns the commit, and whether files differ from it; empty where this is no clone."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, text=True, capture_output=True
        )
    except OSError:
        return ""
    return found.stdout.strip()


def _machine() -> str:
    """Returns processor, cores that this process may use, and accelerators where the driver's tool is installed."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        found = subprocess.run(["nvidia-smi", "-L"], text=True, capture_output=True).stdout
    except OSError:
        found = ""
    return "; ".join([f"{cpu}, {cores} cores", *(line.partition(" (UUID")[0] for line in found.splitlines())])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
