"""CLIP in JAX: train it, evaluate it, take it elsewhere.

The public names load on first use, so that `clip-jax --help` and the config files do not wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_jax.data.tokenizer import tokenize
    from clip_jax.models.clip import CLIP, create_model, init_variables
    from clip_jax.pretrained import load

__version__ = "0.1.0"
__all__ = ["CLIP", "create_model", "init_variables", "load", "tokenize"]

_HOMES = {
    "CLIP": "clip_jax.models.clip",
    "create_model": "clip_jax.models.clip",
    "init_variables": "clip_jax.models.clip",
    "load": "clip_jax.pretrained",
    "tokenize": "clip_jax.data.tokenizer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'clip_jax' has no attribute {name!r} (it has {', '.join(__all__)})")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
