"""Folders in Hugging Face's layout: a CLIPModel's `config.json`, safetensors, preprocessor and tokenizer files.

Layout: `transformers` `models/clip/`. It knows ViTs only. Keys that a config leaves out have CLIPConfig's defaults.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizer import END, START, Tokenizer, vocabulary
from clip_jax.interop.names import WeightsError, from_torch, to_torch
from clip_jax.interop.torch_file import read_torch_file
from clip_jax.interop.weights import (
    Weights,
    check_activation,
    checked_model,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from clip_jax.models.variants import ModelConfig, ViTConfig, mlp_width

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # what CLIPProcessor writes since transformers 5
SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files
TORCH = "pytorch_model.bin"

_TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49_408,
    "eos_token_id": END,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_BICUBIC = 3  # PIL's number
_START, _END = "<|startoftext|>", "<|endoftext|>"


def read_hugging_face(folder: Path) -> Weights:
    """Reads a folder; neither torch nor transformers is needed.

    Raises:
      WeightsError, TorchFileError: a file is missing or damaged, or holds another model than its config says.
    """
    config = config_from_hugging_face(read_json(folder / CONFIG), where=folder / CONFIG)
    metadata: dict[str, str] = {}
    if (path := folder / SAFETENSORS).exists():
        tensors, metadata = read_safetensors(path)
    elif (path := folder / INDEX).exists():
        tensors = _read_shards(path)
    elif (path := folder / TORCH).exists():
        tensors = read_torch_file(path)
    else:
        raise WeightsError(f"{folder} has none of {SAFETENSORS}, {INDEX} and {TORCH} beside its {CONFIG}")
    check_activation(metadata, config.activation, where=path)
    spec, values = _image_processor(folder)
    preprocess = preprocess_from_hugging_face(values, size=config.vision.image_size, where=spec)
    return Weights(config, from_torch(tensors, config, "hugging_face", where=path), preprocess)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of all files that an index names; they lie beside it."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in files.values()
    ):
        raise WeightsError(f"{index} has no weight_map that names the files beside it")
    shards = [read_safetensors(index.parent / name)[0] for name in sorted(set(files.values()))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def write_hugging_face(folder: Path, weights: Weights) -> None:
    """Writes a folder that `transformers` loads offline: CLIPModel, CLIPImageProcessor and CLIPTokenizer.

    Raises:
      WeightsError: a ResNet or a logit_bias, which CLIPModel does not have.
    """
    if not isinstance(weights.config.vision, ViTConfig):
        raise WeightsError("Hugging Face's CLIPModel has no ResNets; export to open_clip's layout instead")
    if weights.config.logit_bias:
        raise WeightsError("Hugging Face's CLIPModel has no logit_bias; export to open_clip's layout instead")
    write_json(folder / CONFIG, config_to_hugging_face(weights.config))
    write_json(folder / PREPROCESSOR, preprocess_to_hugging_face(weights.preprocess))
    write_safetensors(
        folder / SAFETENSORS,
        to_torch(weights.variables, "hugging_face"),
        format="pt",
        activation=weights.config.activation,
    )
    if weights.config.text.vocab_size == Tokenizer.vocab_size:
        _write_tokenizer(folder, context=weights.config.text.context)


def config_from_hugging_face(values: Mapping[str, Any], *, where: object) -> ModelConfig:
    """Returns the model of a CLIPModel's `config.json`.

    Args:
      values: the file's object.
      where: the file, for messages.

    Raises:
      WeightsError: not a CLIP model, or one with sizes or activations that CLIP does not have.
    """
    if values.get("model_type") != "clip":
        raise WeightsError(f"{where}: model_type is {values.get('model_type')!r}, not 'clip'")
    text = _section(values, "text_config", _TEXT_DEFAULTS, where)
    vision = _section(values, "vision_config", _VISION_DEFAULTS, where)
    if text["hidden_act"] != vision["hidden_act"]:
        raise WeightsError(
            f"{where}: hidden_act is {text['hidden_act']!r} in text_config and {vision['hidden_act']!r} in "
            "vision_config; CLIP has one activation"
        )
    sizes = {
        "embed_dim": values.get("projection_dim", 512),
        "vision": {
            "kind": "vit",
            "image_size": vision["image_size"],
            "patch": vision["patch_size"],
            "width": vision["hidden_size"],
            "heads": vision["num_attention_heads"],
            "layers": vision["num_hidden_layers"],
            "mlp_width": vision["intermediate_size"],
        },
        "text": {
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "context": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "mlp_width": text["intermediate_size"],
        },
        "activation": text["hidden_act"],
    }
    config, end = checked_model(sizes, where=where), text["eos_token_id"]
    if end not in (END, config.text.vocab_size - 1, 2):  # of 2, transformers makes the row's largest id
        raise WeightsError(
            f"{where}: text_config.eos_token_id is {end!r}; CLIP's captions end with the tokenizer's {END}, or the "
            "largest id"
        )
    return config


def config_to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Returns the `config.json` of a ViT's CLIPModel."""
    vision, text = config.vision, config.text
    assert isinstance(vision, ViTConfig)
    shared = {"projection_dim": config.embed_dim, "hidden_act": config.activation, "layer_norm_eps": 1e-5}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": shared
        | {
            "model_type": "clip_text_model",
            "hidden_size": text.width,
            "intermediate_size": mlp_width(text),
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "max_position_embeddings": text.context,
            "vocab_size": text.vocab_size,
            # END is the vocabulary's last id; 2, which OpenAI's own configs have, would mean the row's largest id
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": text.vocab_size - 1,
        },
        "vision_config": shared
        | {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": mlp_width(vision),
            "num_attention_heads": vision.heads,
            "num_hidden_layers": vision.layers,
            "image_size": vision.image_size,
            "patch_size": vision.patch,
            "num_channels": 3,
        },
    }


