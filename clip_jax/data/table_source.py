"""Images and captions that a table names: CSV, TSV or Parquet, beside a folder of images."""

import hashlib
import importlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

from clip_jax.data.records import Record, RecordError, decode_caption, read_image_file
from clip_jax.errors import UserError, did_you_mean, one_line
from clip_jax.files import state_of

_LOG = logging.getLogger(__name__)
_READING = threading.Lock()
_TEXT = frozenset({"string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null"})


class TableSource:
    """Rows of a table, each with the path of an image, or the image itself, and a caption or a list of captions.

    In Parquet of Hugging Face's `datasets` an image is a struct of `bytes` and `path`; without bytes the path is taken.

    The table is kept in memory in Arrow's columns, and read again in every process that receives the source.

    Attributes:
      root: folder to which paths are relative.
      fingerprint: file, number of rows and columns, as JSON holds them.
    """

    def __init__(
        self, table: Path, *, image_key: str = "image", caption_key: str = "caption", image_root: str = ""
    ) -> None:
        """Reads the table.

        Args:
          table: `.csv`, `.tsv` or `.parquet`; a `.csv` with a tab in its first line is read as a `.tsv`.
          image_key: column of paths, of encoded images, or of structs of both.
          caption_key: column of captions, or of lists of captions; empty for none.
          image_root: folder to which paths are relative; empty means the table's.

        Raises:
          UserError: it cannot be read, has no such columns or several of a name, or something else in them; or the keys
            do not name two columns.
        """
        if image_key in ("", caption_key):
            raise UserError(f"config.data.image_key is {image_key!r}; it must name the column of images, and no other")
        self._path, self._keys = table.expanduser(), tuple(filter(None, (image_key, caption_key)))
        self.root = Path(image_root).expanduser() if image_root else self._path.parent
        self._layout: tuple[str, list[str]] | None = None  # of text: what is between columns, and their names
        self._columns = self._read()
        self._warn_of_open_quotes()
        self.fingerprint: dict[str, Any] = {
            "name": "table",
            "table": str(self._path),
            "records": len(self._columns[0]),
            "columns": list(self._keys),
        }

    @property
    def state(self) -> str:
        """A digest of the table's size and time of change."""
        return state_of(self._path.parent, [self._path.name])

    def __len__(self) -> int:
        return self.fingerprint["records"]

    def __str__(self) -> str:
        return str(self._path)

    def __getitem__(self, index: int) -> Record:
        """Returns a row.

        Raises:
          RecordError: it cannot be used.
        """
        image = self._image(index)
        captions = _value(self._columns[1][index], "caption") if len(self._columns) > 1 else None
        if not image:
            raise RecordError("image_missing", "the row names no image")
        texts = captions if isinstance(captions, list) else [captions]
        return Record(
            image if isinstance(image, bytes) else read_image_file(self.root / str(image)),
            tuple(decode_caption(_encoded(text)) for text in texts if text is not None),
        )

    def where(self, index: int) -> str:
        """Returns what to call a row in messages."""
        return f"row {index} of {self._path}"

    def key(self, index: int) -> str:
        """Returns the path of a row's image, or the row's number where the table holds the image itself."""
        image = self._image(index)
        return image if image and isinstance(image, str) else str(index)

    def by_image(self) -> list[list[int]]:
        """Returns the rows of each image: those that name the same file, or hold the same bytes."""
        found: dict[str | bytes | int, list[int]] = {}
        for index in range(len(self)):
            try:
                image = self._image(index) or index
            except RecordError:  # which says so when it is read
                image = index
            own = hashlib.blake2b(image, digest_size=16).digest() if isinstance(image, bytes) else image
            found.setdefault(own, []).append(index)
        return list(found.values())

    def _image(self, index: int) -> str | bytes | None:
        """Returns what stands in the column of images: a path, or an encoded image.

        Raises:
          RecordError: a path that is not UTF-8, in Parquet.
        """
        with _READING:  # once, for all threads
            if self._columns is None:
                self._columns = self._read()
        image = _value(self._columns[0][index], "image")
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        # Text tables are read as bytes, so that one caption which is not UTF-8 does not cost the table.
        return os.fsdecode(image) if image and self._path.suffix.lower() != ".parquet" else image

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_columns": None}

    def _read(self) -> Any:
        import pyarrow
        from pyarrow import csv, parquet

        suffix = self._path.suffix.lower()
        try:
            if suffix == ".parquet":
                schema = parquet.read_schema(self._path)
                self._check_columns(schema.names)
                self._check_types(schema)
                table = parquet.read_table(self._path, columns=list(self._keys), memory_map=True)
            elif suffix in (".csv", ".tsv"):
                with self._path.open("rb") as file:
                    tabs = suffix == ".tsv" or b"\t" in file.readline()  # open_clip's .csv have tabs
                parse = csv.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=True)
                with csv.open_csv(self._path, parse_options=parse) as rows:
                    self._check_columns(rows.schema.names)
                    self._layout = parse.delimiter, rows.schema.names
                as_text = csv.ConvertOptions(
                    column_types=dict.fromkeys(self._keys, pyarrow.binary()), include_columns=self._keys
                )
                table = csv.read_csv(self._path, parse_options=parse, convert_options=as_text)
            else:
                raise UserError(f"config.data.table={self._path}: it must be .csv, .tsv or .parquet")
        except UnicodeDecodeError as error:
            what = f"names of columns that are not UTF-8 ({error.reason}); save it as UTF-8"
            raise UserError(f"config.data.table={self._path}: it has {what}") from None
        except (OSError, pyarrow.ArrowException) as error:
            hint = "; is a quotation mark not closed?" if "straddling" in str(error) else ""  # a row of over 1 MiB
            raise UserError(f"config.data.table={self._path}: {one_line(error)}{hint}") from None
        return tuple(table.column(key) for key in self._keys)

    def _warn_of_open_quotes(self) -> None:
        """Looks for rows in captions: with a quotation mark that nothing closes begins one that ends far below."""
        if self._layout is None or len(self._keys) < 2:
            return
        compute: Any = importlib.import_module("pyarrow.compute")  # its functions are made when it is imported
        delimiter, names = self._layout
        place, (images, captions) = names.index(self._keys[0]), self._columns
        lost: list[tuple[int, str]] = []
        for index in compute.indices_nonzero(compute.match_substring(captions, "\n")).to_pylist():
            image = os.fsdecode(images[index].as_py() or b"")
            kind = Path(image).suffix.lower()
            for line in os.fsdecode(captions[index].as_py()).splitlines():
                parts = line.split(delimiter)
                if kind and len(parts) == len(names) and Path(parts[place]).suffix.lower() == kind:
                    lost.append((index, image))
        if lost:
            _LOG.warning(
                "%s: %d row(s) seem to lie within captions, the first in that of row %d (%s): is a quotation mark not "
                "closed? They are no pairs of their own",
                self._path,
                len(lost),
                *lost[0],
            )

    def _check_columns(self, names: list[str]) -> None:
        for key, config_key in zip(self._keys, ("image_key", "caption_key"), strict=False):
            if key not in names:
                raise UserError(
                    f"{self._path} has no column {key!r}{did_you_mean(key, names)} (it has {', '.join(names)}); set "
                    f"config.data.{config_key}, or give eval and embed source=table,table={self._path},{config_key}=…"
                )
            if (count := names.count(key)) > 1:
                raise UserError(
                    f"{self._path} has {count} columns {key!r}; rename all but one, or name another one as "
                    f"config.data.{config_key}"
                )

    def _check_types(self, schema: Any) -> None:
        for key, (config_key, fits, wanted) in zip(self._keys, _COLUMNS, strict=False):
            kind = schema.field(key).type
            if not fits(kind):
                raise UserError(
                    f"{self._path} holds {kind} in its column {key!r}; config.data.{config_key} must name a column of "
                    f"{wanted}"
                )


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    if not types.is_struct(kind):
        return _is_text(kind)
    parts = [part.type for part in kind if part.name in ("bytes", "path")]
    return bool(parts) and all(map(_is_text, parts))


def _is_caption(kind: Any) -> bool:
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return _is_text(kind.value_type if is_list else kind)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return str(kind.value_type if types.is_dictionary(kind) else kind) in _TEXT


_COLUMNS = (
    ("image_key", _is_image, "paths, of encoded images, or of structs of bytes and path"),
    ("caption_key", _is_caption, "texts, or of lists of texts"),
)


def _value(scalar: Any, role: str) -> Any:
    """Returns an Arrow value as Python's.

    Raises:
      RecordError: a text that is not UTF-8, which Parquet's writers may have left unchecked.
    """
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        reason = "image_missing" if role == "image" else "caption_unreadable"
        raise RecordError(reason, f"the {role} is not UTF-8: {error.reason}") from None


def _encoded(text: Any) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode("utf-8", "replace")
