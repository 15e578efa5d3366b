"""Crops, the fast resize beside PIL's, colours."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image
from tiny import TINY

from clip_jax.config import DataConfig
from clip_jax.data.augment import Augment, _random_box, _scaled, random_crop, resized_crop, square_crop
from clip_jax.data.images import ImageError, Preprocess, eval_image
from clip_jax.data.loader import transform_of

SIDES = st.integers(1, 60)
SMALL = Preprocess(size=12)
EXACT = Augment(resize="exact")
FAST = Augment()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(SIDES, SIDES, st.integers(0, 2**32))
def test_crops_are_squares_of_the_asked_size(height, width, seed):
    pixels = noise(height, width)
    for crop in (square_crop, resized_crop):
        image = crop(pixels, SMALL, np.random.default_rng(seed), EXACT)
        assert image.shape == (12, 12, 3)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, crop(pixels, SMALL, np.random.default_rng(seed), EXACT))


@given(SIDES)
def test_square_crop_of_a_square_is_the_eval_image(side):
    pixels = noise(side, side)
    for seed in range(3):
        np.testing.assert_array_equal(
            square_crop(pixels, SMALL, np.random.default_rng(seed), EXACT), eval_image(pixels, SMALL)
        )


@pytest.mark.parametrize(("height", "width", "axis"), [(12, 30, 1), (30, 12, 0)])
def test_square_crop_moves_along_the_longer_side_over_every_place(height, width, axis):
    ramp = np.arange(30, dtype=np.uint8).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
    pixels = np.ascontiguousarray(np.broadcast_to(ramp, (height, width, 3)))  # already resized: the shorter side is 12
    places = {int(square_crop(pixels, SMALL, np.random.default_rng(seed), EXACT)[0, 0, 0]) for seed in range(300)}
    assert places == set(range(30 - 12 + 1))


@given(st.integers(100, 250), st.integers(100, 250), st.integers(0, 2**32))
def test_resized_crop_keeps_to_its_scale_and_ratio(height, width, seed):
    """Column and row numbers as pixels show which rectangle was taken."""
    low, high = 0.5, 0.8
    numbers = np.zeros((height, width, 3), np.uint8)
    numbers[..., 0], numbers[..., 1] = np.arange(width), np.arange(height)[:, None]
    cut = resized_crop(numbers, Preprocess(size=16), np.random.default_rng(seed), Augment(scale=(low, high))).astype(
        float
    )
    # Between rows or columns 4 and 12 of 16 lies half of the rectangle, and no border disturbs the filter.
    w, h = 2 * (cut[8, 12, 0] - cut[8, 4, 0]), 2 * (cut[12, 8, 1] - cut[4, 8, 1])
    if height * 3 / 4 <= width <= height * 4 / 3:  # else the fall-back may come
        assert low * 0.93 < w * h / (width * height) < high * 1.07
    assert 3 / 4 * 0.95 < w / h < 4 / 3 * 1.05


def test_boxes_are_drawn_as_torchvisions():
    """Area uniform, aspect log-uniform, and every place of the image reached."""
    rng, augment = np.random.default_rng(0), Augment(scale=(0.2, 0.4))
    boxes = np.array([_random_box(1_000, 1_000, rng, augment) for _ in range(3_000)])
    shares, aspects = boxes[:, 2] * boxes[:, 3] / 1e6, np.log(boxes[:, 2] / boxes[:, 3])
    assert abs(shares.mean() - 0.3) < 0.004
    assert abs(aspects.mean()) < 0.01  # a uniform aspect's is 0.027
    small = np.array([_random_box(9, 9, rng, augment) for _ in range(300)])
    for begin, length in ((0, 2), (1, 3)):
        places = small[:, begin], small[:, begin] + small[:, length]
        assert (places[0].min(), places[1].max()) == (0, 9)


def test_resized_crop_of_everything_is_the_resized_image():
    pixels = noise(30, 30)
    augment = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), resize="exact")
    whole = resized_crop(pixels, SMALL, np.random.default_rng(0), augment)
    np.testing.assert_array_equal(whole, np.asarray(Image.fromarray(pixels).resize((12, 12), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(("height", "width", "box"), [(10, 100, (43, 0, 56, 10)), (100, 10, (0, 43, 10, 56))])
def test_resized_crop_of_a_strip_falls_back_to_its_centre(height, width, box):
    pixels = noise(height, width)
    expected = Image.fromarray(pixels).crop(box).resize((12, 12), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized_crop(pixels, SMALL, np.random.default_rng(0), EXACT), np.asarray(expected))


def test_a_crop_of_a_jpeg_at_part_of_its_size_has_a_pixel_at_least():
    assert [_scaled(begin, length, 0.25) for begin, length in ((4, 1), (4, 8))] == [slice(1, 2), slice(1, 3)]


@pytest.mark.parametrize("crop", [eval_image, square_crop])
def test_a_strip_that_would_grow_beyond_the_cap_is_refused(crop):
    arguments = [] if crop is eval_image else [np.random.default_rng(0), EXACT]
    with pytest.raises(ImageError, match="strip of 4000 x 1"):
        crop(np.zeros((1, 4_000, 3), np.uint8), Preprocess(size=224), *arguments)


# The fast resize


@pytest.mark.parametrize(("height", "width", "size"), [(20, 40, 30), (40, 20, 30), (300, 300, 12)])
def test_what_grows_or_shrinks_by_much_is_resized_by_pil(height, width, size):
    pixels, aspect = noise(height, width), width / height
    fast, exact = (
        resized_crop(
            pixels,
            Preprocess(size=size),
            np.random.default_rng(0),
            Augment(scale=(1.0, 1.0), ratio=(aspect, aspect), resize=how),
        )
        for how in ("fast", "exact")
    )
    np.testing.assert_array_equal(fast, exact)


def photo(width, height):
    """A photograph, cut and made smaller to this size."""
    pixels = Image.fromarray(load_sample_image("china.jpg"))
    scale = min(pixels.width / width, pixels.height / height)
    box = (0, 0, int(width * scale), int(height * scale))
    return np.asarray(pixels.resize((width, height), Image.Resampling.LANCZOS, box=box))


def as_jpeg(pixels, quality=85):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize(("width", "height"), [(256, 256), (320, 240), (512, 384), (427, 640), (500, 333), (1100, 700)])
@pytest.mark.parametrize("crop", ["square", "resized"])
def test_the_fast_resize_is_within_a_grey_level_of_pils(width, height, crop):
    encoded = as_jpeg(photo(width, height))
    fast, exact = (
        random_crop(encoded, Preprocess(), np.random.default_rng(1), Augment(crop=crop, resize=how)).astype(float)
        for how in ("fast", "exact")
    )
    difference = np.abs(fast - exact)
    print(f"{width}x{height} {crop}: mean {difference.mean():.2f}, largest {difference.max():.0f}")
    assert 0 < difference.mean() <= 1


def zone_plate(side):
    """Rings whose frequency grows from 0 in the centre to the Nyquist limit at the middle of the sides."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    grey = np.cos(np.pi * side * 0.98 * (x * x + y * y)) * 127 + 128
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def moire(pixels, scale):
    """Standard deviation where an ideal filter leaves plain grey: well beyond the new Nyquist limit."""
    y, x = np.mgrid[: len(pixels), : len(pixels)] / len(pixels) - 0.5
    radius = np.hypot(x, y)
    return pixels[..., 0][(0.98 * radius > 0.65 / scale) & (radius < 0.5)].std()


