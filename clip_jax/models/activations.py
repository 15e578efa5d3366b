"""What a transformer's MLPs apply between their layers.

Derivatives are computed from the argument alone. In a program for CPUs a wall (`clip_jax.fences`) stands between the
passes: without it that platform's compiler takes the sigmoid from the forward pass, and so keeps it for every block.
Other compilers choose for themselves.
"""

import jax

from clip_jax.array_types import Array, Float
from clip_jax.fences import anew


@anew
def quick_gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns x·sigmoid(1.702x), CLIP's activation (openai/CLIP `clip/model.py`, QuickGELU)."""
    return x * jax.nn.sigmoid(1.702 * x)


@anew
def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns x·Φ(x), the exact GELU, as the models have that open_clip trained (Hendrycks & Gimpel, 2016)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
