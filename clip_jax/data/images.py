"""Images from encoded bytes to what the image tower reads.

The host decodes and crops to uint8 [s, s, 3]; `normalize` runs on the device, inside jit, so that a quarter of the
float32 bytes cross to it. Training and evaluation resize with PIL's antialiased bicubic filter, as CLIP was trained
and is measured (paper §2.4-2.5; openai/CLIP `clip/clip.py`; open_clip `transform.py`). What training draws at random is
in `clip_jax.data.augment`.

EXIF orientation is not applied and transparency is dropped, not blended: CLIP's preprocessing sees the pixels as they
are stored. Imports neither JAX nor TensorFlow, for worker processes start with it.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from clip_jax.config import DataConfig
from clip_jax.errors import UserError, one_line
from clip_jax.models.variants import ModelConfig
from clip_jax.typed import convert

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    ImageLike = bytes | np.ndarray | PILImage
    Images = ImageLike | str | Path | list | tuple
else:
    PILImage = ImageLike = Images = Any  # PIL is imported where images are: synthetic pairs do without it

T = TypeVar("T")

MAX_PIXELS = 1 << 26
"""Images of more pixels are refused before a pixel is decoded: as RGB they would take over 192 MiB."""

MAX_JPEG_WORK = 1 << 30
"""A JPEG is refused if its pixels times its scans are more: each scan of a progressive file may touch all pixels again,
and a few kilobytes can hold thousands."""

_JPEG, _SCAN = b"\xff\xd8\xff", b"\xff\xda"
_LONGEST_JPEG = 65_500  # libjpeg's; the format has 35 more

# Not all that PIL knows: EPS would start another program, and some formats have sizes of their own inside.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")


class ImageError(UserError, ValueError):
    """An image that cannot be decoded; the message is one line with the reason.

    Attributes:
      reason: one of `clip_jax.data.records.REASONS`.
    """

    reason = "image_damaged"


class ImageTooLargeError(ImageError):
    """An image of more than MAX_PIXELS pixels, or one that takes too long."""

    reason = "image_too_large"


@dataclass(frozen=True)
class Preprocess:
    """How pixels become the image tower's input; saved with every checkpoint.

    It can be called: `preprocess(images)` resizes, cuts and normalises as in evaluation.

    Attributes:
      size: side of the square that the tower reads.
      mean: of red, green and blue, on a scale of 0 to 1.
      std: of red, green and blue, on the same scale.
    """

    size: int = 224
    mean: tuple[float, float, float] = DataConfig.mean
    std: tuple[float, float, float] = DataConfig.std

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON holds them."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """Returns what `to_dict` wrote.

        Raises:
          ConfigError: an unknown or missing key, or a wrong type.
        """
        return convert(values, cls, "preprocess")

    def __call__(self, images: Images, *, first: int = 0) -> np.ndarray:
        """Returns images as the tower reads them in evaluation: float32 [s, s, 3], for several [b, s, s, 3].

        Args:
          images: an image or a list of images: a path, encoded bytes, PIL's, or uint8 [h, w, 3].
          first: place of the list's first image, for messages.

        Raises:
          ImageError: what is no image, by its path or its place in the list.
        """
        if not isinstance(images, list | tuple):
            return normalize(eval_image(_opened(images, "the image"), self), self)
        if not images:
            raise ImageError("there is no image in the list")
        return np.stack(
            [normalize(eval_image(_opened(image, f"image {i}"), self), self) for i, image in enumerate(images, first)]
        )


def as_list(images: Images) -> list | tuple:
    """Returns a list of images as it is, and a single image as a list of one."""
    return images if isinstance(images, list | tuple) else [images]


def preprocess_of(model: ModelConfig, data: DataConfig | None = None) -> Preprocess:
    """Returns the preprocessing at a model's size: CLIP's, or that of the data it is trained on."""
    data = data or DataConfig()
    return Preprocess(model.vision.image_size, data.mean, data.std)


def decode(encoded: bytes) -> np.ndarray:
    """Returns the image as uint8 [h, w, 3], red, green, blue.

    JPEG is read strictly: a truncated or corrupt scan is refused, where PIL and OpenCV return garbage without a word.
    AVIF, BMP, GIF, PNG, PPM, TIFF and WebP are read by PIL; of an animation, the first frame. 16-bit grey is scaled to
    8 bits.

    Raises:
      ImageError: not an image, damaged, of more than MAX_PIXELS pixels, or of a pixel format without an agreed range.
    """
    if encoded.startswith(_JPEG):
        return decode_jpeg(encoded)
    return _with_pil(encoded, _to_rgb)


def open_image(image: bytes | np.ndarray) -> PILImage:
    """Returns an encoded image, or uint8 [h, w, 3], as PIL's, in the mode in which it is stored; as strict as `decode`.

    Raises:
      ImageError: as `decode`.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if not image.startswith(_JPEG):
        return _with_pil(image, lambda opened: opened.copy())
    pixels = decode_jpeg(image)  # equal to PIL's, but strict
    return _with_pil(image, lambda opened: opened.copy() if opened.mode == "CMYK" else Image.fromarray(pixels))


