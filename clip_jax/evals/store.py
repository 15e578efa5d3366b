"""A folder of embeddings: Parquet shards, what became of each, and a manifest.

  job.json              what is being embedded, with what; written first
  images-00000.parquet  record, key, caption, embedding and, if wanted, thumbnail; a row an image
  texts-00000.parquet   record, key, caption, embedding; a row a caption
  00000.json            written when the shard's files are there: rows, sizes, SHA-256, what was rejected and why
  manifest.json         the job, counts and all shards; written last

Every file appears whole or not at all, so a shard is there when its JSON is. The folder may be remote.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
from pyarrow import parquet

from clip_jax.config import describe_diff, diff
from clip_jax.data.storage import FAILURES, Storage, StorageError
from clip_jax.errors import UserError, one_line
from clip_jax.files import check_shape, is_remote, json_object, sweep

Kind = Literal["images", "texts"]
KINDS: tuple[Kind, ...] = ("images", "texts")
FORMAT = 1
REMEDY = "remove manifest.json and run the same clip-jax embed again"
_CONNECTIONS = 16
_FILES: dict[Any, Any] = {...: {"file": str, "rows": int, "bytes": int, "sha256": str}}
_LEFT_S = 3_600.0


class VectorStore:
    """Reads and writes such a folder.

    Args:
      folder: local or remote; may begin with `~`, which shells leave as it is behind a `=`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.expanduser(folder.rstrip("/"))
        self._storage = Storage()

    def begin(self, job: Mapping[str, Any]) -> None:
        """Writes `job.json`, or checks that it is the same job.

        Raises:
          UserError: another job was begun here, or nobody knows which, or the folder cannot be written.
        """
        found = self._read_json("job.json")
        if found is None and self._holds("job.json"):
            raise UserError(
                f"{self.folder}/job.json is damaged, so that nobody knows what lies beside it; name another folder, or "
                "remove this one"
            )
        if found is None:
            self._write("job.json", _json(job))
            return
        changes = {key: values for key, values in diff(found, job).items() if key != "model.source"}
        if changes:
            raise UserError(
                f"{self.folder} holds embeddings of another job ({describe_diff(changes)}); name another folder, or "
                "remove this one"
            )

    def write_shard(self, shard: int, tables: Mapping[Kind, pyarrow.Table], about: Mapping[str, Any]) -> None:
        """Writes a shard's tables and then its JSON, with rows, bytes and SHA-256 of each table added."""
        files = {}
        for kind, table in tables.items():
            buffer = io.BytesIO()
            parquet.write_table(table, buffer, compression="zstd", use_dictionary=False)
            content = buffer.getvalue()
            self._write(shard_file(kind, shard), content)
            files[kind] = {
                "file": shard_file(kind, shard),
                "rows": table.num_rows,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        self._write(_about_file(shard), _json({**about, "files": files}))

    def read_shard(self, shard: int) -> dict[str, Any] | None:
        """Returns what was written of a shard, or None unless all its files are there."""
        about = self._read_json(_about_file(shard))
        if about is None:
            return None
        try:
            check_shape(about, {"records": int, "files": _FILES})
            for file in about["files"].values():
                if self._storage.stat(f"{self.folder}/{file['file']}").size != file["bytes"]:
                    return None
        except (StorageError, ValueError):
            return None
        return about

    def read_shards(self, shards: Iterable[int]) -> list[dict[str, Any] | None]:
        """Returns `read_shard` of several, asked for at the same time: a remote store takes a while for each."""
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return list(pool.map(self.read_shard, shards))

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Writes `manifest.json`, and removes what killed processes left half written, an hour ago or more."""
        self._write("manifest.json", _json(manifest))
        if not is_remote(self.folder):
            sweep(Path(self.folder), seconds=_LEFT_S)  # younger ones another process may be writing

    def read_manifest(self, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Returns the manifest.

        Args:
          shape: what it must hold beside its shards, see `clip_jax.files.check_shape`.

        Raises:
          UserError: there are no embeddings here, or not all of them yet; or the manifest is damaged.
        """
        manifest = self._read_json("manifest.json")
        if manifest is None:
            if self._read_json("job.json") is not None:
                raise UserError(f"the embeddings in {self.folder} are not complete; run the same clip-jax embed again")
            raise UserError(f"{self.folder} holds no embeddings (there is no manifest.json); make them: clip-jax embed")
        if manifest.get("format") != FORMAT:
            raise UserError(f"{self.folder}/manifest.json has format {manifest.get('format')}, not {FORMAT}")
        try:
            check_shape(manifest, {"kinds": [str], "shards": [{"files": _FILES}], **(shape or {})})
        except ValueError as error:
            raise UserError(f"{self.folder}/manifest.json is damaged: {error}; {REMEDY}") from None
        return manifest

    def tables(self, kind: Kind, columns: Sequence[str] | None = None) -> Iterator[pyarrow.Table]:
        """Yields the shards' tables in order.

        Args:
          kind: of what is embedded.
          columns: those that are wanted; None means all.

        Raises:
          UserError: no embeddings of that kind; a shard is missing, or not what the manifest says.
        """
        manifest = self.read_manifest()
        if kind not in manifest["kinds"]:
            raise UserError(
                f"{self.folder} holds embeddings of {' and '.join(manifest['kinds'])} only; embed into another folder "
                f"with --kinds={kind}"
            )
        if not all(kind in shard["files"] for shard in manifest["shards"]):
            raise UserError(f"{self.folder}/manifest.json is damaged: a shard has no {kind}; {REMEDY}")
        for shard in manifest["shards"]:
            file = shard["files"][kind]
            path = f"{self.folder}/{file['file']}"
            try:
                content = self._storage.read_whole(path)
            except StorageError as error:
                raise UserError(f"{error}; {REMEDY}") from None
            if hashlib.sha256(content).hexdigest() != file["sha256"]:
                raise UserError(
                    f"{path} is not what its manifest says (SHA-256); remove it and manifest.json, and run the same "
                    "clip-jax embed again"
                )
            yield parquet.read_table(io.BytesIO(content), columns=None if columns is None else list(columns))

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """Returns a JSON file, or None where there is none that can be read."""
        try:
            return json_object(self._storage.read_whole(f"{self.folder}/{name}"))
        except (StorageError, ValueError):
            return None

    def _holds(self, name: str) -> bool:
        try:
            self._storage.stat(f"{self.folder}/{name}")
        except StorageError:
            return False
        return True

    def _write(self, name: str, content: bytes) -> None:
        try:
            self._storage.write_whole(f"{self.folder}/{name}", content)
        except FAILURES as error:
            raise UserError(f"{one_line(error)}; what is there is kept, run the same command again") from None


def shard_file(kind: Kind, shard: int) -> str:
    """Returns the name of a shard's table."""
    return f"{kind}-{shard:05d}.parquet"


def embedding_column(vectors: np.ndarray) -> pyarrow.FixedSizeListArray:
    """Returns float [n, e] as a column of lists of e."""
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])


def vectors_of(table: pyarrow.Table) -> np.ndarray:
    """Returns the column `embedding` as float32 [n, e]."""
    column = table.column("embedding").combine_chunks()
    width = column.type.list_size
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)


def _about_file(shard: int) -> str:
    return f"{shard:05d}.json"


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
