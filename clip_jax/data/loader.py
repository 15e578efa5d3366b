"""From a run's config to its training batches."""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import numpy as np

from clip_jax.config import RunConfig
from clip_jax.data.images import preprocess_of
from clip_jax.data.pipeline import TrainTransform, synthetic_batches, train_batches
from clip_jax.data.sources import Source, TfdsSource

Batches = Generator[dict[str, np.ndarray], None, None]


class TrainingData(NamedTuple):
    """Training data of a run.

    Attributes:
      batches: data position (pairs consumed, over all processes) to this process's rows of every batch from there on;
        `close()` of what it returns ends the threads and workers behind it.
      fingerprint: what identifies the data.
      description: a few words for the log.
    """

    batches: Callable[[int], Batches]
    fingerprint: dict[str, Any]
    description: str


def open_training_data(config: RunConfig) -> TrainingData:
    """Opens what `config.data` names.

    Raises:
      UserError: the dataset is not there or not image + text.
    """
    if config.data.source == "synthetic":
        return synthetic_data(config)
    source = open_source(config)
    return source_data(config, source, fingerprint=source.fingerprint)


def open_source(config: RunConfig) -> TfdsSource:
    """Opens the TFDS dataset of `config.data`, building it first if the config says so."""
    data = config.data
    if data.build:
        from clip_jax.data.build import ensure_dataset

        ensure_dataset(data.dataset, data.data_dir)
    return TfdsSource(
        data.dataset, data.split, data_dir=data.data_dir, image_key=data.image_key, caption_key=data.caption_key
    )


def source_data(config: RunConfig, source: Source, *, fingerprint: dict[str, Any]) -> TrainingData:
    """Returns the training data of a run that reads `source`: augmented, tokenised, shuffled by the run's seed."""
    from clip_jax.data.tokenizer import Tokenizer  # synthetic data needs no tokenizer installed

    data = config.data
    transform = TrainTransform(
        preprocess_of(config.model),
        Tokenizer(),
        context=config.model.text.context,
        crop=data.crop,
        crop_scale=data.crop_scale,
    )

    def batches(position: int) -> Batches:
        yield from train_batches(
            source,
            transform=transform,
            batch=config.batch,
            seed=config.seed,
            position=position,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=data.workers,
            threads=data.threads,
            prefetch=data.prefetch,
        )

    return TrainingData(batches, fingerprint, f"{len(source):,} pairs of {source}")


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
