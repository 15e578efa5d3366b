"""What every source of training data gives: records by number, or the reason why one cannot be used."""

import math
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from clip_jax.data.storage import OUTAGES
from clip_jax.errors import UserError, one_line

UNREACHABLE = "shard_unreachable"
"""The reason that is the store's, not the record's."""

REASONS = (
    "image_missing",
    "image_damaged",
    "image_too_large",
    "caption_missing",
    "caption_unreadable",
    "shard_missing",
    "shard_changed",
    UNREACHABLE,
)
"""Why a record cannot be used. A batch names a reason by its place here plus 1; 0 means that the record is good."""

MAX_FILE_BYTES = 1 << 26
"""Larger files of a record are not read."""

MAX_CAPTION_BYTES = 1 << 14
"""Longer captions are refused: no model reads so far."""

_NESTED = re.compile(rb"(?:(?:amp|AMP|#0*38|#[xX]0*26);){16}")
"""Entities within entities are refused: cleaning them takes time with the square of their depth."""


MAX_METADATA_BYTES = 1 << 22
"""Longer JSON is refused: parsed, it takes up to thirty times the memory."""


class RecordError(UserError):
    """A record that cannot be used.

    Args:
      reason: one of REASONS.
      message: one line that names what is wrong.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, str(self))


class Record(NamedTuple):
    """One image with its captions, its label, or both.

    Attributes:
      image: the encoded file, or uint8 [h, w, 3].
      captions: one of them that is not blank is drawn whenever the record is read; empty where the dataset has none.
      shares: how often each caption is drawn, relative to the others; empty means equally often.
      label: the class; -1 where the dataset has none.
    """

    image: bytes | np.ndarray
    captions: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    label: int = -1

    def spoken(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Returns the captions that are not blank, and their shares.

        Raises:
          RecordError: there is none.
        """
        kept = [number for number, caption in enumerate(self.captions) if caption.strip()]
        if not kept:
            raise RecordError("caption_missing", "the caption is empty")
        shares = tuple(self.shares[number] for number in kept) if self.shares else ()
        return tuple(self.captions[number] for number in kept), shares

    def draw_caption(self, rng: np.random.Generator) -> str:
        """Returns one of the captions that are not blank; where there is but one, nothing is drawn from `rng`.

        Raises:
          RecordError: there is none.
        """
        captions, shares = self.spoken()
        return captions[_draw(len(captions), shares, rng)]

    def first_caption(self) -> str:
        """Returns the first of the captions that are not blank.

        Raises:
          RecordError: there is none.
        """
        return self.spoken()[0][0]


@runtime_checkable
class Records(Protocol):
    """What the pipeline reads from; `str(records)` names it in errors. Worker processes receive a pickle of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@runtime_checkable
class Source(Records, Protocol):
    """Records that say what they are.

    Attributes:
      fingerprint: what identifies the records, as JSON holds it; the same of a copy.
      state: another one when the files behind them change, for what is kept of the records; a copy may have another.
        None where nothing is known of files.
    """

    fingerprint: dict[str, Any]

    @property
    def state(self) -> str | None: ...


def decode_caption(raw: bytes) -> str:
    """Returns a caption's text.

    Raises:
      RecordError: it is not UTF-8, longer than MAX_CAPTION_BYTES, or would take seconds to clean.
    """
    if len(raw) > MAX_CAPTION_BYTES:
        raise RecordError("caption_unreadable", f"the caption has {len(raw):,} bytes, over {MAX_CAPTION_BYTES:,}")
    if _NESTED.search(raw):
        raise RecordError("caption_unreadable", "the caption has entities within entities")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError("caption_unreadable", f"the caption is not UTF-8: {error.reason}") from None


def read_image_file(path: Path) -> bytes:
    """Returns the content of an image's file.

    Raises:
      RecordError: it cannot be read, or has more than MAX_FILE_BYTES.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device may never end
            raise RecordError("image_missing", f"{path} is no file")
        if (size := found.st_size) > MAX_FILE_BYTES:
            raise RecordError("image_too_large", f"{path} has {size:,} bytes, over {MAX_FILE_BYTES:,}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise RecordError(file_reason(error, "image_missing"), f"{path} cannot be read: {one_line(error)}") from None


def file_reason(error: Exception, reason: str) -> str:
    """Returns the reason why a record's file cannot be read: its share's, or the file's own, which is `reason`."""
    return UNREACHABLE if isinstance(error, OSError) and error.errno in OUTAGES else reason


def _draw(count: int, shares: Sequence[float], rng: np.random.Generator) -> int:
    if count == 1:
        return 0
    if not shares:
        return int(rng.integers(count))
    point = rng.random() * math.fsum(shares)
    return min(int(np.searchsorted(np.cumsum(shares), point, side="right")), count - 1)
