"""Decoding of odd inputs, geometry of the crops, normalisation."""

import dataclasses
import functools
import io
import json
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from references import import_open_clip

from clip_jax.data.images import (
    MAX_PIXELS,
    ImageError,
    Preprocess,
    decode,
    eval_image,
    normalize,
    to_jpeg,
)

SMALL = Preprocess(size=12)
SIDES = st.integers(1, 40)


def smooth(height, width, channels=3):
    """Low frequencies, so that a lossy format stays close to it: uint8 [h, w] or [h, w, c]."""
    y, x = np.mgrid[0:height, 0:width] / 16
    planes = [127 + 90 * np.sin(x + k) * np.cos(y - k) for k in range(channels)]
    return np.stack(planes, axis=2).squeeze().astype(np.uint8)


def encode(pixels, kind, mode=None, **options):
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_of_size(width, height):
    """A PNG whose header promises `width` x `height`, without the pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def jpeg_of_size(width, height):
    encoded = bytearray(encode(smooth(16, 16), "JPEG"))
    frame = encoded.index(b"\xff\xc0")
    encoded[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(encoded)


# Decoding


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_lossless_formats_decode_to_their_pixels(kind):
    pixels = smooth(9, 14)
    if kind == "GIF":  # 256 colours
        pixels = np.array(Image.fromarray(pixels).quantize(256).convert("RGB"))
    np.testing.assert_array_equal(decode(encode(pixels, kind)), pixels)


def test_jpeg_decodes_as_pil_does():
    encoded = encode(noise(33, 50), "JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(decode(encoded), expected)


def test_a_jpeg_with_colours_in_a_quarter_of_the_rows_is_read():
    """4:4:1, as a 4:1:1 that was turned has it: the blocks of a 4:2:0, said to lie otherwise."""
    encoded = bytearray(encode(noise(64, 64), "JPEG", subsampling="4:2:0"))
    encoded[encoded.index(b"\xff\xc0") + 11] = 0x14
    expected = np.asarray(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(decode(bytes(encoded)), expected)
    with pytest.raises(ImageError, match="the JPEG cannot be decoded"):
        decode(bytes(encoded[:-100]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind):
    grey = smooth(20, 30, channels=1)
    decoded = decode(encode(grey, kind))
    assert decoded.shape == (20, 30, 3)
    assert decoded.dtype == np.uint8
    np.testing.assert_allclose(decoded, np.repeat(grey[..., None], 3, axis=2), atol=3)


def test_palette_with_transparency_keeps_its_colours():
    pixels = np.array(Image.fromarray(smooth(16, 16)).quantize(16).convert("RGB"))
    palette = Image.fromarray(pixels).quantize(16)
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(decode(out.getvalue()), pixels)


def test_transparency_is_dropped_not_blended():
    pixels = smooth(8, 8)
    clear = np.concatenate([pixels, np.zeros((8, 8, 1), np.uint8)], axis=2)
    np.testing.assert_array_equal(decode(encode(clear, "PNG")), pixels)


def test_cmyk_jpeg_becomes_rgb():
    decoded = decode(encode(smooth(32, 32), "JPEG", mode="CMYK", quality=95))
    assert decoded.shape == (32, 32, 3)
    assert abs(decoded.mean() - smooth(32, 32).mean()) < 4


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    decoded = decode(encode(values, "PNG"))
    np.testing.assert_array_equal(decoded[..., 0], np.rint(values / 257))
    np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


def test_orientation_is_left_as_stored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    for kind in ("JPEG", "PNG"):
        assert decode(encode(smooth(10, 20), kind, exif=exif)).shape == (10, 20, 3)


JPEG = encode(smooth(64, 64), "JPEG")
PNG = encode(noise(32, 32), "PNG")


WEBP = encode(noise(32, 32), "WEBP")


def with_many_scans():
    """A progressive JPEG of 4 megapixels whose last scan is there 300 times: 30 kB that would take minutes."""
    encoded = encode(np.zeros((2_048, 2_048), np.uint8), "JPEG", progressive=True)
    last = encoded[encoded.rindex(b"\xff\xda") : -2]
    return encoded[:-2] + last * 300 + encoded[-2:]


def corrupt(encoded):
    """Wrecks the entropy-coded part and leaves headers and end alone."""
    middle = len(encoded) * 2 // 3
    return encoded[:middle] + b"\x55\xaa\x13" * 20 + encoded[middle + 60 :]


BAD = {
    "empty": (b"", "empty"),
    "web page": (b"<html>not found</html>", "not an image"),
    "JPEG, half": (JPEG[: len(JPEG) // 2], "JPEG cannot be decoded"),
    "JPEG without its end": (JPEG[:-2], "JPEG cannot be decoded"),
    "JPEG, four bytes": (JPEG[:4], "JPEG cannot be decoded"),
    "JPEG, corrupt": (corrupt(encode(noise(64, 64), "JPEG")), "JPEG cannot be decoded"),
    "PNG, half": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "PNG, corrupt": (corrupt(PNG), "cannot be decoded"),
    "WebP, half": (WEBP[: len(WEBP) // 2], "cannot be decoded"),
    "WebP, corrupt": (WEBP[:20] + b"\x55\xaa\x13" * 4 + WEBP[32:], "not an image|cannot be decoded"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "JPEG of many scans": (with_many_scans(), "scans"),
    "float pixels": (encode(np.ones((4, 4), np.float32), "TIFF"), "float pixels"),
    "beyond 16 bits": (encode(np.full((4, 4), 70_000, np.int32), "TIFF"), "outside 0..65535"),
    "JPEG bomb": (jpeg_of_size(60_000, 60_000), "more than"),
    "PNG bomb": (png_of_size(8_200, 8_200), "more than"),
    "PNG bomb that PIL warns of": (png_of_size(10_000, 10_000), "more than"),
    "PNG bomb that PIL refuses": (png_of_size(100_000, 100_000), "more than"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_in_one_line(name):
    encoded, reason = BAD[name]
    with pytest.raises(ImageError, match=reason) as caught:
        decode(encoded)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("default")
def test_a_bomb_is_refused_where_warnings_are_no_errors():
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match="10000 x 10000"):
        decode(png_of_size(10_000, 10_000))


def test_the_largest_image_is_still_within_the_cap():
    width = 8_192
    with pytest.raises(ImageError, match="cannot be decoded"):  # it is the missing pixels that fail
        decode(png_of_size(width, MAX_PIXELS // width))


# Geometry


@pytest.fixture(scope="module")
def open_clip_steps():
    """Size -> open_clip's steps of evaluation: resize, centre crop, RGB, to tensor, normalise."""
    open_clip = import_open_clip()
    return functools.cache(lambda size: open_clip.image_transform(size, is_train=False).transforms)


