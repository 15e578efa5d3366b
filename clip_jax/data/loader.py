"""From a run's config to its training batches."""

import os
import zlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.config import DataConfig, RunConfig, data_sources, kind_named, parse_source
from clip_jax.data.augment import Augment
from clip_jax.data.filters import Filter
from clip_jax.data.folder_source import FolderSource
from clip_jax.data.images import preprocess_of
from clip_jax.data.order import FullShuffle, Mixture, WindowShuffle
from clip_jax.data.pipeline import check_batches, train_batches
from clip_jax.data.reading import Part, where
from clip_jax.data.records import Records, Source
from clip_jax.data.synthetic import SyntheticSource, synthetic_batches
from clip_jax.data.table_source import TableSource
from clip_jax.data.tar_source import TarSource
from clip_jax.data.tfds_source import TfdsSource
from clip_jax.data.transforms import FixedTransform, TrainTransform, Transform
from clip_jax.errors import UserError
from clip_jax.files import is_remote, local_path

Batches = Generator[dict[str, np.ndarray], None, None]

_SYNTHETIC_RECORDS = 1_000


class TrainingData(NamedTuple):
    """Training data of a run.

    Attributes:
      batches: data position (pairs consumed, over all processes) to this process's rows of every batch from there on;
        `close()` of what it returns ends the threads and workers behind it.
      fingerprint: what identifies the data.
      description: a few words for the log.
      where: record number, as batches have it in `index`, to what to call it in messages.
      check: raises a UserError where `batches` cannot begin at a position; reads nothing.
    """

    batches: Callable[[int], Batches]
    fingerprint: dict[str, Any]
    description: str
    where: Callable[[int], str] = "record {}".format
    check: Callable[[int], None] = lambda position: None


def open_training_data(config: RunConfig, *, augmented: bool = True) -> TrainingData:
    """Opens what `config.data` names.

    Args:
      config: the run's.
      augmented: False takes every image as evaluation does, and of several captions the first.

    Raises:
      UserError: the data are not there or not image + text; or not the same in all processes.
    """
    if config.data.source == "synthetic" and not config.data.mixture:
        return synthetic_data(config)
    transform = None if augmented else fixed_transform_of(config)
    parts = [open_part(config, data) for data in data_sources(config.data)]
    check_same("config.data", [part.source for part in parts])
    return parts_data(config, parts, transform)


def open_part(config: RunConfig, data: DataConfig, source: Source | None = None) -> Part:
    """Returns a source in its order.

    Args:
      config: the run's.
      data: the source's section, see `data_sources`.
      source: instead of the one that the section names.
    """
    source = open_source(config, data) if source is None else source
    windows = data.order == "window" or (data.order == "auto" and any(map(is_remote, data.shards.split("::"))))
    if windows and isinstance(source, TarSource):
        order = WindowShuffle(
            source.counts, seed=config.seed, streams=data.streams, block=data.block, window=data.window
        )
    else:
        order = FullShuffle(len(source), seed=config.seed)
    return Part(source, order, data.weight)


def open_source(
    config: RunConfig, data: DataConfig, *, need_captions: bool = True, captions_by_line: bool = False
) -> Source:
    """Opens one source; a TFDS dataset of ours is built first if the config says so.

    Args:
      config: the run's.
      data: the source's section.
      need_captions: refuse a source, or a sample of tar shards, that has none.
      captions_by_line: in tar shards, every line of a `.txt` is a caption.
    """
    if data.source == "synthetic":
        return SyntheticSource(_SYNTHETIC_RECORDS, config.model.vision.image_size, config.seed)
    if data.source == "tars":
        return open_tars(data, need_captions=need_captions, captions_by_line=captions_by_line)
    if data.source == "table":
        local_path("config.data.image_root", data.image_root)
        return TableSource(
            local_path("config.data.table", data.table),
            image_key=data.image_key,
            caption_key=data.caption_key,
            image_root=data.image_root,
        )
    if data.build:
        from clip_jax.data.build import ensure_dataset

        ensure_dataset(data.dataset, data.data_dir)
    return TfdsSource(
        data.dataset,
        data.split,
        data_dir=data.data_dir,
        image_key=data.image_key,
        caption_key=data.caption_key,
        images_only=not need_captions,
    )


def check_same(key: str, sources: Sequence[Records]) -> None:
    """Sees that all processes have as many records of all sources, and in the same shards; collective.

    Each would shuffle its own number, so that pairs came twice and others never, or wait for a batch that others have
    not. Copies of shards on the hosts' own disks may not be whole.

    Args:
      key: of the config, for messages.
      sources: that were opened.

    Raises:
      UserError: in all processes, where they have not.
    """
    if jax.process_count() == 1:
        return
    records = sum(map(len, sources))
    counts = [np.asarray(getattr(source, "counts", len(source)), np.int64) for source in sources]
    own = np.asarray([*divmod(records, 1 << 31), zlib.crc32(np.hstack(counts).tobytes())], np.uint32)
    first, *others = np.asarray(multihost_utils.process_allgather(own)).tolist()
    for process, found in enumerate(others, 1):
        if found != first:
            there, here = ((high << 31) + low for high, low, _ in (found, first))
            raise UserError(
                f"{key} is not the same in all processes: process {process} has {there:,} records, and process 0 "
                f"{'as many in other shards' if there == here else f'{here:,}'}; let all see the same files"
            )


