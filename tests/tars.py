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


def write_shard(path, numbers, metadata=None):
    """Writes samples as img2dataset does: image, caption, JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            about = {"caption": f"json {number}", "uid": f"{number:032x}"} | (metadata(number) if metadata else {})
            add(tar, f"{number:06d}.jpg", picture(number % 256))
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
