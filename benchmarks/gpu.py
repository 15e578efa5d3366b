"""Training steps of the paper's models on one large GPU, beside open_clip's: one call, one dated table.

  python -m benchmarks.gpu [--models vit_b32 vit_l14 …] [--out=runs/benchmarks] [--rounds=5]

bfloat16 over float32 weights, all tokens computed, so that both do the same work; the share of the peak is the data
sheet's (H100 and H200 with the SXM socket). Batches are sizes that should fill 80 GB; one that does not fit is named,
and the rest go on. Without open_clip, ours alone. What is aimed at:

| model | share of the peak | beside open_clip |
|---|---|---|
| ViT-L/14 | 45 % | 1.5 x |
| ViT-B/16, ViT-B/32, ViT-L/14@336 | 40 % | 1.5 x |
| RN50x64 | 30 % | 1.5 x |
| RN50 | 20 % | 1.5 x |
"""

import argparse
import importlib.util
from pathlib import Path

from benchmarks.run import run_all

BATCHES = {"vit_b32": 2048, "vit_b16": 512, "vit_l14": 256, "vit_l14_336": 96, "rn50": 512, "rn50x64": 48}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES), metavar="MODEL")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the tables")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    parser.add_argument("--batch", type=int, help="pairs, instead of each model's own")
    arguments = parser.parse_args()
    both = importlib.util.find_spec("open_clip") is not None
    turns = (f"--rounds={arguments.rounds}", f"--steps={arguments.steps}")
    chosen: list[tuple[str, tuple[str, ...]]] = []
    for model in arguments.models:
        config = f"--config=configs/{model}.py:batch={arguments.batch or BATCHES[model]}"
        chosen.append(("step", (config, "--config.model.dead_tokens=compute", *turns)))
        if both:
            chosen.append(("beside_torch", (config, *turns)))
    run_all(chosen, arguments.out)


if __name__ == "__main__":
    main()
