"""Floating-point operations of the towers, counted from their sizes.

Two for every multiply-add of a matrix product or a convolution, nothing for the rest. What the compiler reports counts
recomputed work too, so utilisation is measured against these.
"""

from clip_jax.models.text_groups import Groups
from clip_jax.models.variants import ModelConfig, ResNetConfig, TextConfig, ViTConfig, mlp_width

EXPANSION = 4  # output channels of a ResNet's bottleneck over its inner channels


def image_flops(config: ModelConfig, *, train: bool = False, read: bool = False) -> int:
    """Returns operations of the image tower's forward pass on one image.

    Args:
      config: the model.
      train: without the patches that `patch_dropout` leaves out.
      read: without what of the last block nothing reads.
    """
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        stem, stages, pool = _resnet_parts(vision, config.embed_dim)
        return stem + sum(map(sum, stages)) + pool
    tokens = _kept_tokens(config, vision) if train else vision.tokens
    embedding = 2 * (vision.tokens - 1) * 3 * vision.patch**2 * vision.width
    blocks = _transformer(vision, tokens) - read * _unread(vision, tokens)
    return embedding + blocks + 2 * vision.width * config.embed_dim


def text_flops(config: ModelConfig) -> int:
    """Returns operations of the text tower's forward pass on one row of tokens, all of them."""
    return _transformer(config.text, config.text.context) + 2 * config.text.width * config.embed_dim


def grouped_text_flops(config: ModelConfig, groups: Groups) -> float:
    """Returns operations of the text tower's forward pass on a caption, on average over a device's groups.

    Without what of the last block nothing reads.

    Args:
      config: the model.
      groups: (captions, length) of each; none means that all have the whole length.
    """
    groups = groups or ((1, config.text.context),)
    text = config.text
    blocks = sum(count * (_transformer(text, length) - _unread(text, length)) for count, length in groups)
    return blocks / sum(count for count, _ in groups) + 2 * text.width * config.embed_dim


def loss_flops(embed_dim: int, batch: int, *, tiled: bool) -> int:
    """Returns operations of the loss and its gradients, a pair: each logit once and twice again, or twice and so on."""
    return (8 if tiled else 6) * batch * embed_dim


def pair_flops(config: ModelConfig, batch: int, *, tiled: bool, frozen_image: bool = False) -> int:
    """Returns operations of training on one pair, its share of the loss included; a backward pass is two forward ones.

    Args:
      config: the model.
      batch: pairs that the loss compares.
      tiled: the loss is computed in tiles.
      frozen_image: the image tower has no backward pass.
    """
    image = image_flops(config, train=True) * (1 if frozen_image else 3)
    return image + 3 * text_flops(config) + loss_flops(config.embed_dim, batch, tiled=tiled)


def recomputed_flops(config: ModelConfig) -> int:
    """Returns operations that the backward pass does again on one pair, by the config's `remat`."""
    if config.remat == "none":
        return 0
    vision, text = config.vision, config.text
    if config.remat == "dots":
        image = 0 if isinstance(vision, ResNetConfig) else _attention(vision, _kept_tokens(config, vision))
        return image + _attention(text, text.context)
    if isinstance(vision, ResNetConfig):
        stages = _resnet_parts(vision, config.embed_dim)[1]
        blocks = [block for stage in stages for block in stage]
        image = sum(blocks) + (config.remat == "full") * (sum(blocks) - sum(stage[-1] for stage in stages))
    else:
        image = _recomputed_blocks(vision, _kept_tokens(config, vision), twice=config.remat == "full")
    return image + _recomputed_blocks(text, text.context, twice=config.remat == "full")


def _recomputed_blocks(config: ViTConfig | TextConfig, tokens: int, *, twice: bool) -> int:
    """All but each block's last product, which no gradient needs; for `full`, before that the blocks up to the last."""
    whole = _transformer(config, tokens)
    last_products = config.layers * tokens * 2 * mlp_width(config) * config.width
    return whole - last_products + twice * (whole - whole // config.layers)


def _kept_tokens(config: ModelConfig, vision: ViTConfig) -> int:
    """Tokens of an image that are left in training by `patch_dropout`, the class token counted."""
    return 1 + max(1, int((vision.tokens - 1) * (1 - config.patch_dropout)))


def _attention(config: ViTConfig | TextConfig, tokens: int) -> int:
    """Attention's two products in all blocks."""
    return config.layers * 2 * 2 * tokens**2 * config.width


def _transformer(config: ViTConfig | TextConfig, tokens: int) -> int:
    """Per token and block: the dense layers, 3 + 1 of width² and the MLP's two, and attention's two products."""
    width = config.width
    return config.layers * tokens * 2 * (4 * width**2 + 2 * mlp_width(config) * width + 2 * tokens * width)


def _unread(config: ViTConfig | TextConfig, tokens: int) -> int:
    """What a last block saves that is read at one row: but for q, k and v, all is computed there alone."""
    width = config.width
    return (tokens - 1) * 2 * (width**2 + 2 * mlp_width(config) * width + 2 * tokens * width)


def _resnet_parts(config: ResNetConfig, embed_dim: int) -> tuple[int, list[list[int]], int]:
    """Of the stem, of each stage's bottlenecks, and of the attention pool."""
    side, width = config.image_size // 2, config.width
    half = width // 2
    stem = 2 * side**2 * 9 * (3 * half + half * half + half * width)
    side, inputs, stages = side // 2, width, []
    for number, blocks in enumerate(config.layers):
        inner, stage = width * 2**number, list[int]()
        for block in range(blocks):
            outer = EXPANSION * inner
            after = side // 2 if number and not block else side
            shortcut = 2 * after**2 * inputs * outer if not block else 0
            stage.append(2 * side**2 * (inputs * inner + 9 * inner * inner) + 2 * after**2 * inner * outer + shortcut)
            side, inputs = after, outer
        stages.append(stage)
    tokens = side**2 + 1
    pool = inputs**2 * (1 + 2 * tokens) + 2 * tokens * inputs + inputs * embed_dim  # one query
    return stem, stages, 2 * pool