def eval_image(image: ImageLike, preprocess: Preprocess) -> np.ndarray:
    """Returns uint8 [s, s, 3]: the shorter side resized to s (bicubic), then the centre, then RGB.

    Equal to open_clip's evaluation transform, with which CLIP's figures are measured: torchvision's
    `Resize(s, BICUBIC)` and `CenterCrop(s)` in the mode in which the image is stored, and only then RGB. So a palette
    is resized without mixing colours, transparent pixels do not bleed, and 16-bit grey is clipped to white, where
    `decode`, which training uses, scales it.

    Args:
      image: encoded, PIL's, or uint8 [h, w, 3].
      preprocess: s is its size.

    Raises:
      ImageError: as `decode`; of a pixel format that PIL cannot convert; or a strip so long that, resized, it has more
        than MAX_PIXELS pixels.
    """
    if isinstance(image, bytes | np.ndarray):
        image = open_image(image)
    size = preprocess.size
    with _one_kind_of_error():
        resized = resize(image, *resized_size(*image.size, size))
        left, top = (round((side - size) / 2) for side in resized.size)
        return np.array(_drop_to_rgb(resized.crop((left, top, left + size, top + size))))


def normalize(images: Any, preprocess: Preprocess, dtype: Any = "float32") -> Any:
    """Returns (images / 255 - mean) / std, computed in float32 or wider and rounded once to `dtype`.

    Args:
      images: uint8 [..., 3], a NumPy or JAX array; traced under jit, it runs on the device.
      preprocess: its mean and std.
      dtype: of the result.

    Returns:
      [..., 3], an array of the library that `images` came from.
    """
    wide = np.promote_types(dtype, np.float32)
    mean, std = np.asarray(preprocess.mean, wide), np.asarray(preprocess.std, wide)
    return ((images.astype(wide) / wide.type(255) - mean) / std).astype(dtype)


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Returns (width, height) of a JPEG; None for another format.

    Raises:
      ImageError: damaged, of more than MAX_PIXELS pixels, or of so many scans that it would take minutes.
    """
    if not encoded.startswith(_JPEG):
        return None
    import simplejpeg

    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
    except KeyError:  # of colours in a quarter of the rows (4:4:1), which it decodes, and has no name for
        width, height = _with_pil(encoded, lambda opened: opened.size)
    except ValueError as error:
        raise ImageError(f"the JPEG cannot be decoded: {one_line(error)}") from None
    _check_size(int(width), int(height))
    if (scans := encoded.count(_SCAN)) * int(width) * int(height) > MAX_JPEG_WORK:
        raise ImageTooLargeError(f"the JPEG has {scans:,} scans of {width} x {height} pixels")
    return int(width), int(height)


def decode_jpeg(encoded: bytes, *, width: int = 0, height: int = 0) -> np.ndarray:
    """Returns a JPEG as uint8 [h, w, 3]; with the decoder's own scaling, if it then still has these sizes at least.

    Args:
      encoded: the file.
      width: 0 for no scaling.
      height: 0 for no scaling.

    Raises:
      ImageError: as `decode`.
    """
    import simplejpeg

    jpeg_size(encoded)
    least = 2 if width and height else 1
    try:
        return simplejpeg.decode_jpeg(encoded, min_width=width, min_height=height, min_factor=least)
    except ValueError as error:
        raise ImageError(f"the JPEG cannot be decoded: {one_line(error)}") from None


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Returns uint8 [h, w, 3] as a JPEG with half the resolution in its colours (4:2:0), as JPEGs of the web have it.

    Args:
      pixels: red, green, blue.
      quality: 1 to 100.

    Raises:
      ImageTooLargeError: a side is longer than a JPEG's can be.
    """
    import simplejpeg

    height, width = pixels.shape[:2]
    if max(height, width) > _LONGEST_JPEG:
        raise ImageTooLargeError(f"a JPEG cannot have {width} x {height} pixels; {_LONGEST_JPEG:,} a side is the most")
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling="420")


