"""CLIP: an image tower and a text tower into one embedding space, and a learnt temperature (paper, figure 3)."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.array_types import Array, Bool, Float, Int
from clip_jax.models.precision import widen
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.text_groups import Groups
from clip_jax.models.variants import ModelConfig, ResNetConfig, model_config
from clip_jax.models.vit import VisionTransformer

Variables = dict[str, Any]


class CLIPOutput(NamedTuple):
    """Unit features of a batch of pairs, exp(logit_scale) and logit_bias (0 without one); all float32 or wider."""

    image: Float[Array, "b e"]
    text: Float[Array, "b e"]
    scale: Float[Array, ""]
    bias: Float[Array, ""]


class CLIP(nn.Module):
    """Two towers and `logit_scale`, a scalar parameter that starts at ln(1/temperature); also `logit_bias`, if wanted.

    Images are float [b, s, s, 3], already normalised (`clip_jax.data.images.normalize`); tokens are int32 [b, l], as
    `clip_jax.tokenize` gives them. `forward`, `image_features` and `text_features` below apply it to variables.
    Named intermediates of both towers come back with
    `model.apply(variables, images, tokens, mutable=["intermediates"])`.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        if isinstance(config.vision, ResNetConfig):
            self.image = ModifiedResNet(config)
        else:
            self.image = VisionTransformer(config)
        self.text = TextTransformer(config)
        constant, bias = nn.initializers.constant, config.initial_bias
        self.logit_scale = self.param("logit_scale", constant(-math.log(config.temperature)), (), jnp.float32)
        self.logit_bias = self.param("logit_bias", constant(bias), (), jnp.float32) if config.logit_bias else None

    def __call__(
        self,
        images: Float[Array, "b s s 3"],
        tokens: Int[Array, "b l"],
        *,
        train: bool = False,
        keys: jax.Array | None = None,
        kept: Bool[Array, " b"] | None = None,
    ) -> CLIPOutput:
        """Returns the unit features of both towers, scale and bias; the options are `encode_image`'s."""
        return CLIPOutput(
            self.encode_image(images, normalize=True, train=train, keys=keys, kept=kept),
            self.encode_text(tokens, normalize=True),
            *self.scale_and_bias(),
        )

    def scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns exp(logit_scale), and logit_bias or 0."""
        bias = jnp.zeros_like(self.logit_scale) if self.logit_bias is None else self.logit_bias
        return jnp.exp(self.logit_scale), bias

    def encode_image(
        self,
        images: Float[Array, "b s s 3"],
        *,
        normalize: bool = False,
        train: bool = False,
        keys: jax.Array | None = None,
        kept: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b e"]:
        """Embeds normalised images.

        Args:
          images: float, normalised.
          normalize: give features of unit length.
          train: let a ResNet's BatchNorms use the batch's statistics and update the running ones, which must then be
            mutable; a ViT has none.
          keys: a random key for each image, by which a ViT drops patches if its config says so; None drops none.
          kept: which images count for the batch's statistics; None means all.
        """
        tower = self.image
        resnet = isinstance(tower, ModifiedResNet)
        features = tower(images, kept, train=train) if resnet else tower(images, keys=keys if train else None)
        features = widen(features)
        return unit(features) if normalize else features

    def encode_text(
        self, tokens: Int[Array, "b l"], *, normalize: bool = False, groups: Groups = ()
    ) -> Float[Array, "b e"]:
        """Embeds rows of token ids; with `normalize` the result has unit length; `groups` as in `TextTransformer`."""
        features = widen(self.text(tokens, groups=groups))
        return unit(features) if normalize else features


def create_model(
    name: str,
    *,
    init: Literal["released", "scaled"] = "released",
    dtype: Literal["bfloat16", "float32", "float64"] = "float32",
) -> CLIP:
    """Returns one of the paper's models as a Linen module; `init_variables` makes its variables.

    Args:
      name: as in the paper, such as `ViT-B/32`, `ViT-L/14@336` or `RN50x4`.
      init: `released`, as openai/CLIP initialises, or `scaled`, the text tower's scheme on the ViT too.
      dtype: dtype of activations and products; parameters are float32.

    Raises:
      UserError: no model of that name.

    Example:
      >>> model = create_model("ViT-B/32")
      >>> variables = init_variables(model, jax.random.key(0))
      >>> features = model.apply(variables, images, method="encode_image")
    """
    return CLIP(dataclasses.replace(model_config(name), init=init, dtype=dtype))


def init_variables(model: CLIP, key: jax.Array) -> Variables:
    """Returns the model's variables, nested dicts of float32; pure, so it can be traced and sharded.

    Returns:
      `params`, and `batch_stats`: the running statistics of a ResNet's BatchNorms, empty for a ViT.
    """
    config = model.config
    images = jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3))
    tokens = jnp.zeros((1, config.text.context), jnp.int32)
    variables = model.init(key, images, tokens)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def forward(model: CLIP, variables: Variables, images: jax.Array, tokens: jax.Array) -> CLIPOutput:
    """Applies both towers as in evaluation; see `CLIP.__call__`."""
    return cast(CLIPOutput, model.apply(variables, images, tokens))


def forward_train(
    model: CLIP,
    variables: Variables,
    images: jax.Array,
    tokens: jax.Array,
    *,
    keys: jax.Array | None = None,
    kept: jax.Array | None = None,
    train_image: bool = True,
) -> tuple[CLIPOutput, dict[str, Any]]:
    """Applies both towers as in training.

    Args:
      model: the towers.
      variables: its variables.
      images: as `CLIP` takes them.
      tokens: as `CLIP` takes them.
      keys: as in `CLIP.encode_image`.
      kept: as in `CLIP.encode_image`.
      train_image: False applies the image tower as in evaluation, for one that is frozen.

    Returns:
      The features, and the updated `batch_stats`.
    """
    image, batch_stats = image_features_train(model, variables, images, keys=keys, kept=kept, train=train_image)
    return CLIPOutput(image, text_features(model, variables, tokens), *scale_and_bias(model, variables)), batch_stats


def image_features_train(
    model: CLIP,
    variables: Variables,
    images: jax.Array,
    *,
    keys: jax.Array | None = None,
    kept: jax.Array | None = None,
    train: bool = True,
) -> tuple[Float[Array, "b e"], dict[str, Any]]:
    """Returns the unit features of normalised images as in training, and the updated `batch_stats`.

    `keys`, `kept` and `train` are as in `CLIP.encode_image`.
    """
    options = {"normalize": True, "train": train, "keys": keys, "kept": kept}
    applied = model.apply(variables, images, **options, method="encode_image", mutable=["batch_stats"])
    features, updated = cast(tuple[jax.Array, dict[str, Any]], applied)
    return features, updated.get("batch_stats", {})


def image_features(model: CLIP, variables: Variables, images: Float[Array, "b s s 3"]) -> Float[Array, "b e"]:
    """Returns the unit features of normalised images."""
    return cast(jax.Array, model.apply(variables, images, normalize=True, method="encode_image"))


def probe_features(model: CLIP, variables: Variables, images: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
    """Returns what linear probes are fitted on (paper, §3.2): a ViT's class token before the projection, a ResNet's
    embedding; not normalised."""
    applied = model.apply(variables, images, method="encode_image", mutable=["intermediates"])
    features, kept = cast(tuple[jax.Array, dict[str, Any]], applied)
    if isinstance(model.config.vision, ResNetConfig):
        return features
    return widen(kept["intermediates"]["image"]["pooled"])


def text_features(
    model: CLIP, variables: Variables, tokens: Int[Array, "b l"], *, groups: Groups = ()
) -> Float[Array, "b e"]:
    """Returns the unit features of rows of token ids; `groups` as in `TextTransformer`."""
    return cast(jax.Array, model.apply(variables, tokens, normalize=True, groups=groups, method="encode_text"))


def scale_and_bias(model: CLIP, variables: Variables) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns exp(logit_scale), and logit_bias or 0."""
    return cast(tuple[jax.Array, jax.Array], model.apply(variables, method="scale_and_bias"))


def unit(features: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Scales vectors to unit length, without an epsilon, as openai/CLIP does."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def count_parameters(params: Any) -> int:
    """Returns the number of parameters; arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
