"""Training steps of the paper's models on one large GPU, beside open_clip's: one call, one dated table.

  python -m benchmarks.gpu [--models vit_b32 vit_l14 …] [--out=runs/benchmarks] [--rounds=5] [--compile]
      [--compare=key=value …]

bfloat16 over float32 weights, all tokens computed, so that both do the same work; the share of the peak is the data
sheet's (H100 and H200 with the SXM socket). Batches are sizes of which ours and theirs should fit into 80 GB together;
one that does not fit is named, and the rest go on. Without open_clip, ours alone. Before, attention by itself; and
each model with one key changed besides, and with one more: attention by cuDNN's kernels, and what XLA makes of the
MLPs, unless others are named, or none. If a model fails, the last of them is left out, there and behind it. The table
is written after each.
XLA_FLAGS=--xla_gpu_autotune_level=2 shortens compiling ResNets, --xla_gpu_experimental_enable_fusion_autotuner=false
RN50x64, which takes three minutes of 16 cores then.
What is aimed at:

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

from benchmarks.run import Session
from benchmarks.turns import add_compare

BATCHES = {"vit_b32": 1024, "vit_b16": 256, "vit_l14": 128, "vit_l14_336": 48, "rn50": 256, "rn50x64": 24}
COMPARED = ("model.attention=cudnn", "model.mlp=xla")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES), metavar="MODEL")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the tables")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    parser.add_argument("--batch", type=int, help="pairs, instead of each model's own")
    parser.add_argument("--compile", action="store_true", help="open_clip through torch.compile too")
    add_compare(parser)
    arguments = parser.parse_args()
    module, compiled = "step", ()
    if importlib.util.find_spec("open_clip") is not None:
        module, compiled = "beside_torch", ("--compile",) if arguments.compile else ()
    compare = [f"--compare={each}" for each in arguments.compare or COMPARED if each]
    turns = (f"--rounds={arguments.rounds}", f"--steps={arguments.steps}")
    session = Session(arguments.out)
    session.run("attention")
    for model in arguments.models:
        config = f"--config=configs/{model}.py:batch={arguments.batch or BATCHES[model]}"
        options = (config, "--config.model.dead_tokens=compute", *turns, *compiled)
        while session.run(module, (*options, *compare)).has_failed and compare:
            del compare[-1]
    session.finish()


if __name__ == "__main__":
    main()
