"""One table between our parameters' names and layouts and those of OpenAI, open_clip and Hugging Face.

A row is a module; its kind says which tensors the module has and how torch lays them out. OpenAI and open_clip share
their names (openai/CLIP `clip/model.py`); Hugging Face's are those of `transformers`' CLIPModel, which has no ResNets.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP, Variables, init_variables
from clip_jax.models.variants import ModelConfig
from clip_jax.rules import leaf_paths

Scheme = Literal["openai", "hugging_face"]
Tensors = Mapping[str, np.ndarray]


class WeightsError(UserError):
    """Weights that are not those of the model they should be; the line names the file and the tensors."""


class Layout(NamedTuple):
    """How one of our arrays becomes torch's, and back."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


class Source(NamedTuple):
    """Torch's tensors that make one of ours: several are concatenated along their first axis."""

    names: tuple[str, ...]
    layout: Layout


def _patches_to_torch(x: np.ndarray) -> np.ndarray:
    side = math.isqrt(x.shape[0] // 3)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # [in, out], [out, in]
CONV = Layout(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))  # [h, w, in, out], [out, in, h, w]
POINT = Layout(lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T)  # [in, out], [out, in, 1, 1]
PATCH = Layout(_patches_to_torch, lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]))  # [h·w·3, out]

# Kinds of modules: (the leaf's name here, what torch adds to the module's name, layout).
Kind = tuple[tuple[str, str, Layout], ...]
_VALUE: Kind = (("", "", SAME),)
_WEIGHT: Kind = (("", ".weight", SAME),)
_NORM: Kind = (("/scale", ".weight", SAME), ("/bias", ".bias", SAME))
_BATCH_NORM: Kind = (*_NORM, ("/mean", ".running_mean", SAME), ("/var", ".running_var", SAME))
_DENSE: Kind = (("/kernel", ".weight", LINEAR), ("/bias", ".bias", SAME))
_IN_PROJ: Kind = (("/kernel", ".in_proj_weight", LINEAR), ("/bias", ".in_proj_bias", SAME))
_NO_BIAS: Kind = (("/kernel", ".weight", LINEAR),)
_MATRIX: Kind = (("/kernel", "", SAME),)
_EMBED: Kind = (("/embedding", ".weight", SAME),)
_CONV: Kind = (("/kernel", ".weight", CONV),)
_POINT: Kind = (("/kernel", ".weight", POINT),)
_PATCH: Kind = (("/kernel", ".weight", PATCH),)

# fmt: off
# ours, OpenAI's and open_clip's, Hugging Face's. `{}` is the number of a stage or a block, `[qkv]` stands for three.
_BLOCK = (
    ("ln_1",          "ln_1",          _NORM,    "layer_norm1",          _NORM),
    ("attention/qkv", "attn",          _IN_PROJ, "self_attn.[qkv]_proj", _DENSE),
    ("attention/out", "attn.out_proj", _DENSE,   "self_attn.out_proj",   _DENSE),
    ("ln_2",          "ln_2",          _NORM,    "layer_norm2",          _NORM),
    ("mlp/in",        "mlp.c_fc",      _DENSE,   "mlp.fc1",              _DENSE),
    ("mlp/out",       "mlp.c_proj",    _DENSE,   "mlp.fc2",              _DENSE),
)


def _blocks(ours: str, openai: str, hugging_face: str) -> tuple:
    return tuple(
        (f"{ours}/block_{{}}/{a}", f"{openai}.{{}}.{b}", kind, f"{hugging_face}.{{}}.{c}", hf_kind)
        for a, b, kind, c, hf_kind in _BLOCK
    )