def preprocess_from_hugging_face(values: Mapping[str, Any], *, size: int, where: object) -> Preprocess:
    """Returns the preprocessing of an image processor's config.

    Args:
      values: its object; what it lacks is CLIP's.
      size: side of the model's input.
      where: the file, for messages.

    Raises:
      WeightsError: another preprocessing than CLIP's: resize the shorter side, cut the centre, rescale, normalise.
    """
    default = Preprocess(size=size)
    for key, allowed in (
        ("size", (size, {"shortest_edge": size})),
        ("crop_size", (size, {"height": size, "width": size})),
        ("resample", (_BICUBIC,)),
        ("rescale_factor", (1 / 255,)),
        *((f"do_{step}", (True,)) for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")),
    ):
        if values.get(key, allowed[0]) not in allowed:
            raise WeightsError(f"{where}: {key} is {values[key]!r}, and CLIP's preprocessing needs {allowed[-1]!r}")
    try:
        mean, std = (
            tuple(map(float, values.get(key) or fallback))
            for key, fallback in (("image_mean", default.mean), ("image_std", default.std))
        )
        (r, g, b), (r_std, g_std, b_std) = mean, std
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{where}: image_mean and image_std must be three numbers each ({error})") from None
    return Preprocess(size=size, mean=(r, g, b), std=(r_std, g_std, b_std))


def preprocess_to_hugging_face(preprocess: Preprocess) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of a preprocessing."""
    size = preprocess.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def _image_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the file that says how pixels are prepared, and what it says; nothing where there is none.

    It is the file that `transformers` takes.
    """
    path = folder / PROCESSOR
    values = read_json(path).get("image_processor") if path.exists() else None
    if isinstance(values, dict):
        return path, values
    path = folder / PREPROCESSOR
    return path, read_json(path) if path.exists() else {}


def _section(config: Mapping[str, Any], section: str, defaults: dict[str, Any], where: object) -> dict[str, Any]:
    values = config.get(f"{section}_dict") or config.get(section) or {}  # older files say it twice; the first counts
    if not isinstance(values, dict):
        raise WeightsError(f"{where}: {section} is {values!r}, not an object")
    values = defaults | values
    if values["intermediate_size"] == 0:
        raise WeightsError(f"{where}: {section}.intermediate_size is 0")
    for key, allowed in (
        ("hidden_act", ("quick_gelu", "gelu")),
        ("layer_norm_eps", (1e-5,)),
        ("num_channels", (3,)),
    ):
        if values.get(key, allowed[0]) not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise WeightsError(f"{where}: {section}.{key} is {values[key]!r}; CLIP's architecture has {choices}")
    return values


def _write_tokenizer(folder: Path, *, context: int) -> None:
    """Writes the files from which CLIPTokenizer and CLIPTokenizerFast build themselves, in all their versions."""
    ids, merges = vocabulary()
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    write_json(folder / "vocab.json", ids | {_START: START, _END: END})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": context, "do_lower_case": True},
    )
