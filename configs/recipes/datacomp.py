"""DataComp's small and medium scale (Gadre et al., 2023, §3; its `scale_configs.py`): data vary, the rest is fixed.

  python train.py --config=configs/recipes/datacomp.py --workdir=runs/datacomp_small \\
    --config.data.shards='s3://bucket/small/shards/{00000000..00001287}.tar'
  python train.py --config=configs/recipes/datacomp.py:samples=128000000 --workdir=runs/datacomp_medium \\
    --config.data.shards='s3://bucket/medium/shards/{00000000..00012895}.tar' --config.data.uids=subset.npy

ViT-B/32 with the exact GELU, as open_clip's `ViT-B-32` is; medium is ten times the samples of small. `uids` is a
subset in DataComp's own format. Expected, published (table 3 there): ImageNet zero-shot 2.5 % (small) and 17.6 %
(medium) with no filter; 5.1 % and 27.3 % with the 30 % of highest CLIP score. By arithmetic 0.4 and 4 hours of one H100
at 40 % of its peak. Not measured here. What differs from open_clip's trainer: docs/pretraining.md.
"""

from ml_collections import ConfigDict

from clip_jax.config import apply_argument
from configs.paper import paper_config


def get_config(arg: str | None = None) -> ConfigDict:
    config = paper_config("ViT-B/32", lr=5e-4, arg=None)
    config.model.activation = "gelu"
    config.batch = 4096
    config.samples = 12_800_000
    config.optim.warmup_steps = 500
    config.optim.decay_mask = "open_clip_adamw"
    config.data.source = "tars"
    config.data.crop = "resized"
    return apply_argument(config, arg)
