"""ViT-L/14: 428 M parameters, 224 px in patches of 14.

  python train.py --config=configs/vit_l14.py --workdir=runs/vit_l14 --config.data.dataset=my_pairs

The paper's run took 12 days on 256 V100. Published zero-shot ImageNet top-1 of OpenAI's weights: 75.54 %.
"""

from ml_collections import ConfigDict

from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    return paper_config("ViT-L/14", lr=4e-4, arg=arg)
