"""The square that training sees of an image: cropped and resized at random, and if asked for, with other colours.

`resize="fast"` filters with the coefficients of PIL's antialiased bicubic and then samples between the pixels by cubic
interpolation, with OpenCV's vector instructions; a JPEG that is much larger than needed is decoded at part of its size.
Against PIL's own resize it differs by under 1 grey level on average, and suppresses what would alias as well
(`benchmarks/input.py`). Where more than 6 pixels become one on a side, PIL's own is the faster one, and taken.
`resize="exact"` is PIL's.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clip_jax.data.images import Preprocess, decode, decode_jpeg, jpeg_size, resize, resized_size

_TRIES = 10
_CUBIC = -0.5
_FAST_UP_TO = 6.0
_SPARE = 4.0
"""A JPEG may be decoded at part of its size if that is still this many times the size of the crop: the decoder's own
scaling lets some of what aliases through, which the filter after it then takes out."""


@dataclass(frozen=True)
class Augment:
    """What is drawn at random for an image.

    Attributes:
      crop: `square`, the paper's random square of the resized image, or `resized`, open_clip's random resized crop.
      scale: least and greatest area of a `resized` crop, as a share of the image's.
      ratio: its least and greatest width / height.
      resize: `fast` or `exact`.
      color_jitter: how far brightness, contrast, saturation (as factors round 1) and hue (in turns, at most 0.5) may
        change.
      color_jitter_prob: share of the images whose colours change.
      grayscale: share of the images that lose their colours.
    """

    crop: Literal["square", "resized"] = "square"
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resize: Literal["fast", "exact"] = "fast"
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    color_jitter_prob: float = 0.0
    grayscale: float = 0.0


def random_crop(
    image: bytes | np.ndarray, preprocess: Preprocess, rng: np.random.Generator, augment: Augment
) -> np.ndarray:
    """Returns uint8 [s, s, 3]: a random part of an image, resized to what the tower reads.

    Args:
      image: encoded, or uint8 [h, w, 3].
      preprocess: s is its size.
      rng: the only source of what is random.
      augment: what is drawn.

    Raises:
      ImageError: it cannot be decoded.
    """
    crop = square_crop if augment.crop == "square" else resized_crop
    return _with_colors(crop(image, preprocess, rng, augment), rng, augment)


def square_crop(
    image: bytes | np.ndarray, preprocess: Preprocess, rng: np.random.Generator, augment: Augment
) -> np.ndarray:
    """Returns uint8 [s, s, 3]: a random square of the image resized as in evaluation.

    The only augmentation of the paper (§2.4). The square spans the shorter side, so it moves along the longer one. One
    draw is taken for each axis, whatever the image's shape. Arguments and errors: `random_crop`.
    """
    size = preprocess.size
    picture = _Picture(image)
    width, height = resized_size(picture.width, picture.height, size)
    left, top = (int(rng.integers(0, side - size, endpoint=True)) for side in (width, height))
    resized = _resize(picture.pixels(float(width), float(height), augment), width, height, augment)
    return resized[top : top + size, left : left + size]


def resized_crop(
    image: bytes | np.ndarray, preprocess: Preprocess, rng: np.random.Generator, augment: Augment
) -> np.ndarray:
    """Returns uint8 [s, s, 3]: a random rectangle of the image, resized to the square.

    open_clip's augmentation, torchvision's `RandomResizedCrop`: area uniform, aspect log-uniform; if no rectangle
    fits in ten tries, the largest one in the centre whose aspect is allowed. Arguments and errors: `random_crop`.
    """
    size = preprocess.size
    picture = _Picture(image)
    left, top, width, height = _random_box(picture.width, picture.height, rng, augment)
    pixels = picture.pixels(size * picture.width / width, size * picture.height / height, augment)
    # Cut before resizing: with `resize(box=)` PIL's filter would read pixels outside the rectangle.
    columns = _scaled(left, width, pixels.shape[1] / picture.width)
    rows = _scaled(top, height, pixels.shape[0] / picture.height)
    return _resize(pixels[rows, columns], size, size, augment)


def shrink(image: bytes | np.ndarray, side: int, augment: Augment) -> np.ndarray:
    """Returns uint8 [h, w, 3]: the image with its shorter side resized to `side`; a smaller one as it is.

    Args:
      image: encoded, or uint8 [h, w, 3].
      side: in pixels.
      augment: says how to resize; nothing is drawn.

    Raises:
      ImageError: it cannot be decoded.
    """
    picture = _Picture(image)
    width, height = picture.width, picture.height
    if min(width, height) > side:
        width, height = resized_size(width, height, side)
    return _resize(picture.pixels(float(width), float(height), augment), width, height, augment)


class _Picture:
    """An image whose size is known, and which is decoded when it is known how much of it is wanted."""

    def __init__(self, image: bytes | np.ndarray) -> None:
        self._jpeg, self._whole = b"", np.zeros((0, 0, 3), np.uint8)
        if isinstance(image, bytes) and (size := jpeg_size(image)):
            self._jpeg = image
            self.width, self.height = size
        else:
            self._whole = decode(image) if isinstance(image, bytes) else image
            self.height, self.width = self._whole.shape[:2]

    def pixels(self, width: float, height: float, augment: Augment) -> np.ndarray:
        """Returns uint8 [h, w, 3], of which `width` x `height` pixels are wanted; a JPEG perhaps at part of its
        size."""
        if not self._jpeg:
            return self._whole
        if augment.resize == "exact":
            return decode_jpeg(self._jpeg)
        return decode_jpeg(self._jpeg, width=math.ceil(width * _SPARE), height=math.ceil(height * _SPARE))


def _resize(pixels: np.ndarray, width: int, height: int, augment: Augment) -> np.ndarray:
    scales = pixels.shape[1] / width, pixels.shape[0] / height
    if augment.resize == "fast" and min(scales) > 1 and max(scales) <= _FAST_UP_TO:
        return _filtered_resize(pixels, width, height)
    from PIL import Image

    return np.asarray(resize(Image.fromarray(pixels), width, height))


def _filtered_resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns uint8 [height, width, 3], made smaller.

    PIL evaluates the convolution of the image with its filter, widened by the scale, at the places of the new pixels.
    Here it is evaluated at the old pixels, where its coefficients are the same for all, and interpolated between them.
    """
    cv2 = _opencv()
    x, y = _coefficients(pixels.shape[1] / width), _coefficients(pixels.shape[0] / height)
    filtered = cv2.sepFilter2D(pixels, -1, x, y, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(filtered, (width, height), interpolation=cv2.INTER_CUBIC)


@functools.lru_cache(maxsize=4096)
def _coefficients(scale: float) -> np.ndarray:
    """Returns PIL's bicubic filter, widened by a scale of at least 1, at whole distances; float32 [2r + 1]."""
    reach = math.ceil(2 * scale) - 1
    distance = np.abs(np.arange(-reach, reach + 1)) / scale
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * _CUBIC
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return (weights / weights.sum()).astype(np.float32)


@functools.cache
def _opencv() -> Any:
    import cv2

    cv2.setNumThreads(1)  # images are decoded side by side already
    return cv2


def _random_box(width: int, height: int, rng: np.random.Generator, augment: Augment) -> tuple[int, int, int, int]:
    """Returns (left, top, width, height) of a rectangle within the image."""
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*augment.scale)
        aspect = math.exp(rng.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, (width - w, height - h), endpoint=True)
            return int(left), int(top), w, h
    w = min(width, max(1, round(height * augment.ratio[1])))
    h = min(height, max(1, round(width / augment.ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def _scaled(begin: int, length: int, factor: float) -> slice:
    """Returns the pixels of a range of pixels when the image is made smaller by a factor; at least one."""
    first = round(begin * factor)
    return slice(first, max(round((begin + length) * factor), first + 1))


def _with_colors(pixels: np.ndarray, rng: np.random.Generator, augment: Augment) -> np.ndarray:
    """Returns the image after torchvision's `ColorJitter` and `Grayscale`, each for its share of the images."""
    if augment.color_jitter_prob and rng.random() < augment.color_jitter_prob:
        pixels = _jittered(pixels, rng, augment.color_jitter)
    if augment.grayscale and rng.random() < augment.grayscale:
        from PIL import Image

        grey = np.asarray(Image.fromarray(pixels).convert("L"))
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    return pixels


def _jittered(pixels: np.ndarray, rng: np.random.Generator, strengths: tuple[float, float, float, float]) -> np.ndarray:
    from PIL import Image, ImageEnhance

    image = Image.fromarray(pixels)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for change in rng.permutation(4):
        strength = strengths[change]
        if not strength:
            continue
        if change < 3:
            image = kinds[change](image).enhance(rng.uniform(max(0, 1 - strength), 1 + strength))
        else:
            hsv = np.array(image.convert("HSV"))
            hsv[..., 0] += np.uint8(round(rng.uniform(-strength, strength) * 255) % 256)
            image = Image.fromarray(hsv, "HSV").convert("RGB")
    return np.asarray(image)
