"""Every kind of odd image through the pipeline, from tars and tables: decoded as promised, or a slot of weight 0."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from tars import add
from test_images import BAD, encode, noise
from test_tars import batches, source

from clip_jax.data.order import FullShuffle
from clip_jax.data.reading import Part
from clip_jax.data.records import REASONS
from clip_jax.data.table_source import TableSource

SIDE = 8  # what the pipeline of the tests reads: nothing is resized, nothing cut


def odd_images():
    """Name -> (file, the pixels that a row must hold)."""
    pixels, other = noise(SIDE, SIDE), noise(SIDE, SIDE, seed=1)
    palette, still, animation = Image.fromarray(pixels).quantize(16), io.BytesIO(), io.BytesIO()
    few = np.array(palette.convert("RGB"))
    palette.save(still, "PNG")
    palette.save(animation, "GIF", save_all=True, append_images=[Image.fromarray(other).quantize(16)])
    clear = np.concatenate([pixels, np.zeros((SIDE, SIDE, 1), np.uint8)], axis=2)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    smooth = np.full((SIDE, SIDE, 3), (200, 60, 20), np.uint8)
    grey = np.linspace(0, 65_535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    return {
        "palette.png": (still.getvalue(), few),
        "alpha.png": (encode(clear, "PNG"), pixels),
        "16 bits.png": (encode(grey, "PNG"), np.repeat(np.rint(grey / 257)[..., None], 3, axis=2)),
        "animated.gif": (animation.getvalue(), few),
        "rotated.png": (encode(pixels, "PNG", exif=exif), pixels),
        "rotated.jpg": (encode(smooth, "JPEG", exif=exif), smooth),
        "cmyk.jpg": (encode(smooth, "JPEG", mode="CMYK", quality=95), smooth),
        "one pixel.png": (encode(smooth[:1, :1], "PNG"), smooth),
        "one pixel.jpg": (encode(smooth[:1, :1], "JPEG"), smooth),
        "a png called.jpg": (encode(pixels, "PNG"), pixels),
        "a jpeg called.webp": (encode(smooth, "JPEG"), smooth),
        "lossless.webp": (encode(pixels, "WEBP", lossless=True), pixels),
    }


def of_tar(tmp_path, files):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, (name, content) in enumerate(files):
            add(tar, f"{number}.{name.rpartition('.')[2]}", content)
            add(tar, f"{number}.txt", b"a caption")
    return source(str(tmp_path / "a.tar"), tmp_path)


def of_table(tmp_path, files):
    lines = ["image,caption"]
    for number, (name, content) in enumerate(files):
        (tmp_path / f"{number} {name}").write_bytes(content)
        lines.append(f"{number} {name},a caption")
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    return TableSource(tmp_path / "a.csv")


@pytest.mark.parametrize("make", [of_tar, of_table])
def test_odd_images_are_decoded_as_promised_and_bad_ones_keep_their_slots(tmp_path, make):
    odd = odd_images()
    files = [(name, content) for name, (content, _) in odd.items()]
    files += [("bad.jpg", content) for content, _ in BAD.values()]
    records = make(tmp_path, files)
    (batch,) = batches([Part(records, FullShuffle(len(files), seed=0))], 1, batch=len(files))
    rows = np.argsort(batch["index"])
    for row, (name, (_, pixels)) in zip(rows, odd.items(), strict=False):
        assert batch["weight"][row] == 1, name
        lossy = 12 if name.endswith(("jpg", "called.webp")) and "png" not in name else 0
        difference = np.abs(batch["image"][row].astype(int) - pixels).max()
        assert difference <= lossy, name
    for row, (name, (_, message)) in zip(rows[len(odd) :], BAD.items(), strict=True):
        expected = "image_too_large" if message in ("more than", "scans") else "image_damaged"
        assert REASONS[batch["bad"][row] - 1] == expected, name
        assert batch["weight"][row] == 0
        assert not batch["image"][row].any()
        assert not batch["tokens"][row].any()


def test_a_table_does_not_wait_for_what_is_no_file(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n/dev/zero,endless\n.,a folder\n")
    table = TableSource(tmp_path / "a.csv")
    (batch,) = batches([Part(table, FullShuffle(2, seed=0))], 1, batch=2)
    assert [REASONS[code - 1] for code in batch["bad"]] == ["image_missing"] * 2
