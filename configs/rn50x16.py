"""RN50x16: 291 M parameters, 384 px.

  python train.py --config=configs/rn50x16.py --workdir=runs/rn50x16 --config.data.dataset=my_pairs

Published zero-shot ImageNet top-1 of OpenAI's weights: 70.72 %.
"""

from ml_collections import ConfigDict

from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    return paper_config("RN50x16", lr=4e-4, arg=arg)
