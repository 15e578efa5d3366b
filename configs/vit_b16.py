"""ViT-B/16: 150 M parameters, 224 px in patches of 16.

  python train.py --config=configs/vit_b16.py --workdir=runs/vit_b16 --config.data.dataset=my_pairs

Published zero-shot ImageNet top-1 of OpenAI's weights: 68.34 %.
"""

from ml_collections import ConfigDict

from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    return paper_config("ViT-B/16", lr=5e-4, arg=arg)
