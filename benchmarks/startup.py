"""Time from starting a run to its first step: the first start beside warm ones, which read its compiled programs.

  python -m benchmarks.startup [--config=configs/demo.py] [--config.key=value …]

Three processes of `train.py` on synthetic pairs, one after the other: the first compiles; the second starts the same
run in another workdir; the third resumes the first one's before its last step.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, report
from clip_jax.command_line import one_line_errors, take_overrides
from clip_jax.errors import UserError
from clip_jax.run import metrics

ROOT = Path(__file__).parent.parent
STEPS, BATCH = 3, 16
KEYS = {
    "data.source": "synthetic",
    "eval.dataset": "",
    "batch": BATCH,
    "samples": STEPS * BATCH,
    "optim.warmup_steps": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": STEPS,
    "log.every": 1,
    "log.tensorboard": "false",
}


def main() -> None:
    with one_line_errors():
        rest, overrides = take_overrides(sys.argv[1:])
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--config", default="configs/demo.py")
        config = parser.parse_args(rest).config
        keys = {key: str(value) for key, value in KEYS.items()} | dict(overrides)
        with tempfile.TemporaryDirectory() as folder:
            starts = measure(Path(folder), config, keys)
        report(f"Seconds to the end of the first step, {config}", list(beside_the_first(starts)))


def measure(folder: Path, config: str, keys: dict[str, str]) -> dict[str, dict[str, float]]:
    """Returns the metrics `startup/…` of three starts by their names.

    Args:
      folder: for workdirs and the compilation cache.
      config: a config file.
      keys: what is changed in it.

    Raises:
      UserError: a run failed.
    """
    first, again = folder / "first", folder / "again"
    starts = {"first start": _start(first, 1, folder, config, keys)}
    starts["warm start"] = _start(again, 1, folder, config, keys)
    shutil.rmtree(first / "checkpoints" / str(STEPS))
    starts["warm start, resumed"] = _start(first, STEPS, folder, config, keys)
    return starts


def beside_the_first(starts: dict[str, dict[str, float]]) -> Iterator[Figure]:
    """Yields every number of the later starts beside the first one's."""
    (first, before), *others = starts.items()
    for name, values in others:
        for key, value in values.items():
            unit = "programs" if key.startswith("programs") else "s"
            ratio = before[key] / value if unit == "s" and value else None
            yield Figure(f"{name}: {key.replace('_', ' ')}", value, unit, first, before[key], ratio)


def _start(workdir: Path, step: int, folder: Path, config: str, keys: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}"]
    keys = keys | {"compilation_cache": str(folder / "programs")}
    status = subprocess.run(
        [*command, *(f"--config.{key}={value}" for key, value in keys.items())], cwd=ROOT
    ).returncode
    if status:
        raise UserError(f"train.py ended with exit code {status}")
    (row,) = (row for row in metrics.read(workdir) if row["step"] == step)
    return {name.removeprefix("startup/"): value for name, value in row.items() if name.startswith("startup/")}


if __name__ == "__main__":
    main()
