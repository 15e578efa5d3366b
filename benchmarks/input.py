"""Pairs made ready in a second beside PIL's bicubic resize, and beside webdataset with open_clip's transform.

  python -m benchmarks.input [--rounds=7] [--tiny]

First decode, crop, resize and tokenise in one process, image by image; the best of the rounds counts. The row after
the table reads images prepared at the model's size and a margin. Then whole pipelines over the same tar shards,
tokenising too: webdataset with open_clip's training transform and tokenizer as open_clip puts them together, and ours
with the same random resized crop: on one core; with one and two worker processes; and against a consumer at the rate of
an accelerator, whose data-wait is reported. All ways run in turn. Ours leaves normalising to the device.
"""

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.figures import Figure, report
from benchmarks.photographs import CAPTION, photographs, write_shards
from clip_jax.chips import CHIPS
from clip_jax.data.augment import Augment
from clip_jax.data.bench import waiting_share
from clip_jax.data.images import Preprocess
from clip_jax.data.order import FullShuffle
from clip_jax.data.pipeline import train_batches
from clip_jax.data.reading import Part
from clip_jax.data.records import Record
from clip_jax.data.tar_source import TarSource
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.data.transforms import TrainTransform
from clip_jax.models.flops import pair_flops
from clip_jax.models.variants import model_config
from tests.references import import_open_clip

ORIGINAL, PREPARED = (640, 427), (341, 256)
MODEL, CHIP, MFU = "ViT-L/14", "h100", 0.4

OneImage = Callable[[bytes, np.random.Generator], np.ndarray]
Pipeline = Callable[[int], Generator]
THEIRS, OURS = "webdataset + open_clip", "ours, fast"


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
      images: sizes of the JPEGs that are read one by one.
      count: how many of each.
      shards: sizes of the JPEGs in tar shards.
      samples: in each of four shards.
      batch: pairs in a batch.
      skipped: batches before the clock runs.
      timed: batches on the clock.
      rounds: of each way on one core, and with workers.
      workers: numbers of worker processes, the consumer's last.
      seconds: for which the consumer takes batches.
    """

    images: tuple[tuple[int, int], ...] = ((256, 256), (320, 240), (512, 384), (512, 512), (640, 427))
    count: int = 12
    shards: tuple[tuple[int, int], ...] = ((256, 256), (512, 384))
    samples: int = 512
    batch: int = 128
    skipped: int = 6
    timed: int = 12
    rounds: tuple[int, int] = (3, 2)
    workers: tuple[int, ...] = (1, 2)
    seconds: float = 6


TINY = Sizes(((256, 256),), 2, ((256, 256),), 32, 16, 1, 2, (1, 1), (1,), 0.5)


def main() -> None:
    """Reports three tables and more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="one round of few images, to see that it runs")
    arguments = parser.parse_args()
    sizes, rounds = (TINY, 1) if arguments.tiny else (Sizes(), arguments.rounds)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])  # before any library starts its threads
    figures = [figure for size in sizes.images for figure in beside_pil(size, sizes.count, rounds)]
    original, prepared = photographs(*ORIGINAL, sizes.count), photographs(*PREPARED, sizes.count)
    pil, fast = speeds([(original, with_pil), (prepared, ours("fast"))], rounds)
    what = f"prepared at {PREPARED[0]}x{PREPARED[1]}, fast"
    figures.append(Figure(what, fast, "pairs/s", f"PIL on {ORIGINAL[0]}x{ORIGINAL[1]}", pil, fast / pil))
    report("JPEGs made ready in a second on one core", figures)
    import_open_clip()
    for size in sizes.shards:
        with tempfile.TemporaryDirectory() as folder:
            pattern = write_shards(Path(folder, "shards"), shards=4, samples=sizes.samples, size=size)
            beside_webdataset(pattern, folder, size, cores, sizes)