def _with_pil(encoded: bytes, use: Callable[[PILImage], T]) -> T:
    """Returns what `use` makes of an image that PIL opened."""
    from PIL import Image

    if not encoded:
        raise ImageError("the image is empty (0 bytes)")
    with _one_kind_of_error(encoded), Image.open(io.BytesIO(encoded), formats=_formats()) as image:
        _check_size(*image.size)
        _check_range(image)
        return use(image)


@contextlib.contextmanager
def _one_kind_of_error(encoded: bytes = b"") -> Iterator[None]:
    """Says as an ImageError what PIL could not do with an image.

    Its readers are many; on damaged bytes they raise OSError, SyntaxError, struct.error, IndexError and more. A pixel
    format that cannot be resized or converted is a ValueError.
    """
    from PIL import Image

    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLargeError(f"the image has more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"not an image of a kind that is read ({', '.join(_formats())}); it begins with {encoded[:16]!r}"
        ) from None
    except Exception as error:
        raise ImageError(f"the image cannot be decoded: {one_line(error)}") from None


@functools.cache
def _formats() -> list[str]:
    """Returns which of the formats this build of PIL knows."""
    from PIL import Image

    Image.init()
    return [each for each in _FORMATS if each in Image.OPEN]


def _to_rgb(image: PILImage) -> np.ndarray:
    if image.mode.startswith("I"):
        return _scale_16_bits(np.asarray(image), image.mode)
    return np.asarray(_drop_to_rgb(image))


def _drop_to_rgb(image: PILImage) -> PILImage:
    """Drops transparency without blending."""
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, PIL warns of the transparency
    return image.convert("RGB")


def _check_range(image: PILImage) -> None:
    if image.mode == "F":
        raise ImageError("the image has float pixels (PIL mode F), whose range is not known")


def _scale_16_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """Returns uint8 [h, w, 3] of grey in 0..65535; `convert("RGB")` would clip it to white."""
    if grey.min() < 0 or grey.max() > 65_535:
        raise ImageError(f"the image has pixels outside 0..65535 (PIL mode {mode})")
    scaled = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.repeat(scaled[:, :, None], 3, axis=2)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageTooLargeError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS:,}")


def resized_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Returns (width, height) of an image whose shorter side is resized to `size`, rounded down as torchvision does.

    Raises:
      ImageError: so long a strip that it would have more than MAX_PIXELS pixels.
    """
    shorter = min(width, height)
    new_width, new_height = width * size // shorter, height * size // shorter
    if new_width * new_height > MAX_PIXELS:
        raise ImageTooLargeError(
            f"the image is a strip of {width} x {height} pixels; enlarged to {size}, it is too large"
        )
    return new_width, new_height


def to_jpeg(image: PILImage, *, longest: int) -> bytes:
    """Returns a small JPEG for people to look at; its longer side has so many pixels at most.

    16-bit grey is scaled to 8 bits.

    Raises:
      ImageError: of a pixel format that PIL cannot convert.
    """
    from PIL import Image

    buffer = io.BytesIO()
    with _one_kind_of_error():
        small = image.copy()
        if small.mode == "P" or small.mode.startswith("I"):
            small = Image.fromarray(_to_rgb(small))
        small.thumbnail((longest, longest))
        _drop_to_rgb(small).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def resize(image: PILImage, width: int, height: int) -> PILImage:
    """Returns the image resized with PIL's antialiased bicubic filter."""
    from PIL import Image

    return image.resize((width, height), Image.Resampling.BICUBIC)


def _opened(image: ImageLike | str | Path, what: str) -> ImageLike:
    """Returns an image that `eval_image` takes; `what` names it where it has no path."""
    from PIL import Image

    if isinstance(image, str | Path):
        what = str(image)
        image = _read(Path(image))
    if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
        raise ImageError(f"{what} is an array of {image.dtype} {list(image.shape)}, not of uint8 [h, w, 3]")
    if not isinstance(image, bytes | np.ndarray | Image.Image):
        raise ImageError(f"{what} is a {type(image).__name__}, not a path, bytes, a PIL image or uint8 [h, w, 3]")
    try:
        return open_image(image) if isinstance(image, bytes) else image
    except ImageError as error:
        raise type(error)(f"{what}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from None
