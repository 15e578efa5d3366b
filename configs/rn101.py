"""RN101: 120 M parameters, 224 px.

  python train.py --config=configs/rn101.py --workdir=runs/rn101 --config.data.dataset=my_pairs

Published zero-shot ImageNet top-1 of OpenAI's weights: 62.28 %.
"""

from ml_collections import ConfigDict

from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    return paper_config("RN101", lr=5e-4, arg=arg)
