"""Which texts of a sample are its captions, and how often each is drawn."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from clip_jax.data.records import MAX_METADATA_BYTES, RecordError, decode_caption
from clip_jax.errors import ConfigError

DEFAULT = ("txt", "json.caption")


class _Field(NamedTuple):
    """A place for captions: `txt`, or a key of the JSON; and its share of the draws."""

    place: str
    share: float


class CaptionFields:
    """Finds the captions of a sample.

    Args:
      fields: `txt`, or `json.key` for a text or a list of texts in the `.json`, each with `=share` behind it for how
        often it is drawn, as in `("txt=0.3", "json.synthetic=0.7")`; without, equally often. A list shares its field's
        part; fields that a sample lacks are left out. Empty: `txt`, or where there is none, `json.caption`.
      needed: refuse a sample without a caption, or with one that cannot be read.
      by_line: every line of a `.txt` is a caption, as in CLIP_benchmark's exports for retrieval; else all of it is one.

    Raises:
      ConfigError: not such a field.
    """

    def __init__(self, fields: tuple[str, ...] = (), *, needed: bool = True, by_line: bool = False) -> None:
        self._needed, self._by_line = needed, by_line
        self._fields = [_parse(field) for field in fields or DEFAULT]
        self._first_only = not fields

    def find(self, text: bytes | None, metadata: bytes | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Returns the captions, and how often each is drawn.

        Args:
          text: content of the sample's `.txt`.
          metadata: content of its `.json`.

        Raises:
          RecordError: there is none, or one cannot be read; not where captions are not needed.
        """
        try:
            return self._find(text, metadata)
        except RecordError:
            if self._needed:
                raise
            return (), ()

    def _find(self, text: bytes | None, metadata: bytes | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
        captions: list[str] = []
        shares: list[float] = []
        values: Mapping[str, Any] | None = None
        for place, share in self._fields:
            if place == "txt":
                found = [decode_caption(text)] if text is not None else []
                found = [line for caption in found for line in caption.splitlines()] if self._by_line else found
            elif metadata is None:
                found = []
            else:
                values = parse_metadata(metadata) if values is None else values
                found = _texts(values.get(place.removeprefix("json.")))
            found = [caption for caption in found if caption.strip()]
            captions += found
            shares += [share / max(len(found), 1)] * len(found)
            if captions and self._first_only:
                break
        if not captions:
            raise RecordError("caption_missing", f"no caption in {', '.join(place for place, _ in self._fields)}")
        return tuple(captions), tuple(shares)


def parse_metadata(content: bytes) -> Mapping[str, Any]:
    """Returns a sample's JSON.

    Raises:
      RecordError: it is none, or longer than MAX_METADATA_BYTES.
    """
    if len(content) > MAX_METADATA_BYTES:
        raise RecordError("caption_unreadable", f"the .json has {len(content):,} bytes, over {MAX_METADATA_BYTES:,}")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise RecordError("caption_unreadable", "the .json cannot be parsed") from None
    if not isinstance(values, Mapping):
        raise RecordError("caption_unreadable", "the .json is not a mapping")
    return values


def _texts(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [decode_caption(text.encode("utf-8", "replace")) for text in texts if isinstance(text, str)]


def _parse(field: str) -> _Field:
    place, _, share = field.partition("=")
    try:
        parsed = _Field(place.strip(), float(share or 1))
    except ValueError:
        parsed = _Field("", 0)
    if not (parsed.place == "txt" or parsed.place.startswith("json.")) or not 0 < parsed.share < float("inf"):
        raise ConfigError(
            f"config.data.captions holds {field!r}; it must be txt or json.key, and =share behind it if fields are not "
            "drawn equally often, such as json.caption=0.7"
        )
    return parsed
