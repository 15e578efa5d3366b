"""RN50x64: 623 M parameters, 448 px.

  python train.py --config=configs/rn50x64.py --workdir=runs/rn50x64 --config.data.dataset=my_pairs

The paper's run took 18 days on 592 V100. Published zero-shot ImageNet top-1 of OpenAI's weights: 73.91 %.
"""

from ml_collections import ConfigDict

from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    return paper_config("RN50x64", lr=3.6e-4, arg=arg)
