"""open_clip's model with our sizes and weights, and random batches for both."""

import dataclasses

import jax
import numpy as np
from random_weights import random_like
from references import import_open_clip

from clip_jax.data.images import Preprocess
from clip_jax.interop.names import to_torch
from clip_jax.interop.open_clip import config_to_open_clip
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.variants import ModelConfig, ResNetConfig, TextConfig, ViTConfig

# As small as a model can be that has every part: two blocks a tower, a bottleneck with and one without a shortcut. The
# ViT's MLPs have other widths than the paper's.
SMALL_VIT = ModelConfig(
    embed_dim=24,
    vision=ViTConfig(image_size=32, patch=8, width=64, heads=2, layers=2, mlp_width=315),
    text=TextConfig(width=32, heads=2, layers=2, context=12, vocab_size=96, mlp_width=75),
)
SMALL_RESNET = ModelConfig(
    embed_dim=24,
    vision=ResNetConfig(image_size=64, width=16, heads=8, layers=(1, 2, 1, 1)),
    text=dataclasses.replace(SMALL_VIT.text, mlp_width=0),
)


def random_variables(config: ModelConfig, *, dtype=np.float64):
    """Random variables for a model; see `random_like`."""
    return random_like(jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0))), dtype=dtype)


def random_batch(config: ModelConfig, batch: int, *, dtype=np.float64, seed=1):
    """Returns (images [b, s, s, 3], tokens int32 [b, context] with EOT, the last id, at different places)."""
    rng = np.random.default_rng(seed)
    size, text = config.vision.image_size, config.text
    tokens = rng.integers(1, text.vocab_size - 2, (batch, text.context)).astype(np.int32)
    tokens[:, 0] = text.vocab_size - 2
    for row, end in zip(tokens, rng.integers(2, text.context, batch), strict=True):
        row[end], row[end + 1 :] = text.vocab_size - 1, 0
    return rng.standard_normal((batch, size, size, 3)).astype(dtype), tokens


def torch_clip(config: ModelConfig, variables=None):
    """Returns open_clip's model in evaluation mode, of the variables' dtype; without variables, as it initialises."""
    import_open_clip()
    import torch
    from open_clip import model as open_clip_model

    described = config_to_open_clip(Weights(config, {}, Preprocess(size=config.vision.image_size)))
    model = open_clip_model.CLIP(**described["model_cfg"]).eval()
    if variables is not None:
        tensors = {name: torch.tensor(tensor) for name, tensor in to_torch(variables, "openai").items()}
        model = model.to(tensors["logit_scale"].dtype)
        model.load_state_dict(tensors)
    return model


def torch_images(images):
    """Returns NHWC images as torch's NCHW."""
    import torch

    return torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def torch_features(model, images, tokens):
    """Returns unit features of open_clip's model as NumPy arrays."""
    import torch

    with torch.no_grad():
        image = model.encode_image(torch_images(images), normalize=True)
        return image.numpy(), model.encode_text(torch.tensor(tokens), normalize=True).numpy()
