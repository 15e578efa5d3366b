"""JPEGs for the benchmarks of input, and tar shards of them.

They are cuts of scikit-learn's two photographs, made smaller to sizes that are usual in web datasets.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CAPTION = "a photo of an old temple behind a wide lake in the morning"
_DISTINCT = 64


def photographs(width: int, height: int, count: int) -> list[bytes]:
    """Returns JPEGs of this size, of quality 85."""
    images, draw = [], np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(count):
        photo = photos[number % len(photos)]
        scale = min(photo.width / width, photo.height / height) * draw.uniform(0.75, 1)
        left, top = (
            draw.uniform(0, most - side * scale) for most, side in zip(photo.size, (width, height), strict=True)
        )
        box = (left, top, left + width * scale, top + height * scale)
        buffer = io.BytesIO()
        photo.resize((width, height), Image.Resampling.LANCZOS, box=box).save(buffer, "JPEG", quality=85)
        images.append(buffer.getvalue())
    return images


def write_shards(folder: Path, *, shards: int, samples: int, size: tuple[int, int]) -> str:
    """Writes tar shards as img2dataset does, with 64 photographs over and over; returns their pattern.

    Args:
      folder: made if it is not there.
      shards: how many.
      samples: in each of them.
      size: width and height of the images.
    """
    images = photographs(*size, count=min(samples, _DISTINCT))
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(samples):
                key = f"{shard:05d}{number:04d}"
                about = json.dumps({"key": key, "caption": CAPTION, "width": size[0], "height": size[1]})
                parts = {
                    "jpg": images[number % len(images)],
                    "txt": f"{CAPTION}, {key}".encode(),
                    "json": about.encode(),
                }
                for extension, content in parts.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"
