"""Pairs that a core makes ready in a second, beside PIL's bicubic resize: decode, crop, resize, tokenise.

  python -m benchmarks.input [--rounds=7]

The JPEGs are cuts of scikit-learn's two photographs, made smaller to sizes that are usual in web datasets. All ways run
in turn, in one process; the best of the rounds counts. The last row reads images prepared at the model's size and a
margin.
"""

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from clip_jax.console import print_table
from clip_jax.data.augment import Augment
from clip_jax.data.images import Preprocess
from clip_jax.data.pipeline import TrainTransform
from clip_jax.data.records import Record
from clip_jax.data.tokenizer import Tokenizer

SIZES = ((256, 256), (320, 240), (512, 384), (512, 512), (640, 427))
PREPARED = (341, 256)
CAPTION = "a photo of an old temple behind a wide lake in the morning"
COUNT = 12

Way = Callable[[bytes, np.random.Generator], np.ndarray]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = [measure(photographs(*size), rounds) for size in SIZES]
    table = [[f"{width}x{height}", *row] for (width, height), row in zip(SIZES, rows, strict=True)]
    print_table(
        "Pairs a second on one core",
        ["JPEG", "PIL bicubic", "exact", "fast", "fast / PIL", "mean difference", "largest"],
        table,
    )
    original, prepared = photographs(640, 427), photographs(*PREPARED)
    pil, fast = speeds([(original, with_pil), (prepared, ours("fast"))], rounds)
    print(f"prepared at {PREPARED[0]}x{PREPARED[1]}: {fast:,.0f}/s, {fast / pil:.2f} x PIL on 640x427 ({pil:,.0f}/s)")


def measure(images: list[bytes], rounds: int) -> list[str]:
    """Returns the cells of a row."""
    pil, exact, fast = speeds([(images, with_pil), (images, ours("exact")), (images, ours("fast"))], rounds)
    difference = np.stack(
        [np.abs(ours("fast")(image, rng(i)).astype(float) - with_pil(image, rng(i))) for i, image in enumerate(images)]
    )
    return [
        *(f"{speed:,.0f}" for speed in (pil, exact, fast)),
        f"{fast / pil:.2f}",
        f"{difference.mean():.2f}",
        f"{difference.max():.0f}",
    ]


def speeds(ways: list[tuple[list[bytes], Way]], rounds: int) -> list[float]:
    """Returns images a second of each way, measured in turn."""
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for number, (images, way) in enumerate(ways):
            began = time.perf_counter()
            for i, image in enumerate(images):
                way(image, rng(i))
            best[number] = min(best[number], (time.perf_counter() - began) / len(images))
    return [1 / seconds for seconds in best]


def ours(resize: str) -> Way:
    """Returns this package's way."""
    augment = Augment(resize="fast" if resize == "fast" else "exact")
    transform = TrainTransform(Preprocess(), TOKENIZER, augment=augment)
    return lambda image, rng: transform(Record(image, (CAPTION,)), rng)["image"]


def with_pil(image: bytes, rng: np.random.Generator) -> np.ndarray:
    """Returns the paper's random square by PIL alone, and tokenises."""
    TOKENIZER([CAPTION], context=77)
    opened = Image.open(io.BytesIO(image)).convert("RGB")
    shorter = min(opened.size)
    width, height = (side * 224 // shorter for side in opened.size)
    resized = opened.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (int(rng.integers(0, side - 224, endpoint=True)) for side in resized.size)
    return np.asarray(resized.crop((left, top, left + 224, top + 224)))


def photographs(width: int, height: int) -> list[bytes]:
    """Returns JPEGs of this size."""
    images, draw = [], rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(COUNT):
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


def rng(seed: int) -> np.random.Generator:
    """Returns the generator of an image."""
    return np.random.default_rng(seed)


TOKENIZER = Tokenizer()

if __name__ == "__main__":
    main()