_TRANSFORMERS = (
    ("logit_scale",           "logit_scale",                 _VALUE,   "logit_scale",                              _VALUE),
    ("text/token_embedding",  "token_embedding",             _EMBED,   "text_model.embeddings.token_embedding",    _EMBED),
    ("text/positions",        "positional_embedding",        _VALUE,   "text_model.embeddings.position_embedding", _WEIGHT),
    *_blocks("text/transformer", "transformer.resblocks", "text_model.encoder.layers"),
    ("text/ln_final",         "ln_final",                    _NORM,    "text_model.final_layer_norm",              _NORM),
    ("text/projection",       "text_projection",             _MATRIX,  "text_projection",                          _NO_BIAS),

    ("image/patch_embedding", "visual.conv1",                _PATCH,   "vision_model.embeddings.patch_embedding",  _PATCH),
    ("image/class_token",     "visual.class_embedding",      _VALUE,   "vision_model.embeddings.class_embedding",  _VALUE),
    ("image/positions",       "visual.positional_embedding", _VALUE,   "vision_model.embeddings.position_embedding", _WEIGHT),
    ("image/ln_pre",          "visual.ln_pre",               _NORM,    "vision_model.pre_layrnorm",                _NORM),
    *_blocks("image/transformer", "visual.transformer.resblocks", "vision_model.encoder.layers"),
    ("image/ln_post",         "visual.ln_post",              _NORM,    "vision_model.post_layernorm",              _NORM),
    ("image/projection",      "visual.proj",                 _MATRIX,  "visual_projection",                        _NO_BIAS),
)
# ours, OpenAI's and open_clip's.
_RESNET = (
    *((f"image/stem_conv_{i}",                  f"visual.conv{i}",                       _CONV) for i in (1, 2, 3)),
    *((f"image/stem_bn_{i}",                    f"visual.bn{i}",                   _BATCH_NORM) for i in (1, 2, 3)),
    *((f"image/stage_{{}}/block_{{}}/bn_{i}",   f"visual.layer{{}}.{{}}.bn{i}",    _BATCH_NORM) for i in (1, 2, 3)),
    ("image/stage_{}/block_{}/conv_1",          "visual.layer{}.{}.conv1",               _POINT),
    ("image/stage_{}/block_{}/conv_2",          "visual.layer{}.{}.conv2",                _CONV),
    ("image/stage_{}/block_{}/conv_3",          "visual.layer{}.{}.conv3",               _POINT),
    ("image/stage_{}/block_{}/shortcut_conv",   "visual.layer{}.{}.downsample.0",        _POINT),
    ("image/stage_{}/block_{}/shortcut_bn",     "visual.layer{}.{}.downsample.1",   _BATCH_NORM),
    ("image/attention_pool/positions",          "visual.attnpool.positional_embedding",  _VALUE),
    ("image/attention_pool/query",              "visual.attnpool.q_proj",                _DENSE),
    ("image/attention_pool/key",                "visual.attnpool.k_proj",                _DENSE),
    ("image/attention_pool/value",              "visual.attnpool.v_proj",                _DENSE),
    ("image/attention_pool/out",                "visual.attnpool.c_proj",                _DENSE),
)
# fmt: on
_MODULES: dict[Scheme, tuple[tuple[str, str, Kind], ...]] = {
    "openai": (
        ("logit_bias", "logit_bias", _VALUE),  # open_clip's alone
        *((ours, openai, kind) for ours, openai, kind, _, _ in _TRANSFORMERS),
        *_RESNET,
    ),
    "hugging_face": tuple((ours, name, kind) for ours, _, _, name, kind in _TRANSFORMERS),
}

# Torch's tensors that hold no weights: counters, sizes, a causal mask, 0..n-1.
_IDLE = re.compile(
    r"\.num_batches_tracked$|^(input_resolution|context_length|vocab_size|attn_mask)$|\.embeddings\.position_ids$"
)


def source_of(path: str, scheme: Scheme) -> Source:
    """Returns where a leaf such as `image/transformer/block_0/mlp/in/kernel` lies in torch's state dict.

    Raises:
      KeyError: the scheme has no such tensor.
    """
    numbers = re.findall(r"(?:block|stage)_(\d+)", path)
    name, layout = _tensors(scheme)[re.sub(r"(block|stage)_\d+", r"\1_{}", path)]
    name = name.format(*numbers)
    names = tuple(name.replace("[qkv]", letter) for letter in "qkv") if "[qkv]" in name else (name,)
    return Source(names, layout)


