"""What it costs a process to open data at web scale: `python -m benchmarks.data_sizing`.

Counts are synthetic: shards of 10,000 pairs that are nowhere, named by a pattern and counted in a JSON file, as a run
with 64 processes would open them. A few of the 64 are started, each as a process of its own, one after another, and
measured from the first line of the package's imports: time until the first window is known, and the peak of its memory,
at the beginning and then at the border of the first epoch, where two orders are in memory. The targets are 10 s, 1 GiB,
and 1 kB for the state that a checkpoint holds.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROCESSES, SAMPLES = 64, 10_000
STARTED = (0, 21, 42, 63)
PAIRS = (400_000_000, 5_000_000_000)


def main() -> None:
    """Prints one table; or as a process of the run, what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--process", type=int, help="be this process of the run")
    parser.add_argument("--shards", type=int)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.process is not None:
        print(json.dumps(open_as(arguments.process, arguments.shards, arguments.folder)))
        return
    rows = [measured(pairs) for pairs in PAIRS]
    from clip_jax.console import print_table

    columns = [
        "pairs",
        "shards",
        "open, s (10)",
        "of a core, s",
        "peak, MiB (1,024)",
        "peak over an epoch's end",
        "state, bytes (1,000)",
    ]
    print_table(f"{len(STARTED)} of {PROCESSES} processes; the worst of them", columns, rows)


def measured(pairs: int) -> list[str]:
    """Starts a few of the processes; returns the cells of a row."""
    shards = pairs // SAMPLES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "counts.json").write_text(json.dumps({f"{number:06d}.tar": SAMPLES for number in range(shards)}))
        found = [started(process, shards, folder) for process in STARTED]
    check_disjoint(found[0]["all_first"])
    for process, each in zip(STARTED, found, strict=True):
        assert each["first"] == found[0]["all_first"][process], "processes do not agree on who reads what"
    worst = {key: max(each[key] for each in found) for key in ("seconds", "cpu", "peak", "later", "state")}
    times = [f"{worst['seconds']:.1f}", f"{worst['cpu']:.1f}"]
    return [f"{pairs:,}", f"{shards:,}", *times, *(f"{worst[key]:,.0f}" for key in ("peak", "later", "state"))]


def started(process: int, shards: int, folder: Path) -> dict[str, Any]:
    """Returns what a process of the run found."""
    command = [sys.executable, "-m", "benchmarks.data_sizing"]
    command += [f"--process={process}", f"--shards={shards}", f"--folder={folder}"]
    return json.loads(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)


def check_disjoint(firsts: list[list[list[int]]]) -> None:
    """Holds that no two processes read a record in their first windows."""
    runs = sorted((first, first + length) for pieces in firsts for first, length in pieces)
    assert all(end <= begin for (_, end), (begin, _) in zip(runs, runs[1:], strict=False)), "records are read twice"


def open_as(process: int, shards: int, folder: Path) -> dict[str, Any]:
    """Opens the data as a run does; returns seconds, MiB, and what is read first."""
    began = time.perf_counter()
    from clip_jax.config import DataConfig, RunConfig
    from clip_jax.data.loader import open_part
    from clip_jax.data.order import WindowShuffle
    from clip_jax.data.tar_source import TarSource
    from clip_jax.models.variants import model_config

    data = DataConfig(
        source="tars",
        shards=f"s3://bucket/pairs/{{000000..{shards - 1:06d}}}.tar",
        counts=str(folder / "counts.json"),
        index_dir=str(folder / "index"),
        streams=PROCESSES,
    )
    config = RunConfig(model=model_config("ViT-B/32"), data=data)
    part = open_part(config, data)
    source, order = part.source, part.order
    assert isinstance(order, WindowShuffle)
    assert isinstance(source, TarSource)
    first = order.window_at(process)
    seconds, cpu, peak = time.perf_counter() - began, time.process_time(), _peak()
    state = json.dumps({"position": (2**62) // config.batch * config.batch, "data": source.fingerprint})
    firsts = [order.window_at(each).pieces.tolist() for each in range(PROCESSES)] if not process else []
    order.window_at(order.size // PROCESSES * PROCESSES + process)
    order.window_at(order.size + PROCESSES + process)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "peak": peak,
        "later": _peak(),
        "state": len(state),
        "first": first.pieces.tolist(),
        "all_first": firsts,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