def open_named(data: str, config: RunConfig, *, need_captions: bool = True, captions_by_line: bool = False) -> Source:
    """Opens data that a person names on a command line.

    Args:
      data: a folder, a table, tar shards, or the keys of a source of `config.data`; see `kind_named`.
      config: for the size of synthetic images.
      need_captions: refuse a source, or a sample of tar shards, that has none.
      captions_by_line: in tar shards, every line of a `.txt` is a caption.

    Raises:
      UserError: nothing there, or another kind of thing.
    """
    match kind_named(data):
        case "source":
            section = parse_source(DataConfig(build=True), data, "data")
        case "table":
            section = DataConfig(source="table", table=data)
        case "tars":
            section = DataConfig(source="tars", shards=data)
        case _:
            return FolderSource(Path(data))
    return open_source(config, section, need_captions=need_captions, captions_by_line=captions_by_line)


def open_tars(
    data: DataConfig, *, index: bool = False, need_captions: bool = True, captions_by_line: bool = False
) -> TarSource:
    """Opens tar shards; with `index`, after looking into all whose number of samples is not known."""
    return TarSource(
        data.shards,
        index_dir=os.path.expanduser(data.index_dir or "~/.cache/clip_jax/index"),
        counts=os.path.expanduser(data.counts),
        captions=data.captions,
        keep=Filter(data.filters, os.path.expanduser(data.uids)),
        retry_s=data.retry_s,
        threads=data.connections,
        index=index,
        need_captions=need_captions,
        captions_by_line=captions_by_line,
    )


def parts_data(config: RunConfig, parts: Sequence[Part], transform: Transform | None = None) -> TrainingData:
    """Returns the training data of a run that reads `parts`, shuffled by the run's seed.

    Args:
      config: the run's.
      parts: its sources in their order.
      transform: what is made of a record; None augments and tokenises.
    """
    transform = transform_of(config) if transform is None else transform

    def batches(position: int) -> Batches:
        yield from parts_batches(
            config,
            parts,
            transform,
            position=position,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def check(position: int) -> None:
        check_batches(
            parts,
            batch=config.batch,
            position=position,
            process_count=jax.process_count(),
            workers=config.data.workers,
        )

    shares = Mixture(tuple(part.weight for part in parts)).shares
    return TrainingData(
        batches,
        _fingerprint(parts, shares),
        "; ".join(_describe(part, share) for part, share in zip(parts, shares, strict=True)),
        lambda index: where(parts, index),
        check,
    )


def parts_batches(
    config: RunConfig,
    parts: Sequence[Part],
    transform: Transform,
    *,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Yields a process's rows of every batch of a run from a position on; see `train_batches`."""
    data = config.data
    return train_batches(
        parts,
        transform=transform,
        batch=config.batch,
        seed=config.seed,
        position=position,
        process_index=process_index,
        process_count=process_count,
        workers=data.workers,
        threads=data.threads,
        prefetch=data.prefetch,
        connections=data.connections,
        on_bad=data.on_bad,
    )


def transform_of(config: RunConfig) -> TrainTransform:
    """Returns what a run makes of a record."""
    from clip_jax.data.tokenizer import Tokenizer  # synthetic data needs no tokenizer installed

    return TrainTransform(
        preprocess_of(config.model, config.data),
        Tokenizer(),
        context=config.model.text.context,
        augment=augment_of(config.data),
    )


def fixed_transform_of(config: RunConfig) -> FixedTransform:
    """Returns what is made of a record where nothing shall be random."""
    from clip_jax.data.tokenizer import Tokenizer  # as above

    return FixedTransform(preprocess_of(config.model, config.data), Tokenizer(), context=config.model.text.context)


def augment_of(data: DataConfig) -> Augment:
    """Returns what is drawn at random for each image."""
    return Augment(
        crop=data.crop,
        scale=data.crop_scale,
        resize=data.resize,
        color_jitter=data.color_jitter,
        color_jitter_prob=data.color_jitter_prob,
        grayscale=data.grayscale,
    )


def synthetic_data(config: RunConfig) -> TrainingData:
    """Returns random pairs of the run's sizes; needs NumPy only."""
    text = config.model.text

    def batches(position: int) -> Batches:
        yield from synthetic_batches(
            batch=config.batch,
            image_size=config.model.vision.image_size,
            context=text.context,
            vocab_size=text.vocab_size,
            seed=config.seed,
            position=position,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    return TrainingData(batches, {"source": "synthetic"}, "synthetic pairs")


def _fingerprint(parts: Sequence[Part], shares: Sequence[float]) -> dict[str, Any]:
    prints = [part.source.fingerprint for part in parts]
    if len(prints) == 1:
        return prints[0]
    return {"mixture": [each | {"share": share} for each, share in zip(prints, shares, strict=True)]}


def _describe(part: Part, share: float) -> str:
    of_all = "" if share == 1 else f", {share:.1%} of the batches"
    return f"{len(part.source):,} pairs of {part.source}{of_all}"
