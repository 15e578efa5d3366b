"""Another image resolution for trained weights: learnt positions are resized, everything else stays.

So ViT-L/14@336 starts from ViT-L/14 (paper, §2.5), its grid of 16 x 16 positions resized to 24 x 24. Bicubic and
antialiased, the class token's (or the attention pool's mean token's) position kept: open_clip's way
(`model.py`, resize_pos_embed).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from clip_jax.array_types import Array, Float
from clip_jax.models.clip import Variables
from clip_jax.models.variants import ModelConfig, ResNetConfig


def change_resolution(config: ModelConfig, variables: Variables, image_size: int) -> tuple[ModelConfig, Variables]:
    """Returns the model for square images of another side, in pixels, and its variables.

    Args:
      config: the model that `variables` belong to.
      variables: `params` and `batch_stats`; they are not changed.
      image_size: the new side: a multiple of the patch, or of 32 for a ResNet.
    """
    resized = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
    params = variables["params"]
    tower = params["image"]
    if isinstance(config.vision, ResNetConfig):
        pool = tower["attention_pool"]
        positions = resize_positions(jnp.asarray(pool["positions"]), tokens=resized.vision.tokens)
        tower = tower | {"attention_pool": pool | {"positions": positions}}
    else:
        tower = tower | {"positions": resize_positions(jnp.asarray(tower["positions"]), tokens=resized.vision.tokens)}
    return resized, variables | {"params": params | {"image": tower}}


def resize_positions(positions: Float[Array, "n d"], *, tokens: int) -> Float[Array, "{tokens} d"]:
    """Resizes a square grid of positions behind one that is kept; `tokens` counts that one too."""
    before, after = math.isqrt(positions.shape[0] - 1), math.isqrt(tokens - 1)
    if before == after:
        return positions
    first, grid = positions[:1], positions[1:].reshape(before, before, -1)
    # jax.image's cubic is Keys' with a = -1/2, which torch's antialiased bicubic also is.
    resized = jax.image.resize(grid, (after, after, grid.shape[-1]), "cubic", antialias=True)
    return jnp.concatenate([first, resized.reshape(after * after, -1)])
