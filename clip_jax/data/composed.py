"""Pictures made of the pictures of a labelled source: words written on them, two of them side by side.

Every record is a function of its number, so that all processes see the same.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from clip_jax.data.images import Preprocess, eval_image
from clip_jax.data.labelled import LabelledSource
from clip_jax.data.reading import name_record
from clip_jax.data.records import Record

_SMALLEST = 4.0


class Written:
    """A source's images as the tower sees them, with a word on a white strip at the lower edge; or the strip alone.

    Args:
      source: the images.
      words: what is written for each class.
      preprocess: how images are cut.
      size: height of the strip, as a share of the image.
      kind: `wrong` writes another class's word, `blank` nothing, which shows what the strip alone does.
      seed: of the choice among the other classes.

    Attributes:
      classes: the source's.
      fingerprint: the source's, and what is written.
    """

    def __init__(
        self,
        source: LabelledSource,
        words: Sequence[str],
        *,
        preprocess: Preprocess,
        size: float,
        kind: Literal["wrong", "blank"],
        seed: int = 0,
    ) -> None:
        self._source, self._words, self._preprocess = source, tuple(words), preprocess
        self._size, self._kind, self._seed = size, kind, seed
        self.classes = source.classes
        written: dict[str, Any] = {"kind": kind, "size": size, "seed": seed, "words": list(words)}
        self.fingerprint = source.fingerprint | {"written": written}

    @property
    def state(self) -> str | None:
        """The source's."""
        return self._source.state

    def __len__(self) -> int:
        return len(self._source)

    def __str__(self) -> str:
        return str(self._source)

    def __getitem__(self, index: int) -> Record:
        """Returns an image, uint8 [s, s, 3], with its class.

        Raises:
          UserError: it cannot be read.
        """
        record = self._source[index]
        pixels = eval_image(record.image, self._preprocess)
        word = "" if self._kind == "blank" else self._words[self.attack(index, record.label)]
        return Record(write_word(pixels, word, size=self._size), label=record.label)

    def attack(self, index: int, label: int) -> int:
        """Returns the class whose word is written on an image."""
        others = [other for other in range(len(self._words)) if other != label]
        return others[int(np.random.default_rng((self._seed, index)).integers(len(others)))]

    def where(self, index: int) -> str:
        """Returns what to call an image in messages."""
        return name_record(self._source, index)


def write_word(pixels: np.ndarray, word: str, *, size: float) -> np.ndarray:
    """Returns uint8 [h, w, 3] with a word in black on a white strip along the lower edge, as large as fits.

    Args:
      pixels: of the image; they stay as they are.
      word: nothing leaves the strip empty.
      size: height of the strip, as a share of the image.
    """
    from PIL import Image, ImageDraw

    height, width = pixels.shape[:2]
    strip = max(1, round(size * height))
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height - strip, width, height), fill="white")
    if word:
        font, (left, top, right, bottom) = _fitting(draw, word, width, strip)
        place = (width - right - left) / 2, height - strip + (strip - bottom - top) / 2
        draw.text(place, word, fill="black", font=font)
    return np.asarray(image)


def _fitting(draw: Any, word: str, width: int, height: int) -> tuple[Any, tuple[float, float, float, float]]:
    """Returns the largest font, down to a few pixels, in which a word fits, and the word's box."""
    letters = 2.0 * height
    while True:
        font = _font(round(letters, 2))
        left, top, right, bottom = map(float, draw.textbbox((0, 0), word, font=font))
        if (right - left <= width and bottom - top <= height) or letters <= _SMALLEST:
            return font, (left, top, right, bottom)
        letters *= 0.9


@functools.lru_cache(256)
def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


class Pair(NamedTuple):
    """Two images of different classes, by their numbers and classes: the left one and the right one."""

    left: int
    right: int
    left_label: int
    right_label: int


class SideBySide:
    """Pairs of a source's images, one left of the other on a square.

    Args:
      source: the images.
      pairs: which ones.
      preprocess: its size is the side of the square.

    Attributes:
      fingerprint: the source's, and the number of pairs.
    """

    def __init__(self, source: LabelledSource, pairs: Sequence[Pair], *, preprocess: Preprocess) -> None:
        self._source, self._pairs, self._preprocess = source, tuple(pairs), preprocess
        self.fingerprint = source.fingerprint | {"pairs": len(pairs)}

    def __len__(self) -> int:
        return len(self._pairs)

    def __str__(self) -> str:
        return f"pairs of {self._source}"

    def __getitem__(self, index: int) -> Record:
        """Returns a pair, uint8 [s, s, 3].

        Raises:
          UserError: one of the images cannot be read.
        """
        pair = self._pairs[index]
        return Record(side_by_side([eval_image(self._source[i].image, self._preprocess) for i in pair[:2]]))


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns two squares, uint8 [s, s, 3], at half their side in the middle of one square, left and right."""
    from PIL import Image

    size = len(images[0])
    half = size // 2
    square = np.full((size, size, 3), 127, np.uint8)
    for place, pixels in enumerate(images):
        small = np.asarray(Image.fromarray(pixels).resize((half, half), Image.Resampling.BICUBIC))
        top, left = (size - half) // 2, place * half
        square[top : top + half, left : left + half] = small
    return square


def draw_pairs(labels: Sequence[int], *, count: int, seed: int = 0) -> list[Pair]:
    """Draws pairs of images of different classes, none twice.

    Args:
      labels: of all images.
      count: pairs; fewer where there are no more.
      seed: of the draw.
    """
    classes, rng, images, drawn = np.asarray(labels), np.random.default_rng(seed), len(labels), {}
    wanted = min(count, images**2 - int(np.sum(np.unique(classes, return_counts=True)[1] ** 2)))
    few = images**2 <= 4 * count
    while len(drawn) < wanted:
        order = rng.permutation(images**2) if few else rng.integers(images**2, size=8 * count)
        left, right = np.divmod(order, images)
        unequal = classes[left] != classes[right]
        for pair in zip(left[unequal].tolist(), right[unequal].tolist(), strict=True):
            drawn[pair] = Pair(*pair, int(labels[pair[0]]), int(labels[pair[1]]))
    return list(drawn.values())[:count]
