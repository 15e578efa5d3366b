"""CLIP: an image tower and a text tower into one embedding space, and a learnt temperature (paper, figure 3)."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.array_types import Array, Float, Int
from clip_jax.errors import UserError
from clip_jax.models.text import TextTransformer
from clip_jax.models.variants import ModelConfig, ResNetConfig, ViTConfig, model_config, variant_name
from clip_jax.models.vit import VisionTransformer


class CLIPOutput(NamedTuple):
    """Unit features of a batch of pairs, and exp(logit_scale); all float32 or wider."""

    image: Float[Array, "b e"]
    text: Float[Array, "b e"]
    scale: Float[Array, ""]


class CLIP(nn.Module):
    """Two towers and `logit_scale`, a scalar parameter that starts at ln(1/temperature).

    Images are float [b, s, s, 3], already normalised (`clip_jax.data.images.normalize`); tokens are int32 [b, l], as
    `clip_jax.tokenize` gives them. `forward`, `image_features` and `text_features` below apply it to parameters.
    Named intermediates of both towers come back with
    `model.apply(variables, images, tokens, mutable=["intermediates"])`.
    """

    config: ModelConfig

    def __post_init__(self) -> None:
        if isinstance(self.config.vision, ResNetConfig):
            raise UserError(f"{variant_name(self.config)}: the ResNet image tower is not built yet; the ViT models are")
        super().__post_init__()

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        vision = cast(ViTConfig, config.vision)
        self.image = VisionTransformer(vision, config.embed_dim, config.init, dtype)
        self.text = TextTransformer(config.text, config.embed_dim, dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(-math.log(config.temperature)), ())

    def __call__(self, images: Float[Array, "b s s 3"], tokens: Int[Array, "b l"]) -> CLIPOutput:
        """Returns the unit features of both towers and exp(logit_scale)."""
        return CLIPOutput(
            self.encode_image(images, normalize=True),
            self.encode_text(tokens, normalize=True),
            jnp.exp(self.logit_scale),
        )

    def encode_image(self, images: Float[Array, "b s s 3"], *, normalize: bool = False) -> Float[Array, "b e"]:
        """Embeds normalised images; with `normalize` the result has unit length."""
        features = _at_least_f32(self.image(images))
        return unit(features) if normalize else features

    def encode_text(self, tokens: Int[Array, "b l"], *, normalize: bool = False) -> Float[Array, "b e"]:
        """Embeds rows of token ids; with `normalize` the result has unit length."""
        features = _at_least_f32(self.text(tokens))
        return unit(features) if normalize else features


def create_model(
    name: str,
    *,
    init: Literal["released", "scaled"] = "released",
    dtype: Literal["bfloat16", "float32", "float64"] = "float32",
) -> CLIP:
    """Returns one of the paper's models as a Linen module; `init_params` makes its parameters.

    Args:
      name: `ViT-B/32`, `ViT-B/16`, `ViT-L/14` or `ViT-L/14@336`.
      init: `released`, as openai/CLIP initialises, or `scaled`, the text tower's scheme on the ViT too.
      dtype: dtype of activations and products; parameters are float32.

    Raises:
      UserError: no model of that name, or one whose image tower is not built yet.

    Example:
      >>> model = create_model("ViT-B/32")
      >>> params = init_params(model, jax.random.key(0))
      >>> features = model.apply({"params": params}, images, method="encode_image")
    """
    return CLIP(dataclasses.replace(model_config(name), init=init, dtype=dtype))


def init_params(model: CLIP, key: jax.Array) -> dict[str, Any]:
    """Returns the model's parameters, plain nested dicts of float32; pure, so it can be traced and sharded."""
    config = model.config
    images = jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3))
    tokens = jnp.zeros((1, config.text.context), jnp.int32)
    return dict(model.init(key, images, tokens)["params"])


def forward(model: CLIP, params: dict[str, Any], images: jax.Array, tokens: jax.Array) -> CLIPOutput:
    """Applies both towers; see `CLIP.__call__`."""
    return cast(CLIPOutput, model.apply({"params": params}, images, tokens))


def image_features(model: CLIP, params: dict[str, Any], images: Float[Array, "b s s 3"]) -> Float[Array, "b e"]:
    """Returns the unit features of normalised images."""
    return cast(jax.Array, model.apply({"params": params}, images, normalize=True, method="encode_image"))


def text_features(model: CLIP, params: dict[str, Any], tokens: Int[Array, "b l"]) -> Float[Array, "b e"]:
    """Returns the unit features of rows of token ids."""
    return cast(jax.Array, model.apply({"params": params}, tokens, normalize=True, method="encode_text"))


def unit(features: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Scales vectors to unit length, without an epsilon, as openai/CLIP does."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def _at_least_f32(features: jax.Array) -> jax.Array:
    return features.astype(jnp.promote_types(features.dtype, jnp.float32))
