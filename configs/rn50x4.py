"""RN50x4: 178 M parameters, 288 px.

  python train.py --config=configs/rn50x4.py --workdir=runs/rn50x4 --config.data.dataset=my_pairs

Published zero-shot ImageNet top-1 of OpenAI's weights: 66.27 %.
"""

from ml_collections import ConfigDict

from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    return paper_config("RN50x4", lr=5e-4, arg=arg)
