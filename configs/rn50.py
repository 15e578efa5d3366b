"""RN50: 102 M parameters, 224 px.

  python train.py --config=configs/rn50.py --workdir=runs/rn50 --config.data.dataset=my_pairs

Published zero-shot ImageNet top-1 of OpenAI's weights: 59.82 %.
"""

from ml_collections import ConfigDict

from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    return paper_config("RN50", lr=5e-4, arg=arg)
