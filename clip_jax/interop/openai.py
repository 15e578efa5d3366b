"""OpenAI's `.pt` files: a TorchScript archive in float16 or a plain state dict, from whose shapes the model follows.

Layout: openai/CLIP `clip/clip.py` (load) and `clip/model.py` (build_model).
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from clip_jax.data.images import preprocess_of
from clip_jax.interop.names import Tensors, WeightsError, from_torch, to_torch
from clip_jax.interop.open_clip import CONFIG, TORCH
from clip_jax.interop.torch_file import is_training_checkpoint, read_torch_file
from clip_jax.interop.torch_write import write_torch_file
from clip_jax.interop.weights import HEAD_WIDTH, WIDEST_VIT, Weights, checked_model, default_heads
from clip_jax.models.variants import Activation, ModelConfig


def read_openai(path: Path, activation: Activation | None = None) -> Weights:
    """Reads a `.pt` file without running any of its code; torch is not needed.

    The file says nothing of activation and preprocessing. The latter is taken to be OpenAI's.

    Args:
      path: the file.
      activation: the model's; None means QuickGELU, as in all that OpenAI released. For a trainer's checkpoint it must
        be given: open_clip's own models have GELU unless their name says otherwise.

    Raises:
      WeightsError, TorchFileError: not such a file, or not the weights of a CLIP model, or one whose activation must be
        given.
    """
    if activation is None and is_training_checkpoint(path):
        raise WeightsError(
            f"{path} is a trainer's checkpoint, which does not say whether the model has quick_gelu or gelu (of "
            "open_clip's, those with -quickgelu in their names have the former); say it with activation= of "
            f"clip_jax.load, or once: clip-jax export {path} FOLDER --layout=open_clip --activation=gelu"
        )
    tensors = read_torch_file(path)
    config = dataclasses.replace(infer_config(tensors, where=path), activation=activation or "quick_gelu")
    _check_sizes(tensors, config, path)
    variables = from_torch(tensors, config, "openai", where=path)
    return Weights(config, variables, preprocess_of(config))


def write_openai(path: Path, weights: Weights) -> None:
    """Writes a plain state dict in float32, which `clip.load` and open_clip's `load_openai_model` read.

    Raises:
      WeightsError: a model of which the layout cannot tell: other heads, activation, preprocessing, logits or MLPs than
        OpenAI's.
    """
    config = weights.config
    for wrong, what in (
        (not default_heads(config), f"attention heads of {HEAD_WIDTH} channels and ViTs at most {WIDEST_VIT} wide"),
        (config.activation != "quick_gelu", "QuickGELU"),
        (weights.preprocess != preprocess_of(config), "OpenAI's mean and deviation of pixels"),
        (config.logit_bias, "logits without a bias"),
        (_has_other_mlps(config), "MLPs four times as wide as their tower"),
    ):
        if wrong:
            raise WeightsError(f"OpenAI's layout takes {what} for granted, and this model has another; use open_clip's")
    write_torch_file(path, to_torch(weights.variables, "openai"))


def infer_config(tensors: Tensors, *, where: object) -> ModelConfig:
    """Returns the sizes that the shapes of OpenAI's tensors imply.

    Args:
      tensors: by OpenAI's names.
      where: the file, for messages.

    Raises:
      WeightsError: not the tensors of a CLIP model.
    """
    try:
        width = tensors["ln_final.weight"].shape[0]
        text = {
            "width": width,
            "heads": width // HEAD_WIDTH,
            "layers": _count(tensors, r"transformer\.resblocks\.(\d+)\."),
            "context": tensors["positional_embedding"].shape[0],
            "vocab_size": tensors["token_embedding.weight"].shape[0],
            "mlp_width": _mlp_width(tensors, ""),
        }
        vision = _infer_vit(tensors) if "visual.proj" in tensors else _infer_resnet(tensors)
        values = {"embed_dim": tensors["text_projection"].shape[1], "vision": vision, "text": text}
        values["logit_bias"] = "logit_bias" in tensors  # open_clip's, for the sigmoid loss
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(f"{where} does not hold a CLIP model in OpenAI's layout: no usable {error}") from None
    config = checked_model(values, where=where)
    if not default_heads(config):
        raise WeightsError(
            f"{where} does not say how many attention heads there are. OpenAI's have {HEAD_WIDTH} channels, and this "
            f"image tower is {config.vision.width} wide and this text tower {config.text.width}, not a multiple of "
            f"that, or a ViT wider than {WIDEST_VIT}, of which open_clip's have others; give a folder with this file "
            f"as {TORCH} beside the model's {CONFIG}"
        )
    return config


def _infer_vit(tensors: Tensors) -> dict[str, Any]:
    width, _, _, patch = tensors["visual.conv1.weight"].shape
    grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
    layers = _count(tensors, r"visual\.transformer\.resblocks\.(\d+)\.")
    sizes = {"image_size": grid * patch, "patch": patch, "width": width, "heads": width // HEAD_WIDTH}
    return sizes | {"layers": layers, "kind": "vit", "mlp_width": _mlp_width(tensors, "visual.")}


def _infer_resnet(tensors: Tensors) -> dict[str, Any]:
    width = tensors["visual.layer1.0.conv1.weight"].shape[0]
    grid = math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
    layers = tuple(_count(tensors, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    sizes = {"image_size": 32 * grid, "width": width, "heads": 32 * width // HEAD_WIDTH}
    return sizes | {"layers": layers, "kind": "resnet"}


def _has_other_mlps(config: ModelConfig) -> bool:
    return any(getattr(tower, "mlp_width", 0) for tower in (config.vision, config.text))


def _mlp_width(tensors: Tensors, tower: str) -> int:
    return tensors[f"{tower}transformer.resblocks.0.mlp.c_fc.weight"].shape[0]


def _count(tensors: Tensors, pattern: str) -> int:
    """Returns how many different numbers the pattern finds in the names."""
    return len({match[1] for match in map(re.compile(pattern).match, tensors) if match})


def _check_sizes(tensors: Tensors, config: ModelConfig, where: Path) -> None:
    """Compares the sizes that OpenAI's archives state with those that the shapes imply."""
    implied = {
        "input_resolution": config.vision.image_size,
        "context_length": config.text.context,
        "vocab_size": config.text.vocab_size,
    }
    for name, value in implied.items():
        stated = int(tensors[name].reshape(-1)[0]) if name in tensors and tensors[name].size == 1 else value
        if stated != value:
            raise WeightsError(f"{where}: {name} says {stated}, and the weights' shapes say {value}")
