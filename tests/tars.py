"""Tar shards for tests: small, with images whose pixels name their sample."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def picture(number, side=16):
    """A JPEG in one colour, which says the number: red and green are its high and low parts."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = number // 16 * 16, number % 16 * 16
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def add(tar, name, content, **header):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content) if info.isreg() else None)


def write_shard(path, numbers, metadata=None, image=None):
    """Writes samples as img2dataset does: image, caption, JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            about = {"caption": f"json {number}", "uid": f"{number:032x}"} | (metadata(number) if metadata else {})
            add(tar, f"{number:06d}.jpg", image(number) if image else picture(number % 256))
            add(tar, f"{number:06d}.txt", f"number {number}".encode())
            add(tar, f"{number:06d}.json", json.dumps(about).encode())
    return path


def write_shards(folder, counts, **options):
    """Writes shards 00000.tar, … with samples numbered through; returns their pattern."""
    first = 0
    for shard, count in enumerate(counts):
        write_shard(folder / f"{shard:05d}.tar", range(first, first + count), **options)
        first += count
    return f"{folder}/{{00000..{len(counts) - 1:05d}}}.tar"


def noise_shards(folder, *, shards, samples):
    """Writes shards of large images that are quick to write and take a while to prepare; returns their pattern."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(4):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (400, 500, 3), np.uint8)).save(buffer, "PNG", compress_level=0)
        images.append(buffer.getvalue())
    for shard in range(shards):
        numbers = range(samples * shard, samples * (shard + 1))
        write_shard(folder / f"{shard:05d}.tar", numbers, image=lambda number: images[number % 4])
    return f"{folder}/*.tar"


def bad_shard(path):
    """A shard with one sample of each kind of trouble; returns the reason of each."""
    good = picture(1)
    png = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(png, "PNG")
    samples = {
        "good": ({"jpg": good, "txt": b"fine"}, None),
        "no_image": ({"txt": b"only text"}, "image_missing"),
        "no_text": ({"jpg": good}, "caption_missing"),
        "blank": ({"jpg": good, "txt": b"  \n"}, "caption_missing"),
        "latin": ({"jpg": good, "txt": "caf\xe9".encode("latin-1")}, "caption_unreadable"),
        "huge": ({"jpg": good, "txt": b"x" * (1 << 17)}, "caption_unreadable"),
        "json": ({"jpg": good, "json": b"{not json"}, "caption_unreadable"),
        "cut": ({"jpg": good[:-40], "txt": b"t"}, "image_damaged"),
        "zero": ({"jpg": b"", "txt": b"t"}, "image_damaged"),
        "html": ({"jpg": b"<html>404</html>", "txt": b"t"}, "image_damaged"),
        "bomb": ({"png": png.getvalue(), "txt": b"t"}, "image_too_large"),
        "renamed": ({"png": good, "txt": b"a JPEG that is called png"}, None),
        "twice": ({"jpg": good, "txt": b"first"}, None),
    }
    with tarfile.open(path, "w") as tar:
        for key, (files, _) in samples.items():
            for extension, content in files.items():
                add(tar, f"{key}.{extension}", content)
        add(tar, "twice.jpg", good)
        add(tar, "twice.txt", b"second, under the same key")
        add(tar, "linked.txt", b"its image is a link")
        add(tar, "linked.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "../../outside.jpg", good)
        add(tar, "../../outside.txt", b"names are only names")
    return [reason for _, reason in samples.values()] + [None, "image_missing", None]