@pytest.mark.parametrize("side", [300, 384, 512, 700, 1000, 2000])
@pytest.mark.parametrize("encoded", [False, True])
def test_a_zone_plate_aliases_no_more_than_pils(side, encoded):
    pixels = zone_plate(side)
    image = as_jpeg(pixels, quality=95) if encoded else pixels
    found = {
        how: moire(random_crop(image, Preprocess(), np.random.default_rng(0), Augment(resize=how)), side / 224)
        for how in ("fast", "exact")
    }
    print(f"{side} -> 224: {found['fast']:.1f} beside PIL's {found['exact']:.1f}")
    assert found["fast"] <= found["exact"] + 0.5


def test_jpegs_much_larger_than_needed_are_decoded_at_part_of_their_size(monkeypatch):
    from clip_jax.data import augment

    sizes = []
    decode = augment.decode_jpeg
    monkeypatch.setattr(augment, "decode_jpeg", lambda *a, **k: sizes.append(decode(*a, **k).shape) or decode(*a, **k))
    encoded = as_jpeg(photo(2500, 2000))
    for how in (FAST, EXACT):
        random_crop(encoded, Preprocess(), np.random.default_rng(0), how)
    assert sizes[0][0] < 2000
    assert sizes[0][0] >= 4 * 224
    assert sizes[1] == (2000, 2500, 3)
    random_crop(encoded, Preprocess(), np.random.default_rng(0), Augment(crop="resized", scale=(0.1, 0.1)))
    assert sizes[2] == (2000, 2500, 3), "a small part of the image has none to spare"


