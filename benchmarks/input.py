"""Pairs made ready in a second beside PIL's bicubic resize, and beside webdataset with open_clip's transform.

  python -m benchmarks.input [--rounds=7]

First decode, crop, resize and tokenise in one process, image by image; the best of the rounds counts. The row after
the table reads images prepared at the model's size and a margin. Then whole pipelines over the same tar shards,
tokenising too: webdataset with open_clip's training transform and tokenizer as open_clip puts them together, and ours
with the same random resized crop: on one core; with one and two worker processes; and against a consumer at the rate of
an accelerator, whose data-wait is printed. All ways run in turn. Ours leaves normalising to the device.
"""

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.photographs import CAPTION, photographs, write_shards
from clip_jax.chips import CHIPS
from clip_jax.console import print_table
from clip_jax.data.augment import Augment
from clip_jax.data.bench import waiting_share
from clip_jax.data.images import Preprocess
from clip_jax.data.order import FullShuffle
from clip_jax.data.pipeline import TrainTransform, train_batches
from clip_jax.data.reading import Part
from clip_jax.data.records import Record
from clip_jax.data.tar_source import TarSource
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.models.flops import pair_flops
from clip_jax.models.variants import model_config
from tests.references import import_open_clip

SIZES = ((256, 256), (320, 240), (512, 384), (512, 512), (640, 427))
PREPARED = (341, 256)
SHARD_SIZES = ((256, 256), (512, 384))
COUNT, BATCH, TIMED = 12, 128, 12
MODEL, CHIP, MFU = "ViT-L/14", "h100", 0.4

Way = Callable[[bytes, np.random.Generator], np.ndarray]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])  # before any library starts its threads
    rows = [measure(photographs(*size, COUNT), rounds) for size in SIZES]
    table = [[f"{width}x{height}", *row] for (width, height), row in zip(SIZES, rows, strict=True)]
    print_table(
        "Pairs a second on one core",
        ["JPEG", "PIL bicubic", "exact", "fast", "fast / PIL", "mean difference", "largest"],
        table,
    )
    original, prepared = photographs(640, 427, COUNT), photographs(*PREPARED, COUNT)
    pil, fast = speeds([(original, with_pil), (prepared, ours("fast"))], rounds)
    print(f"prepared at {PREPARED[0]}x{PREPARED[1]}: {fast:,.0f}/s, {fast / pil:.2f} x PIL on 640x427 ({pil:,.0f}/s)")
    import_open_clip()
    for size in SHARD_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            pattern = write_shards(Path(folder, "shards"), shards=4, samples=512, size=size)
            beside_webdataset(pattern, folder, size, cores)


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


def beside_webdataset(pattern: str, index_dir: str, size: tuple[int, int], cores: list[int]) -> None:
    """Prints one table of whole pipelines over tar shards."""
    source = TarSource(pattern, index_dir=index_dir)
    ways: dict[str, Callable[[int], Generator]] = {
        "webdataset + open_clip": lambda workers: open_clips_batches(pattern, workers),
        "ours, fast": lambda workers: our_batches(source, workers),
    }
    os.sched_setaffinity(0, cores[:1])
    one_core = in_turn(ways, workers=0, rounds=3)
    os.sched_setaffinity(0, cores)
    one, two = (in_turn(ways, workers=workers, rounds=2) for workers in (1, 2))
    rate = CHIPS[CHIP].peak * MFU / pair_flops(model_config(MODEL), 32_768, tiled=True)
    waits = {}
    for name, way in ways.items():
        with closing(way(2)) as batches:
            waits[name] = waiting_share(batches, pairs=BATCH, rate=rate, seconds=6)
    first = next(iter(one_core.values()))
    table = [
        [
            name,
            *(f"{speeds[name]:,.0f}" for speeds in (one_core, one, two)),
            f"{two[name] / one[name]:.2f}",
            f"{one_core[name] / first:.2f}",
            f"{waits[name]:.1%}",
        ]
        for name in ways
    ]
    print_table(
        f"Pairs a second from tar shards of {size[0]}x{size[1]}; consumer: {MODEL} on one {CHIP} at {MFU:.0%} of its "
        f"peak, {rate:,.0f} pairs/s",
        ["", "one core", "1 worker", "2 workers", "2 / 1", "one core / webdataset", "data-wait, 2 workers"],
        table,
    )


def in_turn(ways: dict[str, Callable[[int], Generator]], *, workers: int, rounds: int) -> dict[str, float]:
    """Returns pairs a second of each way, the median of the rounds; the first batches are not timed."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with closing(way(workers)) as batches:
                for _ in itertools.islice(batches, 6):
                    pass
                began = time.perf_counter()
                for _ in itertools.islice(batches, TIMED):
                    pass
                speeds[name].append(TIMED * BATCH / (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in speeds.items()}


def our_batches(source: TarSource, workers: int) -> Generator:
    """Returns our batches, with open_clip's crop."""
    transform = TrainTransform(Preprocess(), TOKENIZER, augment=Augment(crop="resized"))
    parts = [Part(source, FullShuffle(len(source), seed=0))]
    return train_batches(parts, transform=transform, batch=BATCH, seed=0, workers=workers, prefetch=4)


def open_clips_batches(pattern: str, workers: int) -> Generator:
    """Yields webdataset's batches, without end, from the stages that open_clip_train has."""
    import torch
    import webdataset as wds

    open_clip = import_open_clip()
    torch.set_num_threads(1)  # as in torch's worker processes
    transform, tokenizer = open_clip.image_transform(224, is_train=True), open_clip.get_tokenizer("ViT-B-32")
    stages = wds.DataPipeline(
        wds.SimpleShardList(pattern),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(1_000, initial=256),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH),
    ).repeat()
    yield from wds.WebLoader(stages, batch_size=None, num_workers=workers)


def rng(seed: int) -> np.random.Generator:
    """Returns the generator of an image."""
    return np.random.default_rng(seed)


TOKENIZER = Tokenizer()

if __name__ == "__main__":
    main()
