"""The smallest run that has every part of a large one; tests change what they are about."""

from clip_jax.config import DataConfig, LogConfig, OptimConfig, RunConfig
from clip_jax.models.variants import ModelConfig, TextConfig, ViTConfig

TINY = RunConfig(
    model=ModelConfig(
        embed_dim=16,
        vision=ViTConfig(image_size=16, patch=8, width=32, heads=2, layers=1),
        text=TextConfig(width=32, heads=2, layers=1, context=12, vocab_size=128),
    ),
    data=DataConfig(source="synthetic"),
    optim=OptimConfig(lr=1e-3, warmup_steps=5),
    log=LogConfig(every=1, tensorboard=False),
    batch=32,
    samples=32 * 20,
)