# Colours


def test_colours_are_off_by_default_and_drawn_after_the_crop():
    pixels = noise(40, 60)
    plain = random_crop(pixels, SMALL, np.random.default_rng(3), FAST)
    grey = random_crop(pixels, SMALL, np.random.default_rng(3), Augment(grayscale=1.0))
    np.testing.assert_array_equal(grey, np.repeat(np.asarray(Image.fromarray(plain).convert("L"))[:, :, None], 3, 2))
    jittered = random_crop(
        pixels, SMALL, np.random.default_rng(3), Augment(color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=1.0)
    )
    assert (jittered != plain).any()


def test_brightness_is_a_factor_within_its_strength():
    pixels = np.full((12, 12, 3), 100, np.uint8)
    augment = Augment(color_jitter=(0.3, 0.0, 0.0, 0.0), color_jitter_prob=1.0)
    found = [random_crop(pixels, SMALL, np.random.default_rng(seed), augment)[0, 0, 0] for seed in range(200)]
    assert min(found) >= 69
    assert max(found) <= 130
    assert max(found) - min(found) > 50
    more = Augment(color_jitter=(2.0, 0.0, 0.0, 0.0), color_jitter_prob=1.0)
    dark = [random_crop(pixels, SMALL, np.random.default_rng(seed), more)[0, 0, 0] < 5 for seed in range(200)]
    assert np.mean(dark) < 0.1, "a factor below 0"


def test_colours_change_in_any_order_and_hues_both_ways(monkeypatch):
    calls = []

    def recorded(name):
        enhancer = getattr(ImageEnhance, name)
        monkeypatch.setattr(ImageEnhance, name, lambda image: calls.append(name) or enhancer(image))

    for name in ("Brightness", "Contrast", "Color"):
        recorded(name)
    red, hues = np.full((12, 12, 3), (200, 50, 50), np.uint8), set()
    for seed in range(60):
        random_crop(red, SMALL, np.random.default_rng(seed), Augment(color_jitter=(0.1,) * 4, color_jitter_prob=1.0))
        hue = Augment(color_jitter=(0.0, 0.0, 0.0, 0.1), color_jitter_prob=1.0)
        _, green, blue = random_crop(red, SMALL, np.random.default_rng(seed), hue)[0, 0].astype(int)
        hues.add(np.sign(green - blue))
    assert len({tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)}) == 6
    assert {-1, 1} <= hues


def test_colours_change_for_their_share_of_the_images():
    pixels = noise(12, 12)
    augment = Augment(color_jitter=(0.5, 0.5, 0.5, 0.5), color_jitter_prob=0.25, grayscale=0.25)
    plain = random_crop(pixels, SMALL, np.random.default_rng(0), FAST)
    images = [random_crop(pixels, SMALL, np.random.default_rng(seed), augment) for seed in range(400)]
    kept = np.mean([(image == plain).all() for image in images])
    grey = np.mean([(image[..., 0] == image[..., 1]).all() for image in images])
    assert abs(kept - 0.75**2) < 0.1
    assert abs(grey - 0.25) < 0.08


def test_a_runs_augmentation_is_what_its_config_says():
    drawn = {"resize": "exact", "color_jitter": (0.1, 0.2, 0.3, 0.05), "color_jitter_prob": 0.8, "grayscale": 0.2}
    data = DataConfig(crop="resized", crop_scale=(0.2, 0.9), **drawn)
    transform = transform_of(dataclasses.replace(TINY, data=data))
    assert transform.augment == Augment("resized", (0.2, 0.9), **drawn)
    assert (transform.preprocess.size, transform.context) == (16, 12)
