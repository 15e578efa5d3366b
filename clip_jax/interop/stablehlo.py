"""StableHLO: a model as three programs and one file of weights, to run wherever JAX runs, without clip_jax or Flax.

`jax.export` serializes each program once for all platforms and batch sizes. The weights are the programs' first
argument, a flat dict by name, and not constants inside them: three programs of some 100 kB share one copy of the
weights, and a server of texts need not hold the image tower. They lie in a safetensors file, as in the other exports:
other languages read it too, and without its library it takes ten lines (`stablehlo_run.py`). Pixels go in as uint8
and are normalised inside, so that nobody can do it wrong.

What is unusual: locations are left out of the programs, for they would carry this machine's absolute paths.

The JAX that reads may be up to six months newer than the one that wrote, or three weeks older; both are counted by
the dates of the jaxlib releases (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees). The
programs hold no custom calls but JAX's own check of shapes, so nothing in them falls outside that promise. The weights
outlive it.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

import clip_jax
from clip_jax.array_types import Array, Float
from clip_jax.data.images import Preprocess, normalize, preprocess_of
from clip_jax.errors import UserError, did_you_mean, one_line
from clip_jax.files import json_object
from clip_jax.interop import stablehlo_run
from clip_jax.interop.stablehlo_run import ExportedModel
from clip_jax.interop.weights import file_sha256, write_safetensors
from clip_jax.models.clip import CLIP, Variables, image_features, text_features
from clip_jax.models.variants import ModelConfig, variant_name

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_FORMAT = "clip_jax StableHLO"
_FORMAT_VERSION = 1
_MANIFEST = "stablehlo.json"
_WEIGHTS = "weights.safetensors"
_RUNNER = "run.py"
_CLASS_WEIGHTS = "class_weights"
_SCALE = "params/logit_scale"
_SCALARS = r"^params/logit_(scale|bias)$"
_FRAMES = "jax_traceback_in_locations_limit"


class _Program(NamedTuple):
    """A function of (weights by name, *inputs), its inputs by name, and a regex of the weights that it takes."""

    function: Callable[..., jax.Array]
    inputs: dict[str, jax.ShapeDtypeStruct]
    weights: str


def write_stablehlo(
    folder: Path,
    model: CLIP,
    variables: Variables,
    *,
    preprocess: Preprocess | None = None,
    classes: Sequence[str] | None = None,
    class_weights: np.ndarray | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes the model, in evaluation mode and forward only, into a folder.

    The files: `encode_image.jaxexport`, `encode_text.jaxexport`, `zero_shot_head.jaxexport`, `weights.safetensors`,
    `run.py` (see `stablehlo_run.py`) and `stablehlo.json`, which describes the others and holds their SHA-256.

    A matrix product has the precision that `jax.default_matmul_precision` has here: by default each platform's own,
    as in `model.apply`. The head's is float32.

    Args:
      folder: made where it is missing; files of these names in it are replaced.
      model: float32 or bfloat16.
      variables: as `init_variables` gives them; a ResNet's `batch_stats` are used.
      preprocess: how pixels are normalised; CLIP's mean and deviation by default.
      classes: c names for zero-shot classification, with their weights.
      class_weights: float [c, e] of unit length, as `clip_jax.evals.zero_shot.class_weights` gives them.
      platforms: some of PLATFORMS; none need be present.

    Raises:
      UserError: arguments that contradict each other, an unknown platform, or a float64 model.
    """
    config = model.config
    preprocess = preprocess or preprocess_of(config)
    _check_model(model, preprocess)
    _check_platforms(platforms)
    weights = {name: _as_float32(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    if classes is not None or class_weights is not None:
        _check_classes(classes, class_weights, embed_dim=config.embed_dim)
        weights[_CLASS_WEIGHTS] = _as_float32(class_weights)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RUNNER).write_bytes(Path(stablehlo_run.__file__).read_bytes())
    write_safetensors(folder / _WEIGHTS, weights)
    programs = {
        name: _write_program(folder / f"{name}.jaxexport", program, weights, platforms)
        for name, program in _programs(model, preprocess).items()
    }
    written = [_WEIGHTS, _RUNNER, *(program["file"] for program in programs.values())]
    manifest = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        **_describe_model(config, preprocess),
        "classes": None if classes is None else list(classes),
        "programs": programs,
        "platforms": list(platforms),
        "versions": {"clip_jax": clip_jax.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "files": {name: file_sha256(folder / name) for name in written},
    }
    manifest["sha256"] = _manifest_sha256(manifest)
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_stablehlo(folder: Path) -> ExportedModel:
    """Returns what `write_stablehlo` wrote, after checking every file.

    The checksums find damage; they are no signature.

    Raises:
      UserError: a file is missing or not what was written, this JAX cannot read the programs, or they were not
        exported for its platform.
    """
    manifest = _read_manifest(folder / _MANIFEST)
    for name, sha256 in manifest["files"].items():
        _check_file(folder / name, sha256)
    for program in manifest["programs"].values():
        _check_readable(folder / program["file"], manifest)
    return ExportedModel(folder)


def zero_shot_probabilities(
    features: Float[Array, "b e"], class_weights: Float[Array, "c e"], logit_scale: Float[Array, ""]
) -> Float[Array, "b c"]:
    """Returns softmax(exp(logit_scale) · features · class_weightsᵀ): the zero-shot classifier (paper, §3.1.2).

    The product is taken in full float32, as in the loss: a scale of 100 would show the roundings of a shorter one.
    """
    cosines = jnp.matmul(features, class_weights.T, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.softmax(jnp.exp(logit_scale) * cosines)


def _programs(model: CLIP, preprocess: Preprocess) -> dict[str, _Program]:
    """Returns the programs by name; `b` and `c` are whatever a caller brings, at least 1."""

    def encode_image(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        return image_features(model, unflatten_dict(weights, sep="/"), normalize(images, preprocess))

    def encode_text(weights: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return text_features(model, unflatten_dict(weights, sep="/"), tokens)

    def zero_shot_head(weights: dict[str, jax.Array], features: jax.Array, class_weights: jax.Array) -> jax.Array:
        return zero_shot_probabilities(features, class_weights, weights[_SCALE])

    def array(dtype: str, *shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    b, c = export.symbolic_shape("b, c")
    config, size = model.config, preprocess.size
    # Linen asks for scale and bias whichever tower is applied; neither tower computes with them.
    return {
        "encode_image": _Program(
            encode_image, {"images": array("uint8", b, size, size, 3)}, rf"^\w+/image/|{_SCALARS}"
        ),
        "encode_text": _Program(
            encode_text, {"tokens": array("int32", b, config.text.context)}, rf"^\w+/text/|{_SCALARS}"
        ),
        "zero_shot_head": _Program(
            zero_shot_head,
            {
                "features": array("float32", b, config.embed_dim),
                "class_weights": array("float32", c, config.embed_dim),
            },
            rf"^{_SCALE}$",
        ),
    }


def _write_program(
    path: Path, program: _Program, weights: dict[str, np.ndarray], platforms: Sequence[str]
) -> dict[str, Any]:
    """Writes one program and returns what the manifest says of it."""
    taken = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array in weights.items()
        if re.search(program.weights, name)
    }
    with _no_source_paths():
        exported = export.export(jax.jit(program.function), platforms=platforms)(taken, *program.inputs.values())
    path.write_bytes(exported.serialize(vjp_order=0))
    return {
        "file": path.name,
        "inputs": {name: _describe(array) for name, array in program.inputs.items()},
        "output": _describe(exported.out_avals[0]),
        "weights": sorted(taken),
    }


@contextlib.contextmanager
def _no_source_paths() -> Iterator[None]:
    """Keeps the absolute paths of the sources out of what is lowered."""
    before = getattr(jax.config, _FRAMES)
    jax.config.update(_FRAMES, 0)
    try:
        yield
    finally:
        jax.config.update(_FRAMES, before)


def _describe_model(config: ModelConfig, preprocess: Preprocess) -> dict[str, Any]:
    return {
        "model": variant_name(config),
        "embed_dim": config.embed_dim,
        "dtype": config.dtype,
        "activation": config.activation,
        "image": preprocess.to_dict(),
        "text": {"context": config.text.context, "vocab_size": config.text.vocab_size, "tokenizer": "clip"},
    }


def _describe(array: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in array.shape]
    return {"dtype": str(array.dtype), "shape": shape}


def _as_float32(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float32, order="C")


def _check_model(model: CLIP, preprocess: Preprocess) -> None:
    if model.config.dtype == "float64":
        raise UserError("float64 serves proofs and is not exported; give the model dtype float32 or bfloat16")
    if preprocess.size != model.config.vision.image_size:
        raise UserError(
            f"the preprocessing gives images of {preprocess.size} pixels; "
            f"the model reads {model.config.vision.image_size}"
        )


def _check_platforms(platforms: Sequence[str]) -> None:
    for platform in platforms:
        if platform not in PLATFORMS:
            near = "; did you mean 'cuda'?" if platform == "gpu" else did_you_mean(platform, PLATFORMS)
            raise UserError(f"unknown platform {platform!r}{near} (platforms: {', '.join(PLATFORMS)})")
    if not platforms:
        raise UserError(f"no platform to export for (platforms: {', '.join(PLATFORMS)})")


def _check_classes(classes: Sequence[str] | None, class_weights: np.ndarray | None, *, embed_dim: int) -> None:
    if classes is None or class_weights is None:
        raise UserError("classes and class_weights belong together; one of them is missing")
    if not classes or class_weights.shape != (len(classes), embed_dim):
        raise UserError(
            f"class_weights has shape {class_weights.shape}; "
            f"{len(classes)} classes and an embedding of {embed_dim} need {(len(classes), embed_dim)}"
        )
    lengths = np.linalg.norm(class_weights, axis=1)
    if not np.allclose(lengths, 1, atol=1e-3):
        raise UserError(
            f"class_weights must be rows of unit length; they are {lengths.min():.3g} to {lengths.max():.3g}"
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; {path.parent} holds no StableHLO export")
    try:
        manifest = json_object(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    if manifest.get("format") != _FORMAT:
        raise UserError(f"{path} does not describe a {_FORMAT} export")
    if manifest.get("format_version") != _FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('format_version')}, and this clip_jax reads {_FORMAT_VERSION}; "
            "read it with the clip_jax that wrote it"
        )
    if manifest.pop("sha256", None) != _manifest_sha256(manifest):
        raise UserError(f"{path} is not what was written: its sha256 differs")
    return manifest


def _check_file(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; the export is incomplete")
    if file_sha256(path) != sha256:
        raise UserError(f"{path} is damaged: its sha256 is not the one in {_MANIFEST}")


def _check_readable(path: Path, manifest: dict[str, Any]) -> None:
    try:
        exported = export.deserialize(bytearray(path.read_bytes()))
        exported.mlir_module()  # parses the StableHLO, which would otherwise happen at the first call
    except Exception as error:  # by version, JAX raises ValueError, KeyError, struct.error and more
        written, here = manifest["versions"]["jax"], jax.__version__
        raise UserError(
            f"jax {here} cannot read {path}, written by jax {written} ({one_line(error)}); "
            f"read it with a jax nearer to {written}, or export it again"
        ) from None
    platform = export.default_export_platform()
    if platform not in exported.platforms:
        raise UserError(f"{path} was exported for {', '.join(exported.platforms)}; JAX runs on {platform} here")


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
