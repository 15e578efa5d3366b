"""ViT-B/32: 151 M parameters, 224 px in patches of 32.

  python train.py --config=configs/vit_b32.py --workdir=runs/vit_b32 --config.data.dataset=my_pairs

Published zero-shot ImageNet top-1 of OpenAI's weights: 63.32 %.
"""

from ml_collections import ConfigDict

from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    return paper_config("ViT-B/32", lr=5e-4, arg=arg)
