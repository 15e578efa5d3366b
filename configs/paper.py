"""The paper's recipe (Radford et al. 2021, §2.3-2.5 and tables 18-20), which the nine config files share.

32 epochs of 400 M pairs in batches of 32,768; AdamW with decay 0.2, warm-up of 2,000 steps, cosine to 0; β2 and ε by
the kind of image tower; random square crop; bfloat16 activations. The pairs themselves are not public: name your
own with `data.dataset` and `data.data_dir`, or use `data.source=synthetic` for a benchmark.
"""

from ml_collections import ConfigDict

from clip_jax.config import DataConfig, OptimConfig, RunConfig, apply_argument, to_config_dict
from clip_jax.models.variants import ResNetConfig, model_config


def paper_config(name: str, *, lr: float, arg: str | None) -> ConfigDict:
    """Returns the recipe of one of the paper's models.

    Args:
      name: the model, as the paper calls it.
      lr: its peak learning rate (table 19 or 20).
      arg: what stands behind the colon in --config=file.py:key=value,...
    """
    model = model_config(name)
    b2, eps = (0.999, 1e-8) if isinstance(model.vision, ResNetConfig) else (0.98, 1e-6)
    run = RunConfig(
        model=model,
        data=DataConfig(workers=8, prefetch=1),
        optim=OptimConfig(lr=lr, b2=b2, eps=eps),
    )
    config = to_config_dict(run)
    config.model.dtype = "bfloat16"
    return apply_argument(config, arg)
