"""Images with captions, for retrieval: both are read once, each process its slice, and every process gets all."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.config import DataConfig, RunConfig
from clip_jax.data.loader import open_named, open_source
from clip_jax.data.reading import name_record
from clip_jax.data.records import Record, RecordError, Source
from clip_jax.data.table_source import TableSource
from clip_jax.evals.evaluator import Evaluator
from clip_jax.evals.job import EvalJob


class Captioned(NamedTuple):
    """Embedded images and their captions.

    Attributes:
      images: float [n, e], unit length.
      texts: float [m, e], unit length.
      image_of_text: int64 [m], the image to which each text belongs.
    """

    images: np.ndarray
    texts: np.ndarray
    image_of_text: np.ndarray


def open_captioned(job: EvalJob, config: RunConfig) -> Source:
    """Opens images with captions; in tar shards, every line of a `.txt` is one, as CLIP_benchmark reads its exports.

    Raises:
      UserError: nothing there, or no captions.
    """
    if job.kind != "tfds":
        return open_named(job.dataset, config, captions_by_line=True)
    section = DataConfig(
        dataset=job.dataset,
        split=job.split,
        data_dir=job.data_dir,
        image_key=job.image_key,
        caption_key=job.caption_key,
    )
    return open_source(config, section)


def embed_captioned(evaluator: Evaluator, source: Source) -> Captioned:
    """Embeds all images and all their captions; collective over processes.

    Records with the same image are one image with the captions of each, as COCO and Flickr30k have it in tables, and in
    tar shards that img2dataset made of them.

    Raises:
      RecordError: names a record that cannot be read, or has no caption.
    """
    remembered = _Remembering(source)
    images = evaluator.embed(remembered)
    own = sorted(remembered.captions.items())
    image_of_text = np.array([index for index, texts in own for _ in texts], np.int32)
    tokens = evaluator.tokenize([text for _, texts in own for text in texts])
    tokens, image_of_text = _from_all(tokens, image_of_text)
    kept, number = _different(remembered.digests)
    image_of_text = number[image_of_text]
    order = np.argsort(image_of_text, kind="stable")
    return Captioned(images.features[kept], evaluator.tokens(tokens[order]), image_of_text[order])


class _Remembering:
    """Images of a source, which remembers the captions and digests, uint32 [n, 4], of those that were read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        one_each = [[number] for number in range(len(source))]
        self._records = source.by_image() if isinstance(source, TableSource) else one_each
        self.captions: dict[int, Sequence[str]] = {}
        self.digests = np.zeros((len(self._records), 4), np.uint32)

    def __len__(self) -> int:
        return len(self._records)

    def __str__(self) -> str:
        return str(self._source)

    def __getitem__(self, index: int) -> Record:
        records = [self._source[number] for number in self._records[index]]
        texts = [text for record in records for text in record.captions if text.strip()]
        if not texts:
            raise RecordError("caption_missing", "there is no caption")
        self.captions[index] = texts
        image = records[0].image
        content = image if isinstance(image, bytes) else image.tobytes()
        self.digests[index] = np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.uint32)
        return records[0]

    def where(self, index: int) -> str:
        """Returns what to call a record in messages."""
        return name_record(self._source, self._records[index][0])


def _different(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first record of each image, int64 [k], and the place among these of every record's image, int64 [n].

    Args:
      digests: uint32 [n, 4], of what this process read; 0 elsewhere.
    """
    if jax.process_count() > 1:
        digests = multihost_utils.process_allgather(digests).max(axis=0)
    _, first, image = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    kept = np.sort(first)
    return kept, np.searchsorted(kept, first[image.reshape(-1)])


def _from_all(tokens: np.ndarray, image_of_text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of all processes; a row that two of them read, for its shapes, is there once."""
    if jax.process_count() == 1:
        return tokens, image_of_text
    most = int(multihost_utils.process_allgather(np.array(len(tokens))).max())
    padding = ((0, most - len(tokens)),)
    all_tokens = multihost_utils.process_allgather(np.pad(tokens, (*padding, (0, 0))))
    all_images = multihost_utils.process_allgather(np.pad(image_of_text, padding, constant_values=-1))
    kept, seen = [], set()
    for process, images in enumerate(all_images):
        fresh = set(images.tolist()) - seen - {-1}
        kept += [(process, row) for row, image in enumerate(images.tolist()) if image in fresh]
        seen |= fresh
    processes, rows = (np.array(column) for column in zip(*kept, strict=True))
    return all_tokens[processes, rows], all_images[processes, rows]
