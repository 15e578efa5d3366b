"""ViT-L/14@336: 428 M parameters, 336 px in patches of 14; one epoch more from a trained ViT-L/14.

  python train.py --config=configs/vit_l14_336.py --workdir=runs/vit_l14_336 --config.data.dataset=my_pairs \\
    --config.init_from=runs/vit_l14

Published zero-shot ImageNet top-1 of OpenAI's weights: 76.56 %. `init_from` is the trained ViT-L/14, whose 16 x 16
positions are resized to 24 x 24.
"""

from ml_collections import ConfigDict

from clip_jax.config import apply_argument
from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    config = paper_config("ViT-L/14@336", lr=2e-5, arg=None)
    config.samples = 400_000_000
    return apply_argument(config, arg)
