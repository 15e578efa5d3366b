"""The evaluation transform against open_clip's, over images of every kind; and preprocessing as users call it."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image
from references import import_open_clip

from clip_jax.data.images import ImageError, Preprocess, preprocess_of
from clip_jax.errors import ConfigError
from clip_jax.models.variants import model_config

SIZE = 32
SIZES = [
    (1, 1),
    (1, 50),
    (50, 1),
    (3, 5),
    (20, 30),
    (32, 32),
    (31, 47),
    (33, 200),
    (64, 64),
    (90, 60),
    (97, 128),
    (200, 33),
]


def pixels(height, width, channels=3):
    """Soft noise: coarse random values, enlarged."""
    rng = np.random.default_rng((height, width, channels))
    coarse = rng.integers(0, 256, (height // 6 + 1, width // 6 + 1, channels), np.uint8)
    return np.dstack(
        [Image.fromarray(coarse[:, :, i]).resize((width, height), Image.Resampling.BICUBIC) for i in range(channels)]
    )


def rgb(height, width):
    return Image.fromarray(pixels(height, width))


def rgba(height, width):
    return Image.fromarray(pixels(height, width, 4), "RGBA")


def palette_with_alpha(height, width):
    image = rgb(height, width).quantize(16)
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


def grey_16(height, width):
    return Image.fromarray(pixels(height, width, 1)[:, :, 0].astype(np.uint16) * 257)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"format": "JPEG", "exif": exif}


KINDS = {
    "RGB, PNG": (rgb, {"format": "PNG"}),
    "RGB, BMP": (rgb, {"format": "BMP"}),
    "RGB, WebP": (rgb, {"format": "WEBP", "quality": 80}),
    "RGB, JPEG": (rgb, {"format": "JPEG", "quality": 85}),
    "RGB, JPEG 4:4:4": (rgb, {"format": "JPEG", "quality": 95, "subsampling": 0}),
    "RGB, progressive JPEG": (rgb, {"format": "JPEG", "progressive": True}),
    "RGB, GIF": (rgb, {"format": "GIF"}),
    "EXIF, turned by 90°": (rgb, turned(6)),
    "EXIF, mirrored": (rgb, turned(2)),
    "grey, PNG": (lambda *size: rgb(*size).convert("L"), {"format": "PNG"}),
    "grey, JPEG": (lambda *size: rgb(*size).convert("L"), {"format": "JPEG"}),
    "black and white": (lambda *size: rgb(*size).convert("1"), {"format": "PNG"}),
    "grey, 16 bits, PNG": (grey_16, {"format": "PNG"}),
    "grey, 32 bits, TIFF": (lambda *size: grey_16(*size).convert("I"), {"format": "TIFF"}),
    "palette": (lambda *size: rgb(*size).quantize(16), {"format": "PNG"}),
    "palette with alpha": (palette_with_alpha, {"format": "PNG"}),
    "RGB and alpha": (rgba, {"format": "PNG"}),
    "RGB and alpha, WebP": (rgba, {"format": "WEBP", "lossless": True}),
    "grey and alpha": (lambda *size: rgba(*size).convert("LA"), {"format": "PNG"}),
    "CMYK, JPEG": (lambda *size: rgb(*size).convert("CMYK"), {"format": "JPEG", "quality": 95}),
    "CMYK, TIFF": (lambda *size: rgb(*size).convert("CMYK"), {"format": "TIFF"}),
}


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def open_clips(data):
    """open_clip's evaluation transform of a file, as float32 [s, s, 3]."""
    transform = import_open_clip().image_transform(SIZE, is_train=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of palettes with transparency
        return transform(Image.open(io.BytesIO(data))).numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluation_image_equals_open_clips(kind):
    make, options = KINDS[kind]
    preprocess, differences, means = Preprocess(size=SIZE), [], []
    for size in SIZES:
        data = encoded(make(*size), **options)
        ours, theirs = preprocess(data), open_clips(data)
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype == np.float32
        differences.append(np.abs(ours - theirs).max() * max(preprocess.std))
        means.append(ours.mean())
    print(f"{kind}: {len(SIZES)} images, largest difference {255 * max(differences):.4f} / 255")
    assert np.max(differences) <= 1 / 255
    assert np.ptp(means) > 0.01


def test_the_corpus_is_large_enough():
    assert len(KINDS) * len(SIZES) >= 200


def test_everything_that_is_an_image_may_be_given(tmp_path):
    image = rgb(40, 60)
    data = encoded(image, format="PNG")
    (tmp_path / "cat.png").write_bytes(data)
    preprocess = Preprocess(size=SIZE)
    given = [image, data, np.asarray(image), str(tmp_path / "cat.png"), tmp_path / "cat.png"]
    alone = [preprocess(each) for each in given]
    assert alone[0].shape == (SIZE, SIZE, 3)
    for each in alone:
        np.testing.assert_array_equal(each, alone[0])
    for several in (given, tuple(given)):
        np.testing.assert_array_equal(preprocess(several), np.stack(alone))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"^there is no image in the list$"),
        (np.zeros((4, 4, 3), np.float32), r"^the image is an array of float32 \[4, 4, 3\], not of uint8 \[h, w, 3\]$"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((3, 4, 4), np.uint8)], r"^image 1 is an array of uint8 \[3, 4, 4\]"),
        (None, r"^the image is a NoneType, not a path"),
        ([b"no image"], r"^image 0: not an image of a kind that is read"),
        (b"", r"^the image: the image is empty"),
        ("/nowhere/cat.png", r"^/nowhere/cat\.png cannot be read: No such file"),
    ],
)
def test_what_is_no_image_is_named(given, message):
    with pytest.raises(ImageError, match=message):
        Preprocess(size=SIZE)(given)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "dog.jpg"
    path.write_bytes(encoded(rgb(60, 60), format="JPEG")[:-200])
    with pytest.raises(ImageError, match=r"dog\.jpg: the JPEG cannot be decoded"):
        Preprocess(size=SIZE)([path])
    path.write_bytes(encoded(rgb(60, 60).convert("CMYK"), format="JPEG")[:-200])
    with pytest.raises(ImageError, match=r"dog\.jpg: the (JPEG|image) cannot be decoded"):
        Preprocess(size=SIZE)([path])


def test_the_spec_survives_json():
    preprocess = Preprocess(size=48, mean=(0.5, 0.25, 0.125), std=(1.0, 2.0, 3.0))
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    assert preprocess_of(model_config("ViT-L/14@336")) == Preprocess(size=336)
    for wrong in ({"sise": 48}, {"size": "48"}, {"mean": [0.5, 0.5]}):
        with pytest.raises(ConfigError, match=f"preprocess.{next(iter(wrong))}"):
            Preprocess.from_dict(preprocess.to_dict() | wrong)
