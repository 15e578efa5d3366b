"""LiT (Zhai et al., 2022): a trained image tower stays as it is, and a new text tower learns to read it.

  python train.py --config=configs/recipes/lit.py --workdir=runs/lit --config.data.dataset=my_pairs

The image tower, its projection and a ResNet's statistics are those of `init_from`, and get no gradient, no update and
no optimizer state; the text tower begins at random. Other towers: `:model=ViT-L/14,init_from=ViT-L/14`.
400 M pairs; by arithmetic 8 hours of one H100 at 40 % of its peak. Expected: not measured at this size; the same steps
on the demo are in docs/recipes.md.
"""

from ml_collections import ConfigDict

from clip_jax.config import apply_argument
from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    config = paper_config("ViT-B/32", lr=1e-3, arg=None)
    config.init_from = "ViT-B/32"
    config.init_part = "image"
    config.optim.freeze = ("^image/",)
    config.batch = 16_384
    config.samples = 400_000_000
    return apply_argument(config, arg)
