"""A trained model in one object: its encoders jitted, its preprocessing and its tokenizer beside them."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from clip_jax.array_types import Array, Float
from clip_jax.config import NOT_SIZES
from clip_jax.data.images import Images, as_list
from clip_jax.data.tokenizer import Captions, tokenize
from clip_jax.errors import UserError
from clip_jax.interop.read import read_weights
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, unit
from clip_jax.models.norm import LayerNorm
from clip_jax.models.variants import VOCABULARY, Activation, ModelConfig, ResNetConfig, model_config
from clip_jax.rules import leaf_paths

_AT_ONCE = 64  # images or texts that `embed_images` and `embed_texts` have in memory


class Pretrained:
    """A model with its weights, as `clip_jax.load` gives it; each batch size compiles once.

    Attributes:
      model: the Linen module.
      variables: `params` and `batch_stats`, float32 arrays on the default device.
      preprocess: images (PIL, path, bytes, uint8 [h, w, 3], or a list of these) to float32 [s, s, 3] or [b, s, s, 3].
    """

    def __init__(self, weights: Weights) -> None:
        self.model = CLIP(weights.config)
        self.variables = jax.tree.map(jnp.asarray, weights.variables)
        self.preprocess = weights.preprocess

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return self.model.config

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, nested dicts."""
        return self.variables["params"]

    @property
    def scale(self) -> Float[Array, ""]:
        """exp(logit_scale), by which cosines are multiplied before a softmax."""
        return jnp.exp(self.params["logit_scale"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of a SHA-256 over sizes, activation, preprocessing and weights.

        Embeddings can be compared where it is the same.
        """
        config: dict[str, Any] = dataclasses.asdict(self.config)
        sizes = {name: value for name, value in config.items() if name not in NOT_SIZES}
        for tower in (sizes["vision"], sizes["text"]):
            tower.pop("mlp_width", None)  # came later, and the weights say it
        about = {"model": sizes, "preprocess": self.preprocess.to_dict(), "leaves": leaf_paths(self.variables)}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for leaf in jax.tree.leaves(self.variables):
            digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()[:16]

    def encode_image(self, images: ArrayLike, *, normalize: bool = False) -> Float[Array, "b e"]:
        """Embeds images.

        Args:
          images: float [b, s, s, 3], as `preprocess` gives them.
          normalize: give features of unit length.

        Raises:
          UserError: another shape, or pixels that are not preprocessed.
        """
        images = self._checked_images(images)
        return _features(self.model, self.variables, images, method="encode_image", normalize=normalize)

    def encode_text(self, tokens: ArrayLike, *, normalize: bool = False) -> Float[Array, "b e"]:
        """Embeds rows of token ids.

        Args:
          tokens: int [b, l], as `tokenize` gives them; l is at most the model's context.
          normalize: give features of unit length.

        Raises:
          UserError: another shape or type, or ids that the model does not know.
        """
        tokens = self._checked_tokens(tokens)
        return _features(self.model, self.variables, tokens, method="encode_text", normalize=normalize)

    def embed_images(self, images: Images) -> np.ndarray:
        """Returns features of unit length, float [n, e]; a single image is a list of one.

        Args:
          images: as `preprocess` takes them. A few are decoded at a time: the pixels of all need not fit in memory.

        Raises:
          ImageError: what is no image.
        """
        images, parts = as_list(images), []
        for first in range(0, max(len(images), 1), _AT_ONCE):
            pixels = self.preprocess(images[first : first + _AT_ONCE], first=first)
            parts.append(np.asarray(self.encode_image(pixels, normalize=True)))
        return np.concatenate(parts)

    def embed_texts(self, texts: Captions) -> np.ndarray:
        """Returns features of unit length, float [n, e], of one text or several; a few are embedded at a time.

        Raises:
          UserError: as `tokenize`.
        """
        tokens = self.tokenize(texts)
        rows = (tokens[first : first + _AT_ONCE] for first in range(0, max(len(tokens), 1), _AT_ONCE))
        return np.concatenate([np.asarray(self.encode_text(part, normalize=True)) for part in rows])

    def text_states(self, tokens: ArrayLike, *, layer: int = -2, norm: bool = False) -> Float[Array, "b l w"]:
        """Returns the text tower's stream at every token, by which models that draw from text are guided.

        Stable Diffusion 1 takes `layer=-1, norm=True`; SDXL and most with "clip skip" the default, the one before.

        Args:
          tokens: as for `encode_text`; what stands behind EOT has a state too.
          layer: after which block; -1 is the last one.
          norm: apply the tower's final LayerNorm.

        Raises:
          UserError: no such block, or tokens that `encode_text` refuses.
        """
        number = _block(layer, self.config.text.layers)
        states = _states(self.model, self.variables, self._checked_tokens(tokens), tower="text", block=number)
        if not norm:
            return states
        module = LayerNorm(states.dtype, name="ln_final")
        return cast(jax.Array, module.apply({"params": self.params["text"]["ln_final"]}, states))

    def image_states(self, images: ArrayLike, *, layer: int = -2) -> Float[Array, "b n w"]:
        """Returns a ViT's stream at every token: the class token first, then the patches row by row.

        Models that answer questions on images take the patches before the last block (LLaVA: `[:, 1:]` of the default).

        Args:
          images: as for `encode_image`.
          layer: after which block; -1 is the last one.

        Raises:
          UserError: no such block, or a ResNet, which has none; or images that `encode_image` refuses.
        """
        vision = self.config.vision
        if isinstance(vision, ResNetConfig):
            raise UserError("image_states is for ViTs: a ResNet has no tokens; see model.model for its feature maps")
        number = _block(layer, vision.layers)
        return _states(self.model, self.variables, self._checked_images(images), tower="image", block=number)

    def tokenize(self, texts: Captions) -> np.ndarray:
        """Returns int32 [b, context]; a single text is a batch of one, and what is too long is cut.

        Raises:
          UserError: a model with fewer tokens than CLIP's tokenizer, whose features would be no numbers.
        """
        text = self.config.text
        if text.vocab_size < VOCABULARY:
            raise UserError(
                f"the model knows {text.vocab_size:,} tokens, and CLIP's tokenizer has {VOCABULARY:,}; its texts need "
                "a tokenizer of their own"
            )
        return tokenize(texts, context=text.context)

    def _checked_images(self, images: ArrayLike) -> jax.Array:
        images, side = jnp.asarray(images), self.config.vision.image_size
        shape_fits = images.ndim == 4 and images.shape[1:] == (side, side, 3) and len(images)
        if not shape_fits or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images are {images.dtype} {list(images.shape)}; the model needs floats [b, {side}, {side}, 3], as "
                "model.preprocess gives them for a list of images"
            )
        return images

    def _checked_tokens(self, given: ArrayLike) -> jax.Array:
        tokens, text = jnp.asarray(given), self.config.text
        shape_fits = tokens.ndim == 2 and tokens.shape[1] <= text.context and tokens.size
        if not shape_fits or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(
                f"tokens are {tokens.dtype} {list(tokens.shape)}; the model needs integers [b, {text.context}], as "
                "model.tokenize gives them for one text or several"
            )
        if not isinstance(tokens, jax.core.Tracer):  # within a program their values are not known
            ids = np.asarray(given)
            least, most = ids.min(), ids.max()
            if not 0 <= least <= most < text.vocab_size:
                raise UserError(
                    f"tokens are from {least} to {most}, and the model knows 0 to {text.vocab_size - 1}; they are "
                    "another tokenizer's"
                )
        return tokens


def load(
    source: str | Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    activation: Activation | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Pretrained:
    """Loads trained weights: OpenAI's, open_clip's, Hugging Face's, or those of a run.

    Args:
      source: a `.pt` file in OpenAI's layout, a folder in open_clip's or Hugging Face's, a run's workdir or one of its
        checkpoints (`runs/b32/checkpoints/12000`), a model's name such as `ViT-B/32` (OpenAI's weights, downloaded
        once), or `hf-hub:owner/name`; a file, folder or run may also be a URL, such as `gs://bucket/runs/b32`. Pickles
        are read without running them.
      model: refuse any other model than this one of the paper's.
      image_size: side of the images in pixels, where it is to differ; positions are then resized, before `model` is
        compared.
      activation: `quick_gelu` or `gelu`, where the source is a `.pt` file, which does not say it. A trainer's
        checkpoint (open_clip's `epoch_32.pt`) is refused without; any other is taken to have OpenAI's, `quick_gelu`.
      dtype: of activations and products; parameters are float32.

    Raises:
      UserError: nothing there, damaged, or another model.

    Example:
      >>> model = clip_jax.load("ViT-B/32")
      >>> features = model.encode_image(model.preprocess(["cat.jpg"]), normalize=True)
    """
    expect = None if model is None else model_config(model)
    weights = read_weights(source, expect=expect, image_size=image_size, activation=activation)
    config = dataclasses.replace(weights.config, dtype=dtype)
    return Pretrained(dataclasses.replace(weights, config=config))


@functools.partial(jax.jit, static_argnames=("model", "method", "normalize"))
def _features(model: CLIP, variables: dict[str, Any], inputs: jax.Array, *, method: str, normalize: bool) -> jax.Array:
    features = cast(jax.Array, model.apply(variables, inputs, method=method))
    return unit(features) if normalize else features


def _block(layer: int, layers: int) -> int:
    """Returns the number of the block that `layer` means, counted from the end where it is negative."""
    if not -layers <= layer < layers:
        raise UserError(f"layer={layer}: the tower has {layers} blocks, 0 to {layers - 1}, or -1 to {-layers}")
    return layer % layers


@functools.partial(jax.jit, static_argnames=("model", "tower", "block"))
def _states(model: CLIP, variables: dict[str, Any], inputs: jax.Array, *, tower: str, block: int) -> jax.Array:
    kept: Any = model.apply(variables, inputs, method=f"encode_{tower}", mutable=["intermediates"])[1]
    return kept["intermediates"][tower]["transformer"][f"block_{block}"]["output"]
