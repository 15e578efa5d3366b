"""Images a second that `clip-jax data prepare` makes ready: one process beside two, and beside Ray.

  python -m benchmarks.prepare [--images=1200] [--rounds=3] [--ray]

Tar shards of scikit-learn's two photographs as JPEGs of 640 x 427 are prepared with a shorter side of 256. The ways run
in turn, the best round of each counts; starting processes, and Ray, is part of the time.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.photographs import write_shards
from clip_jax.console import print_table
from clip_jax.data.prepare import Job, prepare

SIZE = (640, 427)
SHARDS = 12

Way = dict[str, str | int]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="Ray on this machine too")
    options = parser.parse_args()
    ways: dict[str, Way] = {"1 process": {"workers": 1}, "2 processes": {"workers": 2}}
    if options.ray:
        ways["Ray, all cores"] = {"runner": "ray"}
    with tempfile.TemporaryDirectory() as folder:
        tars = write_shards(Path(folder), shards=SHARDS, samples=options.images // SHARDS, size=SIZE)
        best = dict.fromkeys(ways, float("inf"))
        for number, (name, way) in itertools.product(range(options.rounds), ways.items()):
            best[name] = min(best[name], seconds(tars, Path(folder) / f"{number}_{name.replace(' ', '_')}", way))
        sizes = sizes_of(Path(folder))
    first = best["1 process"]
    rows = [
        [name, f"{options.images / best[name]:,.0f}", f"{first / best[name]:.2f}", f"{best[name]:.1f}"] for name in ways
    ]
    print_table(f"Images prepared a second, {os.cpu_count()} cores", ["", "images/s", "x 1 process", "seconds"], rows)
    print(f"a JPEG of {SIZE[0]}x{SIZE[1]}: {sizes[0] / 1e3:.1f} kB, prepared {sizes[1] / 1e3:.1f} kB")


def seconds(tars: str, data_dir: Path, way: Way) -> float:
    """Returns how long one job takes."""
    job = Job("pairs", data_dir=str(data_dir), tars=tars)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(job, **way)  # pyrefly: ignore[bad-argument-type]
    return time.perf_counter() - began


def sizes_of(folder: Path) -> tuple[float, float]:
    """Returns the bytes of an image before, and of its record after."""
    manifest = json.loads(next(folder.rglob("manifest.json")).read_text())
    return manifest["bytes_in"] / manifest["records"], manifest["bytes"] / manifest["records"]


if __name__ == "__main__":
    main()
