"""Weights from wherever they lie: a file, a folder, a run of ours, a name."""

import dataclasses
import re
from pathlib import Path

import jax

from clip_jax.config import describe_diff, model_diff
from clip_jax.errors import UserError, did_you_mean
from clip_jax.files import RECORD, is_remote
from clip_jax.interop import hugging_face, open_clip
from clip_jax.interop.download import HUB_PREFIX, download_hub, download_openai, download_url
from clip_jax.interop.hugging_face import read_hugging_face
from clip_jax.interop.names import WeightsError
from clip_jax.interop.open_clip import read_open_clip
from clip_jax.interop.openai import read_openai
from clip_jax.interop.weights import Weights, checked_model, describe, read_json
from clip_jax.models.resolution import change_resolution
from clip_jax.models.variants import VARIANTS, Activation, ModelConfig, model_config, variant_name

_HUB_PAGE = re.compile(r"^https://huggingface\.co/([^/]+/[^/]+)/?$")


def read_weights(
    source: str | Path,
    *,
    expect: ModelConfig | None = None,
    image_size: int | None = None,
    activation: Activation | None = None,
) -> Weights:
    """Reads a model's weights, whatever their layout.

    Args:
      source: OpenAI's or another `.pt` file in its layout; a folder in open_clip's or Hugging Face's layout; the
        workdir of a run of ours, of which the newest whole checkpoint is read, or one of its checkpoints, such as
        `runs/b32/checkpoints/12000`; a URL of one of these, such as `gs://bucket/runs/b32`; the name of one of the
        paper's models, whose weights by OpenAI are downloaded; `hf-hub:owner/name`, or that page's address.
      expect: refuse another architecture or activation than this.
      image_size: side of the images in pixels, where it is to differ; image positions are then resized.
      activation: the model's, where the source is a file, which does not say it; see `read_openai`.

    Raises:
      UserError: nothing there, damaged, or another model; the line says which and where.
    """
    weights = _read(source, activation)
    if activation not in (None, weights.config.activation):
        raise WeightsError(f"{source} says that its activation is {weights.config.activation}, not {activation}")
    if image_size is not None:
        weights = resized(weights, image_size)
    if expect is not None:
        check_same_model(weights.config, expect, source)
    return weights


def _read(given: str | Path, activation: Activation | None) -> Weights:
    source = _HUB_PAGE.sub(rf"{HUB_PREFIX}\1", str(given))
    path = download_url(source) if is_remote(source) else Path(source).expanduser()
    if path.is_file():
        return _read_file(path, activation)
    if path.is_dir():
        return _read_folder(path)
    if source.startswith(HUB_PREFIX):
        return _read_folder(download_hub(source.removeprefix(HUB_PREFIX)))
    if (name := released_name(source)) is not None:
        return read_openai(download_openai(name))
    raise UserError(
        f"{source!r} is neither a file or folder nor a model's name{did_you_mean(source, VARIANTS)} "
        f"(models: {', '.join(VARIANTS)})"
    )


def _read_file(path: Path, activation: Activation | None) -> Weights:
    if path.suffix == ".safetensors" or path.name in (open_clip.TORCH, hugging_face.TORCH):
        raise WeightsError(f"{path} alone does not say which model it is; give its folder, with the config beside it")
    return read_openai(path, activation)


def _read_folder(folder: Path) -> Weights:
    # A repository of the Hub's may have both layouts' configs, and a copy of it the weights of one.
    has_weights = any((folder / name).exists() for name in (open_clip.SAFETENSORS, open_clip.TORCH))
    if (folder / open_clip.CONFIG).exists() and (has_weights or not _is_hugging_face(folder)):
        return read_open_clip(folder)
    if (folder / "checkpoints").is_dir() or (folder / RECORD).exists():
        return _read_trained(folder)
    if _is_hugging_face(folder):
        return read_hugging_face(folder)
    if (folder / "stablehlo.json").exists():
        raise WeightsError(f"{folder} is a StableHLO export: its run.py loads it, not this")
    raise WeightsError(
        f"{folder} holds no weights: neither {open_clip.CONFIG} (open_clip), nor a {hugging_face.CONFIG} with a "
        "model_type (Hugging Face), nor a run's checkpoints, nor is it one of them"
    )


def _is_hugging_face(folder: Path) -> bool:
    config = folder / hugging_face.CONFIG
    return config.exists() and "model_type" in read_json(config)


def _read_trained(folder: Path) -> Weights:
    """Reads a run, or one checkpoint of it."""
    from clip_jax.checkpoints.model import read_checkpoint, read_run  # Orbax takes a second to import

    config, variables, preprocess = (read_checkpoint if (folder / RECORD).exists() else read_run)(folder)
    return Weights(dataclasses.replace(config, dtype="float32"), variables, preprocess)  # a run may compute in less


def resized(weights: Weights, image_size: int) -> Weights:
    """Returns the weights for images of another side, in pixels.

    Raises:
      WeightsError: a side that the image tower cannot have.
    """
    vision = dataclasses.replace(weights.config.vision, image_size=image_size)
    checked_model(dataclasses.asdict(dataclasses.replace(weights.config, vision=vision)), where="image_size")
    config, variables = change_resolution(weights.config, weights.variables, image_size)
    return Weights(config, jax.device_get(variables), dataclasses.replace(weights.preprocess, size=image_size))


def released_name(source: str | Path) -> str | None:
    """Returns the paper's name of the model whose weights by OpenAI a source means; None where it is something else."""
    if Path(source).expanduser().exists():
        return None
    try:
        return variant_name(model_config(str(source)))
    except UserError:
        return None


def check_same_model(found: ModelConfig, expected: ModelConfig, source: str | Path) -> None:
    """Raises a WeightsError where the weights of `source` are another architecture's or activation's."""
    changes = model_diff(dataclasses.asdict(found), dataclasses.asdict(expected))
    if changes:
        raise WeightsError(f"{source} holds another model ({describe(found)}) than asked for: {describe_diff(changes)}")
