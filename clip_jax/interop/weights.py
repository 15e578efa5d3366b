"""What every reader of foreign weights gives and every writer takes, and the files that several layouts share."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.config import DataConfig, LossConfig, RunConfig, from_config_dict
from clip_jax.data.images import Preprocess
from clip_jax.errors import ConfigError, one_line
from clip_jax.files import json_object
from clip_jax.interop.names import WeightsError
from clip_jax.interop.torch_file import LFS_POINTER
from clip_jax.models.clip import Variables, count_parameters
from clip_jax.models.variants import ModelConfig, ResNetConfig, TextConfig, ViTConfig, model_config, variant_name

HEAD_WIDTH = 64
"""Channels of an attention head in all of the paper's models; weights do not show it."""
WIDEST_VIT = 1024
"""Of the paper's models. open_clip's wider ones, ViT-H to e, have 16 heads of 80 to 112 channels."""


@dataclass(frozen=True)
class Weights:
    """A model's sizes, its variables (`params` and `batch_stats`, float32 NumPy arrays), and its preprocessing."""

    config: ModelConfig
    variables: Variables
    preprocess: Preprocess


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file.

    Raises:
      WeightsError: not readable, truncated, or not such a file.
    """
    import ml_dtypes  # noqa: F401 (registers bfloat16, which safetensors looks up by name)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise WeightsError(
                    f"{path} is a Git LFS pointer, not the weights themselves; run git lfs pull"
                ) from None
        raise WeightsError(
            f"{path} cannot be read as safetensors: {one_line(error)}; download or copy it again"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {one_line(error)}") from None


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Writes tensors, and as metadata what names and shapes do not say.

    Raises:
      WeightsError: the file cannot be written whole.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=metadata or None)
    except SafetensorError as error:
        raise WeightsError(f"{path} cannot be written: {one_line(error)}; check the disk") from None
    path.chmod(mode)  # the library makes files that only their owner can read


def file_sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
      WeightsError: not readable, or something else.
    """
    try:
        return json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def checked_model(values: Mapping[str, Any], *, where: object) -> ModelConfig:
    """Returns a model from values that a file gave, checked as a run's config is.

    Args:
      values: nested as `ModelConfig`; what is left out has its default.
      where: the file, for messages.

    Raises:
      WeightsError: a wrong type, or sizes of which no model can be made.
    """
    run = dataclasses.asdict(
        RunConfig(model_config("ViT-B/32"), data=DataConfig(source="synthetic"), loss=LossConfig(kind="sigmoid"))
    )
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name not in values}
    defaults = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    try:
        return from_config_dict(run | {"model": defaults | dict(values)}).model
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from None


def check_activation(metadata: Mapping[str, str], activation: str, *, where: Path) -> None:
    """Raises a WeightsError where weights were written with another activation than their config claims.

    QuickGELU and GELU have the same weights and nearly the same outputs: taken for each other they cost accuracy
    without a word.
    """
    written = metadata.get("activation", activation)
    if written != activation:
        raise WeightsError(
            f"{where}: the weights were trained with the activation {written}, and the config beside them says "
            f"{activation}; correct the config"
        )


def default_heads(config: ModelConfig) -> bool:
    """Returns whether the widths tell the heads, as formats without a count of heads take for granted.

    Every head has 64 channels, and the image tower is none of the wider ViTs.
    """
    vision, text = config.vision, config.text
    is_vit = isinstance(vision, ViTConfig)
    width = vision.width if is_vit else 32 * vision.width
    known = not is_vit or width <= WIDEST_VIT
    return known and width == HEAD_WIDTH * vision.heads and text.width == HEAD_WIDTH * text.heads


def describe(config: ModelConfig) -> str:
    """Returns the sizes in a few words: `vit 768 x 12 at 224 px, text 512 x 12, embedding 512`.

    MLPs of another width than the paper's are told: `vit 1664 x 48 (MLP 8192) at 224 px`.
    """
    vision, text = config.vision, config.text
    image = f"{vision.kind} {_describe_tower(vision)} at {vision.image_size} px"
    return f"{image}, text {_describe_tower(text)}, embedding {config.embed_dim}"


def _describe_tower(sizes: ViTConfig | ResNetConfig | TextConfig) -> str:
    if isinstance(sizes, ResNetConfig):
        return f"{sizes.width} x {'-'.join(map(str, sizes.layers))}"
    return f"{sizes.width} x {sizes.layers}" + (f" (MLP {sizes.mlp_width})" if sizes.mlp_width else "")


def facts(weights: Weights) -> dict[str, str]:
    """Returns what there is to say of a model, by name."""
    config, preprocess = weights.config, weights.preprocess
    params = weights.variables["params"]
    bias = {"logit_bias": f"{float(params['logit_bias']):.4f}"} if config.logit_bias else {}
    return {
        "model": f"{variant_name(config)} ({describe(config)})",
        "parameters": f"{count_parameters(params):,}",
        "activation": config.activation,
        "context": f"{config.text.context} tokens of {config.text.vocab_size:,}",
        "images": f"{preprocess.size} px: shorter side resized (bicubic), centre cut",
        "mean and deviation of pixels / 255": f"{list(preprocess.mean)}, {list(preprocess.std)}",
        "exp(logit_scale)": f"{math.exp(float(params['logit_scale'])):.4f}",
        **bias,
    }
