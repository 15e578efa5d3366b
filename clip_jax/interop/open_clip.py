"""Folders in open_clip's layout: `open_clip_config.json` beside safetensors, or beside an older `.bin`.

Layout: open_clip `factory.py` (`local-dir:`, `hf-hub:`) and `model.py` (CLIPVisionCfg, CLIPTextCfg). Keys that ask for
another architecture than CLIP's are refused by name; keys that change nothing in evaluation are passed over.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.data.images import Preprocess, preprocess_of
from clip_jax.interop.names import WeightsError, from_torch, to_torch
from clip_jax.interop.torch_file import read_torch_file
from clip_jax.interop.weights import (
    HEAD_WIDTH,
    Weights,
    check_activation,
    checked_model,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from clip_jax.models.variants import ModelConfig, TextConfig, ViTConfig

CONFIG = "open_clip_config.json"
SAFETENSORS = "open_clip_model.safetensors"
TORCH = "open_clip_pytorch_model.bin"

# The values of further keys with which a model is still CLIP.
_ANY = object()
_NEUTRAL_MODEL = {
    "init_logit_scale": _ANY,
    "nonscalar_logit_scale": False,
    "custom_text": False,
    "force_custom_text": False,
    "cast_dtype": _ANY,
    "output_dict": _ANY,
}
_NEUTRAL_VISION = {
    "ls_init_value": None,
    "patch_dropout": _ANY,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "timm_model_name": None,
}
_NEUTRAL_TEXT = {
    "ls_init_value": None,
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
    "hf_model_name": None,
    "embed_cls": False,
    "pad_id": _ANY,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
}


def read_open_clip(folder: Path) -> Weights:
    """Reads a folder; neither torch nor open_clip is needed.

    Raises:
      WeightsError, TorchFileError: a file is missing or damaged, or holds another model than its config says.
    """
    values = read_json(folder / CONFIG)
    config, preprocess = config_from_open_clip(values, where=folder / CONFIG)
    metadata: dict[str, str] = {}
    if (path := folder / SAFETENSORS).exists():
        tensors, metadata = read_safetensors(path)
    elif (path := folder / TORCH).exists():
        tensors = read_torch_file(path)
    else:
        raise WeightsError(f"{folder} has neither {SAFETENSORS} nor {TORCH} beside its {CONFIG}")
    check_activation(metadata, config.activation, where=path)
    return Weights(config, from_torch(tensors, config, "openai", where=path), preprocess)


def write_open_clip(folder: Path, weights: Weights) -> None:
    """Writes a folder that `open_clip.create_model_and_transforms("local-dir:…")` reads, and the Hub's loaders too."""
    write_json(folder / CONFIG, config_to_open_clip(weights))
    write_safetensors(
        folder / SAFETENSORS, to_torch(weights.variables, "openai"), format="pt", activation=weights.config.activation
    )


def config_from_open_clip(values: Mapping[str, Any], *, where: object) -> tuple[ModelConfig, Preprocess]:
    """Returns the model and preprocessing of an `open_clip_config.json`.

    Args:
      values: the file's object.
      where: the file, for messages.

    Raises:
      WeightsError: a missing key, or one that asks for something that is not CLIP.
    """
    try:
        model = dict(values["model_cfg"])
        vision, text = dict(model.pop("vision_cfg")), dict(model.pop("text_cfg"))
        sizes = {
            "embed_dim": model.pop("embed_dim"),
            "vision": _vision_from(vision),
            "text": _text_from(text),
            "activation": "quick_gelu" if model.pop("quick_gelu", False) else "gelu",
        }
        if (bias := model.pop("init_logit_bias", None)) is not None:
            sizes |= {"logit_bias": True, "initial_bias": float(bias)}
        config = checked_model(sizes, where=where)
        preprocess = _preprocess_from(dict(values.get("preprocess_cfg", {})), config, where)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{where} does not describe a CLIP model: {type(error).__name__} {error}") from None
    for section, rest, neutral in (
        ("model_cfg", model, _NEUTRAL_MODEL),
        ("vision_cfg", vision, _NEUTRAL_VISION),
        ("text_cfg", text, _NEUTRAL_TEXT),
    ):
        _check_neutral(section, rest, neutral, where)
    return config, preprocess


