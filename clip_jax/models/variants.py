"""The table of CLIP's nine models (paper, tables 19 and 20; openai/CLIP `clip/model.py`), and the types of its rows.

Imports no JAX, so that configs and `clip-jax --help` stay quick.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from clip_jax.errors import UserError, did_you_mean

Activation = Literal["quick_gelu", "gelu"]
AttentionKind = Literal["auto", "xla", "cudnn", "pallas"]
MLPKind = Literal["auto", "xla", "pallas"]
ReduceDtype = Literal["same", "float32"]
Remat = Literal["none", "dots", "block", "full"]
REMATS: tuple[Remat, ...] = get_args(Remat)
"""From what keeps most for the backward pass to what keeps least."""


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer image tower.

    Attributes:
      image_size: side of the square input, in pixels; a multiple of `patch`.
      patch: side of a square patch, in pixels.
      width: width of the residual stream; a multiple of `heads`.
      heads: attention heads (width / 64 in the paper's models).
      layers: number of pre-LN blocks.
      mlp_width: channels between an MLP's two layers; 0 means four times `width`, as in the paper's models, and four
        times `width` becomes 0.
    """

    image_size: int
    patch: int
    width: int
    heads: int
    layers: int
    mlp_width: int = 0
    kind: Literal["vit"] = "vit"

    def __post_init__(self) -> None:
        _settle_mlp_width(self)

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch) ** 2 + 1


