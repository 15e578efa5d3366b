"""The demo's zero-shot accuracy and time over seeds, beside a control whose captions belong to other images.

  python -m benchmarks.demo --seeds=0,1,2

The control trains the same model on the same scans, but every caption goes to a random scan: what it can then know of
the classes is chance, 10 %.
"""

import argparse
import dataclasses
import json
import runpy
import tempfile
import time
from pathlib import Path

import numpy as np

from clip_jax.config import RunConfig, from_config_dict
from clip_jax.data.loader import open_part, open_source, parts_data
from clip_jax.data.records import Record, Source
from clip_jax.run.trainer import train

DEMO = Path(__file__).parent.parent / "configs" / "demo.py"


class PermutedCaptions:
    """A source whose captions are permuted over its images."""

    def __init__(self, source: Source, *, seed: int) -> None:
        self._source = source
        self.fingerprint, self.state = source.fingerprint | {"permuted": seed}, source.state
        self._caption_of = np.random.default_rng(seed).permutation(len(source))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """Returns the image of one record with the caption of another."""
        return self._source[index]._replace(captions=self._source[int(self._caption_of[index])].captions)

    def __str__(self) -> str:
        return f"{self._source} with permuted captions"


def run(config: RunConfig, *, permuted: bool) -> dict[str, float]:
    """Trains once; returns the seconds it took and top-1 by template set."""
    source = open_source(config, config.data)
    read = PermutedCaptions(source, seed=config.seed) if permuted else source
    data = parts_data(config, [open_part(config, config.data, read)])
    with tempfile.TemporaryDirectory() as workdir:
        began = time.perf_counter()
        train(config, Path(workdir), data=data)
        seconds = time.perf_counter() - began
        results = json.loads((Path(workdir) / "zero_shot.json").read_text())
    return {"seconds": seconds} | {result["prompts"]: result["acc1"] for result in results}


def main() -> None:
    """Prints one line a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data-dir", default="")
    arguments = parser.parse_args()
    values = runpy.run_path(str(DEMO))["get_config"](f"data_dir={arguments.data_dir}")
    base = from_config_dict(values)
    lines = []
    for seed in map(int, arguments.seeds.split(",")):
        for permuted in (False, True):
            found = run(dataclasses.replace(base, seed=seed), permuted=permuted)
            shown = ", ".join(f"{name} {value:.2%}" for name, value in found.items() if name != "seconds")
            kind = "permuted captions" if permuted else "captions"
            lines.append(f"seed {seed}, {kind}: {found['seconds']:.0f} s, zero-shot top-1: {shown}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