def config_to_open_clip(weights: Weights) -> dict[str, Any]:
    """Returns the object of an `open_clip_config.json`."""
    config = weights.config
    vision, text = config.vision, config.text
    sizes: dict[str, Any] = {"image_size": vision.image_size, "layers": vision.layers, "width": vision.width}
    if isinstance(vision, ViTConfig):
        sizes |= {"patch_size": vision.patch, "head_width": vision.width // vision.heads} | _mlp_ratio(vision)
    else:
        sizes |= {"layers": list(vision.layers), "patch_size": None, "head_width": 32 * vision.width // vision.heads}
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            **({"init_logit_bias": config.initial_bias} if config.logit_bias else {}),
            "vision_cfg": sizes,
            "text_cfg": {
                "context_length": text.context,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
            }
            | _mlp_ratio(text),
        },
        "preprocess_cfg": {
            "mean": list(weights.preprocess.mean),
            "std": list(weights.preprocess.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def _vision_from(vision: dict[str, Any]) -> dict[str, Any]:
    size, layers, width = vision.pop("image_size", 224), vision.pop("layers", 12), vision.pop("width", 768)
    head, patch = vision.pop("head_width", HEAD_WIDTH), vision.pop("patch_size", 16)
    side = size[0] if isinstance(size, list | tuple) and size[0] == size[1] else size
    sizes = {"image_size": side, "layers": layers, "width": width}
    mlp = _mlp_width(vision, width)
    if isinstance(layers, list | tuple):
        return sizes | {"kind": "resnet", "heads": 32 * width // head}
    return sizes | {"kind": "vit", "heads": width // head, "patch": patch, "mlp_width": mlp}


def _text_from(text: dict[str, Any]) -> dict[str, Any]:
    defaults = {"width": 512, "heads": 8, "layers": 12, "context_length": 77, "vocab_size": 49_408}
    sizes = {key: text.pop(key, default) for key, default in defaults.items()}
    return sizes | {"context": sizes.pop("context_length"), "mlp_width": _mlp_width(text, sizes["width"])}


def _mlp_width(section: dict[str, Any], width: int) -> int:
    """Takes a tower's ratio, and returns what open_clip makes of it."""
    ratio = section.pop("mlp_ratio", 4.0)
    if not (channels := math.floor(width * ratio)):
        raise ValueError(f"mlp_ratio {ratio} leaves no channel")
    return channels


def _mlp_ratio(sizes: ViTConfig | TextConfig) -> dict[str, float]:
    """Returns the ratio of which `_mlp_width` makes this width, where it is not 4, which goes without saying."""
    if not sizes.mlp_width:
        return {}
    ratio = sizes.mlp_width / sizes.width
    return {"mlp_ratio": ratio if int(sizes.width * ratio) == sizes.mlp_width else math.nextafter(ratio, math.inf)}


def _preprocess_from(values: dict[str, Any], config: ModelConfig, where: object) -> Preprocess:
    default = preprocess_of(config)
    mean, std = (values.pop(key, None) or getattr(default, key) for key in ("mean", "std"))
    neutral = {"size": _ANY, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": _ANY}
    _check_neutral("preprocess_cfg", values, neutral, where)
    (r, g, b), (r_std, g_std, b_std) = (map(float, three) for three in (mean, std))
    return Preprocess(size=default.size, mean=(r, g, b), std=(r_std, g_std, b_std))


def _check_neutral(section: str, rest: Mapping[str, Any], neutral: Mapping[str, Any], where: object) -> None:
    for key, value in rest.items():
        if neutral.get(key, None) is not _ANY and value != neutral.get(key, None) and value is not None:
            raise WeightsError(f"{where}: {section}.{key} is {value!r}, which CLIP's architecture does not have")