@dataclass(frozen=True)
class ResNetConfig:
    """A ModifiedResNet image tower: three-convolution stem, anti-aliased strides, attention pool.

    Attributes:
      image_size: side of the square input, in pixels; a multiple of 32.
      width: channels of the stem; the last stage has 32 times as many.
      heads: heads of the attention pool (width * 32 / 64 in the paper's models).
      layers: bottleneck blocks in each of the four stages.
    """

    image_size: int
    width: int
    heads: int
    layers: tuple[int, int, int, int]
    kind: Literal["resnet"] = "resnet"

    @property
    def tokens(self) -> int:
        """Positions of the last feature map and the mean token of the attention pool."""
        return (self.image_size // 32) ** 2 + 1


VOCABULARY = 49_408
"""Ids of CLIP's tokenizer, that of the end of a caption the largest."""


@dataclass(frozen=True)
class TextConfig:
    """The causal text tower.

    Attributes:
      width: width of the residual stream; a multiple of `heads`.
      heads: attention heads.
      layers: number of pre-LN blocks.
      context: tokens in a row, SOT and EOT included (77 in the released code; the paper says 76).
      vocab_size: rows of the token embedding (49,408 in the released code; the paper says 49,152). Only synthetic pairs
        can do with fewer than the tokenizer's.
      mlp_width: as in `ViTConfig`.
    """

    width: int
    heads: int
    layers: int
    context: int = 77
    vocab_size: int = VOCABULARY
    mlp_width: int = 0

    def __post_init__(self) -> None:
        _settle_mlp_width(self)


def mlp_width(sizes: ViTConfig | TextConfig) -> int:
    """Returns the channels between the two layers of a transformer's MLPs."""
    return sizes.mlp_width or 4 * sizes.width


def _settle_mlp_width(sizes: ViTConfig | TextConfig) -> None:
    """Gives one model one spelling: configs are compared."""
    if sizes.mlp_width == 4 * sizes.width:
        object.__setattr__(sizes, "mlp_width", 0)


@dataclass(frozen=True)
class ModelConfig:
    """A CLIP model: two towers into one embedding space.

    Attributes:
      embed_dim: size of the joint embedding.
      vision: the image tower.
      text: the text tower.
      init: `released`, as openai/CLIP initialises, or `scaled`, the text tower's scheme on the ViT too.
      temperature: initial temperature τ; logit_scale starts at ln(1/τ) (paper, §2.5; SigLIP starts at 0.1).
      logit_bias: have a learnt bias of the logits, which the sigmoid loss wants (Zhai et al., 2023, §3.2).
      initial_bias: what that bias starts at.
      dtype: dtype of activations and products. Parameters, norm statistics and logits stay float32 or wider.
        `float64` serves proofs and needs JAX_ENABLE_X64=1; a run without it is refused.
      reduce_dtype: in which devices add up what each has of a kernel's gradient, on TPUs of the token table's too:
        `same`, that of the products it comes from, which is `dtype`; or `float32`, as torch's DistributedDataParallel,
        for twice the bytes between devices. All other gradients are added up in float32 either way.
      activation: of the transformers: `quick_gelu`, as in the paper's models, or `gelu`, the exact one, as in most
        models that open_clip trained.
      bn_group: samples that share BatchNorm's statistics in training, for ResNets; 0 means the whole batch.
      remat: what the backward pass recomputes instead of keeping it. `none`: nothing. `dots`: within each transformer
        block and ResNet bottleneck, all but the results of matrix products and convolutions. `block`: all within each
        block or bottleneck, for about a third more time. `full`: each transformer and each ResNet stage as a whole,
        and within it each block again, for about two thirds more.
      scan_layers: compile one block for all blocks of a kind and loop over their weights: compiles faster, at the cost
        of a copy of the weights; changes no name, no value and no checkpoint.
      patch_dropout: share of patches that a ViT leaves out of each image in training (Li et al., 2023, FLIP).
      dead_tokens: what nothing reads, the rows of a last block but one, and in training the tokens behind EOT
        (`text_groups`): `skip` or `compute`. The same results, to rounding.
      attention: what computes the transformers' attention in a training step. `xla`: as it is defined. `cudnn`: the
        fused kernels of NVIDIA's library, for bfloat16 on GPUs since A100; the same results, to rounding, and their
        gradients' last bits can change from run to run. `pallas`: our own for the same GPUs, which need no copies
        around them; the same results, to rounding. `auto`: `pallas` where it is the fastest, on Hopper's GPUs for up
        to 257 tokens; else `cudnn` where it can be used, else `xla`.
      mlp: what computes the transformers' activation in a training step. `xla`: what XLA makes of it. `pallas`: kernels
        of our own, for `quick_gelu` in bfloat16 on NVIDIA GPUs since A100, of which that of the backward pass sums the
        gradient of the bias before it; the same results, to rounding. `auto`: `pallas` on Hopper's GPUs where it can be
        used, else `xla`.
    """

    embed_dim: int
    vision: ViTConfig | ResNetConfig
    text: TextConfig
    init: Literal["released", "scaled"] = "released"
    temperature: float = 0.07
    logit_bias: bool = False
    initial_bias: float = -10.0
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    reduce_dtype: ReduceDtype = "same"
    activation: Activation = "quick_gelu"
    bn_group: int = 0
    remat: Remat = "none"
    scan_layers: bool = False
    patch_dropout: float = 0.0
    dead_tokens: Literal["skip", "compute"] = "skip"
    attention: AttentionKind = "auto"
    mlp: MLPKind = "auto"


# fmt: off
#                   embed               image  width  heads      layers                 width heads layers
VARIANTS = {
    "RN50":         (1024, ResNetConfig(  224,    64,    32, ( 3, 4,  6,  3)), TextConfig( 512,    8,   12)),
    "RN101":        ( 512, ResNetConfig(  224,    64,    32, ( 3, 4, 23,  3)), TextConfig( 512,    8,   12)),
    "RN50x4":       ( 640, ResNetConfig(  288,    80,    40, ( 4, 6, 10,  6)), TextConfig( 640,   10,   12)),
    "RN50x16":      ( 768, ResNetConfig(  384,    96,    48, ( 6, 8, 18,  8)), TextConfig( 768,   12,   12)),
    "RN50x64":      (1024, ResNetConfig(  448,   128,    64, (3, 15, 36, 10)), TextConfig(1024,   16,   12)),
    #               embed            image  patch  width  heads  layers        width  heads  layers
    "ViT-B/32":     ( 512, ViTConfig(  224,    32,   768,    12,    12), TextConfig( 512,    8,    12)),
    "ViT-B/16":     ( 512, ViTConfig(  224,    16,   768,    12,    12), TextConfig( 512,    8,    12)),
    "ViT-L/14":     ( 768, ViTConfig(  224,    14,  1024,    16,    24), TextConfig( 768,   12,    12)),
    "ViT-L/14@336": ( 768, ViTConfig(  336,    14,  1024,    16,    24), TextConfig( 768,   12,    12)),
}

# Total parameters, logit_scale included (and no logit_bias); BatchNorm's running statistics are not among them.
PARAMETERS = {
    "RN50":     102_007_137, "RN101":    119_688_033, "RN50x4":   178_300_601, "RN50x16":      290_979_217,
    "RN50x64":  623_258_305, "ViT-B/32": 151_277_313, "ViT-B/16": 149_620_737, "ViT-L/14":     427_616_513,
    "ViT-L/14@336": 427_944_193,
}
# fmt: on


def model_config(name: str) -> ModelConfig:
    """Returns the sizes of one of the paper's models.

    Args:
      name: as in the paper, `ViT-B/32` or `RN50x4`; case and `/`, `@`, `-`, `_` do not matter.

    Raises:
      UserError: no such model; the line lists all and guesses the nearest.
    """
    by_plain = {_plain(known): known for known in VARIANTS}
    if _plain(name) not in by_plain:
        raise UserError(f"unknown model {name!r}{did_you_mean(name, VARIANTS)} (models: {', '.join(VARIANTS)})")
    embed_dim, vision, text = VARIANTS[by_plain[_plain(name)]]
    return ModelConfig(embed_dim, vision, text)


def variant_name(config: ModelConfig) -> str:
    """Returns the paper's name for these sizes, or `custom`."""
    sizes = (config.embed_dim, config.vision, config.text)
    return next((name for name, row in VARIANTS.items() if row == sizes), "custom")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