def beside_pil(size: tuple[int, int], count: int, rounds: int) -> Iterator[Figure]:
    """Yields the speeds of our two ways of resizing beside PIL's, and how far the fast one is from it."""
    images, name = photographs(*size, count), f"{size[0]}x{size[1]}"
    pil, exact, fast = speeds([(images, with_pil), (images, ours("exact")), (images, ours("fast"))], rounds)
    yield Figure(f"{name}, fast", fast, "pairs/s", "PIL bicubic", pil, fast / pil)
    yield Figure(f"{name}, exact", exact, "pairs/s", "PIL bicubic", pil, exact / pil)
    difference = np.stack(
        [np.abs(ours("fast")(image, rng(i)).astype(float) - with_pil(image, rng(i))) for i, image in enumerate(images)]
    )
    yield Figure(f"{name}, fast, mean difference from PIL", float(difference.mean()), "grey levels")
    yield Figure(f"{name}, fast, largest difference from PIL", float(difference.max()), "grey levels")


def speeds(ways: list[tuple[list[bytes], OneImage]], rounds: int) -> list[float]:
    """Returns images a second of each way, measured in turn."""
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for number, (images, way) in enumerate(ways):
            began = time.perf_counter()
            for i, image in enumerate(images):
                way(image, rng(i))
            best[number] = min(best[number], (time.perf_counter() - began) / len(images))
    return [1 / seconds for seconds in best]


def ours(resize: str) -> OneImage:
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


def beside_webdataset(pattern: str, index_dir: str, size: tuple[int, int], cores: list[int], sizes: Sizes) -> None:
    """Reports whole pipelines over tar shards."""
    source = TarSource(pattern, index_dir=index_dir)
    ways: dict[str, Pipeline] = {
        THEIRS: lambda workers: open_clips_batches(pattern, workers, batch=sizes.batch),
        OURS: lambda workers: our_batches(source, workers, batch=sizes.batch),
    }
    os.sched_setaffinity(0, cores[:1])
    found = {"one core": in_turn(ways, workers=0, rounds=sizes.rounds[0], sizes=sizes)}
    os.sched_setaffinity(0, cores)
    for workers in sizes.workers:
        found[f"{workers} worker(s)"] = in_turn(ways, workers=workers, rounds=sizes.rounds[1], sizes=sizes)
    rate = CHIPS[CHIP].peak * MFU / pair_flops(model_config(MODEL), 32_768, tiled=True)
    waits = {}
    for name, way in ways.items():
        with closing(way(sizes.workers[-1])) as batches:
            waits[name] = 100 * waiting_share(batches, pairs=sizes.batch, rate=rate, seconds=sizes.seconds)
    figures = [
        Figure(f"{OURS}, {how}", speed[OURS], "pairs/s", THEIRS, speed[THEIRS], speed[OURS] / speed[THEIRS])
        for how, speed in found.items()
    ]
    consumer = f"{MODEL} on one {CHIP} at {MFU:.0%} of its peak, {rate:,.0f} pairs/s"
    what = f"data-wait of {consumer}, {sizes.workers[-1]} worker(s)"
    figures.append(Figure(what, waits[OURS], "%", THEIRS, waits[THEIRS]))
    report(f"Pairs from tar shards of {size[0]}x{size[1]}", figures)


def in_turn(ways: dict[str, Pipeline], *, workers: int, rounds: int, sizes: Sizes) -> dict[str, float]:
    """Returns pairs a second of each way, the median of the rounds; the first batches are not timed."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with closing(way(workers)) as batches:
                for _ in itertools.islice(batches, sizes.skipped):
                    pass
                began = time.perf_counter()
                for _ in itertools.islice(batches, sizes.timed):
                    pass
                speeds[name].append(sizes.timed * sizes.batch / (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in speeds.items()}


def our_batches(source: TarSource, workers: int, *, batch: int) -> Generator:
    """Returns our batches, with open_clip's crop."""
    transform = TrainTransform(Preprocess(), TOKENIZER, augment=Augment(crop="resized"))
    parts = [Part(source, FullShuffle(len(source), seed=0))]
    return train_batches(parts, transform=transform, batch=batch, seed=0, workers=workers, prefetch=4)


def open_clips_batches(pattern: str, workers: int, *, batch: int) -> Generator:
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
        wds.batched(batch),
    ).repeat()
    yield from wds.WebLoader(stages, batch_size=None, num_workers=workers)


def rng(seed: int) -> np.random.Generator:
    """Returns the generator of an image."""
    return np.random.default_rng(seed)


TOKENIZER = Tokenizer()

if __name__ == "__main__":
    main()
