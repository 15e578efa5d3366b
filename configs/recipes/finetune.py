"""A released model trained on with its own loss on other pairs (FLYP, Goyal et al., 2023); then WiSE-FT.

  python train.py --config=configs/recipes/finetune.py --workdir=runs/tuned --config.data.dataset=my_pairs
  clip-jax interpolate ViT-B/32 runs/tuned --config=configs/recipes/finetune.py --config.data.dataset=my_pairs \\
    --config.eval.dataset=imagenet_v2 --out=runs/tuned/wise_ft

Other weights: `:model=ViT-L/14,init_from=ViT-L/14`; `init_from` may also be a folder, a Hub name, or a run of yours.
5.1 M pairs; by arithmetic 10 minutes of one H100 at 40 % of its peak. Expected: not measured at this size; the same
steps on the demo are in docs/recipes.md.
"""

from ml_collections import ConfigDict

from clip_jax.config import apply_argument
from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    config = paper_config("ViT-B/32", lr=1e-5, arg=None)
    config.init_from = "ViT-B/32"
    config.batch = 512
    config.samples = 512 * 10_000
    config.optim.warmup_steps = 500
    config.optim.weight_decay = 0.1
    return apply_argument(config, arg)