def to_torch(variables: Variables, scheme: Scheme) -> dict[str, np.ndarray]:
    """Returns variables as torch's state dict.

    Args:
      variables: `params` and `batch_stats`; also any tree with the same paths, such as gradients.
      scheme: whose names. In `openai` each BatchNorm also has its counter of batches, at 0.

    Returns:
      Contiguous arrays of the leaves' dtypes.
    """
    named: dict[str, np.ndarray] = {}
    for path, leaf in leaves_by_path(variables).items():
        names, layout = source_of(path, scheme)
        whole = layout.to_torch(np.asarray(leaf))
        parts = [whole] if len(names) == 1 else np.split(whole, len(names))
        named |= {name: np.array(part, order="C") for name, part in zip(names, parts, strict=True)}
    norms = [name.removesuffix("running_mean") for name in named if name.endswith(".running_mean")]
    return named | {f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}


def from_torch(tensors: Tensors, config: ModelConfig, scheme: Scheme, *, where: object) -> Variables:
    """Returns torch's state dict as our variables: every parameter is filled, and every tensor used.

    Args:
      tensors: by torch's names, of any float dtype.
      config: the model whose weights they are.
      scheme: whose names.
      where: the file, for messages.

    Returns:
      `params` and `batch_stats`, float32 NumPy arrays.

    Raises:
      WeightsError: missing, unknown or misshapen tensors, or values that are no finite numbers, all by name.
    """
    like = jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0)))
    sources = [(source_of(path, scheme), leaf.shape) for path, leaf in leaves_by_path(like).items()]
    _check_names(tensors, {name for source, _ in sources for name in source.names}, where)
    filled = [_filled(tensors, source, shape, where) for source, shape in sources]
    return jax.tree.unflatten(jax.tree.structure(like), filled)


@functools.cache
def _tensors(scheme: Scheme) -> dict[str, tuple[str, Layout]]:
    """Returns (torch's name, layout) for the path of every leaf, with `{}` for numbers."""
    return {
        module + leaf: (name + added, layout) for module, name, kind in _MODULES[scheme] for leaf, added, layout in kind
    }


def leaves_by_path(variables: Variables) -> dict[str, Any]:
    """Returns leaves by their path within `params` or `batch_stats`, in the order of `jax.tree.leaves`."""
    paths = [re.sub("^(params|batch_stats)/", "", path) for path in leaf_paths(variables)]
    return dict(zip(paths, jax.tree.leaves(variables), strict=True))


def _check_names(tensors: Tensors, expected: set[str], where: object) -> None:
    unknown = {name for name in tensors.keys() - expected if not _IDLE.search(name)}
    wrong = [
        f"{verb} {listed(names)}"
        for verb, names in (("lacks", expected - tensors.keys()), ("has unknown tensors:", unknown))
        if names
    ]
    if wrong:
        raise WeightsError(f"{where} {' and '.join(wrong)}")


def _filled(tensors: Tensors, source: Source, shape: tuple[int, ...], where: object) -> np.ndarray:
    whole = source.layout.to_torch(np.broadcast_to(np.float32(0), shape)).shape
    expected = (whole[0] // len(source.names), *whole[1:]) if whole else whole
    for name in source.names:
        _check_tensor(name, tensors[name], expected, where)
    parts = [tensors[name] for name in source.names]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.array(source.layout.from_torch(joined), np.float32, order="C")


def _check_tensor(name: str, tensor: np.ndarray, shape: tuple[int, ...], where: object) -> None:
    if tensor.shape != shape:
        raise WeightsError(f"{where}: {name} has shape {list(tensor.shape)}, and this model's has {list(shape)}")
    if tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise WeightsError(f"{where}: {name} holds {tensor.dtype}, not floats")
    wrong = tensor.size - int(np.isfinite(tensor).sum())
    if wrong:
        raise WeightsError(f"{where}: {wrong:,} of the {tensor.size:,} values in {name} are not finite numbers")


def listed(names: Iterable[str], *, most: int = 6) -> str:
    """Returns the first names, sorted, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most:,} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
