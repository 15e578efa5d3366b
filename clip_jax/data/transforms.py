"""What becomes of one record: the arrays of its row in a batch, in training, on held-out pairs, and in evaluation."""

from dataclasses import KW_ONLY, dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from clip_jax.data.augment import Augment, random_crop
from clip_jax.data.images import Preprocess, eval_image
from clip_jax.data.records import Record

Example = dict[str, np.ndarray]


@runtime_checkable
class Tokenize(Protocol):
    """Captions to int32 [b, context]."""

    def __call__(self, texts: list[str], *, context: int) -> np.ndarray: ...


@runtime_checkable
class Transform(Protocol):
    """A record and a random generator to the arrays of a row."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Example: ...

    def blank(self) -> Example:
        """Returns the row of a record that cannot be used."""
        ...


@dataclass(frozen=True)
class TrainTransform:
    """A record to the arrays of one training pair.

    The tokenizer is called with one caption at a time: measured, that costs 3 microseconds where an image costs a
    millisecond, and it keeps a pair a function of its record.

    Attributes:
      preprocess: its size is the side of the crops.
      tokenizer: captions to rows of ids.
      context: length of a row.
      augment: what is drawn at random.
    """

    preprocess: Preprocess
    tokenizer: Tokenize
    _: KW_ONLY
    context: int = 77
    augment: Augment = Augment()

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        """Returns `image`, uint8 [s, s, 3], and `tokens`, int32 [l].

        Raises:
          ImageError: the image cannot be decoded.
          RecordError: there is no caption.
        """
        caption = record.draw_caption(rng)
        image = random_crop(record.image, self.preprocess, rng, self.augment)
        return {"image": image, "tokens": self.tokenizer([caption], context=self.context)[0]}

    def blank(self) -> Example:
        """Returns a row of zeros."""
        return _blank_pair(self.preprocess.size, self.context)


@dataclass(frozen=True)
class FixedTransform:
    """A record to the arrays of one pair, without chance: the image as in evaluation, and the first caption.

    Attributes:
      preprocess: its size is the side of the image.
      tokenizer: captions to rows of ids.
      context: length of a row.
    """

    preprocess: Preprocess
    tokenizer: Tokenize
    _: KW_ONLY
    context: int = 77

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """Returns `image`, uint8 [s, s, 3], and `tokens`, int32 [l]; nothing is drawn from `rng`.

        Raises:
          ImageError: the image cannot be decoded.
          RecordError: there is no caption.
        """
        tokens = self.tokenizer([record.first_caption()], context=self.context)[0]
        return {"image": eval_image(record.image, self.preprocess), "tokens": tokens}

    def blank(self) -> Example:
        """Returns a row of zeros."""
        return _blank_pair(self.preprocess.size, self.context)


@dataclass(frozen=True)
class EvalTransform:
    """A record to the arrays of one labelled image.

    Attributes:
      preprocess: its size is the side of the image.
    """

    preprocess: Preprocess

    def __call__(self, record: Record) -> Example:
        """Returns `image`, uint8 [s, s, 3], and `label`, int32.

        Raises:
          UserError: the image cannot be decoded.
        """
        return {"image": eval_image(record.image, self.preprocess), "label": np.asarray(record.label, np.int32)}


def _blank_pair(size: int, context: int) -> Example:
    return {"image": np.zeros((size, size, 3), np.uint8), "tokens": np.zeros(context, np.int32)}