@given(height=SIDES, width=SIDES, size=st.integers(1, 24))
def test_eval_image_is_open_clips(open_clip_steps, height, width, size):
    pixels = noise(height, width)
    resize, centre_crop, *_ = open_clip_steps(size)
    expected = np.asarray(centre_crop(resize(Image.fromarray(pixels))))
    np.testing.assert_array_equal(eval_image(pixels, Preprocess(size=size)), expected)


def test_eval_image_normalized_is_open_clips_tensor(open_clip_steps):
    image = Image.fromarray(noise(300, 411))
    expected = functools.reduce(lambda value, step: step(value), open_clip_steps(224), image)
    found = normalize(eval_image(np.asarray(image), Preprocess()), Preprocess())
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected.numpy(), rtol=0, atol=2e-6)


# Normalisation and the record of it


def test_normalize_is_the_formula_in_numpy_and_under_jit():
    preprocess = Preprocess()
    pixels = noise(16, 16).reshape(4, 8, 8, 3)
    expected = (pixels / 255 - np.asarray(preprocess.mean)) / np.asarray(preprocess.std)
    here = normalize(pixels, preprocess, "float32")
    there = jax.jit(lambda images: normalize(images, preprocess, jnp.float32))(pixels)
    assert isinstance(here, np.ndarray)
    assert here.dtype == np.float32
    assert there.dtype == jnp.float32
    np.testing.assert_allclose(here, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(there, expected, rtol=0, atol=2e-6)


def test_normalize_rounds_once():
    pixels = jnp.asarray(noise(8, 8))
    low = normalize(pixels, Preprocess(), "bfloat16")
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, normalize(pixels, Preprocess(), jnp.float32).astype(jnp.bfloat16))


def test_normalized_noise_of_the_training_data_has_mean_0_and_std_1():
    preprocess = Preprocess()
    rng = np.random.default_rng(0)
    values = rng.normal(np.asarray(preprocess.mean) * 255, np.asarray(preprocess.std) * 255 / 4, (200, 200, 3))
    result = normalize(np.rint(values).astype(np.uint8), preprocess)
    np.testing.assert_allclose(result.mean((0, 1)), 0, atol=0.01)
    np.testing.assert_allclose(result.std((0, 1)), 1 / 4, atol=0.01)


def test_preprocess_is_plain_json():
    preprocess = Preprocess(size=32)
    assert json.loads(json.dumps(preprocess.to_dict())) == preprocess.to_dict()
    assert preprocess.to_dict().keys() == {field.name for field in dataclasses.fields(preprocess)}
    assert preprocess.mean == (0.48145466, 0.4578275, 0.40821073)
    assert preprocess.std == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
@pytest.mark.parametrize("longest", [100, 50])  # PIL thins out what is 4 times larger before it resizes
def test_thumbnails_of_every_mode(mode, longest):
    image = Image.new("RGB", (300, 60), (200, 30, 40)).convert("L" if mode == "I;16" else mode.removesuffix("A"))
    image = image.convert("LA").convert("PA") if mode == "PA" else image.convert(mode)
    small = Image.open(io.BytesIO(to_jpeg(image, longest=longest)))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (longest, longest // 5))
    assert image.size == (300, 60)  # what was given is as it was


def test_a_thumbnail_of_16_bit_grey_shows_it():
    """The range of 16 bits is scaled, so that what is dark and what is bright can be told apart."""
    grey = np.repeat(np.linspace(0, 65_535, 256, dtype=np.uint16)[None], 64, axis=0)
    for kind in (np.uint16, np.int32):  # PIL's I;16, and I, which TIFF may hold them as
        image = Image.fromarray(grey.astype(kind))
        shown = np.asarray(Image.open(io.BytesIO(to_jpeg(image, longest=32))).convert("L"), float)
        np.testing.assert_allclose(shown.mean(axis=0), np.linspace(4, 251, 32), atol=4)


@pytest.mark.parametrize("use", [lambda image: to_jpeg(image, longest=8), lambda image: eval_image(image, SMALL)])
def test_what_pil_cannot_convert_is_an_image_error(use):
    with pytest.raises(ImageError, match="the image cannot be decoded: conversion from La to L not supported"):
        use(Image.new("La", (64, 64)))
