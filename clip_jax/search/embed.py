"""Embeddings of many images and captions, as Parquet that any vector database loads.

The records of a source are cut into shards of consecutive ones, and a shard is the unit of everything: process i of n
makes every n-th, from the i-th on; a shard that is there is never made again, one that is not is made from nothing. So
a run that was killed is continued by the same command, without loss or duplicate, by any number of processes, which
need not know each other.
"""

import collections
import dataclasses
import functools
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import pyarrow

from clip_jax.config import MeshConfig, RunConfig
from clip_jax.data.images import ImageError, Preprocess, eval_image, open_image, to_jpeg
from clip_jax.data.loader import open_named
from clip_jax.data.reading import name_record
from clip_jax.data.records import UNREACHABLE, Record, RecordError, Source
from clip_jax.data.tar_source import TarSource
from clip_jax.errors import UserError
from clip_jax.evals.embedding import Embedder
from clip_jax.evals.store import FORMAT, Kind, VectorStore, embedding_column
from clip_jax.partition import make_mesh, replicated
from clip_jax.pretrained import Pretrained

_READ_AT_ONCE = 64


@dataclass(frozen=True)
class EmbedOptions:
    """What is made of the records.

    Attributes:
      kinds: `images`, `texts`, or both; every caption is embedded.
      dtype: of the stored embeddings, which have unit length.
      shard: records of a shard.
      thumbnail: longer side in pixels of the JPEG that is stored with an image; 0 for none.
      batch: rows a step, over all devices of this process; rounded up to a multiple of them.
      threads: that read and decode.
    """

    kinds: tuple[Kind, ...] = ("images",)
    dtype: Literal["float16", "float32"] = "float16"
    shard: int = 8_192
    thumbnail: int = 192
    batch: int = 256
    threads: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        for name in ("shard", "batch", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.thumbnail <= 1_024:
            raise UserError(f"--thumbnail is {self.thumbnail}; it must be from 0, which means none, to 1024 pixels")


class Embedded(NamedTuple):
    """What lies in the folder after a run.

    Attributes:
      manifest: of all shards; None while other processes still make theirs.
      shards: made by this run.
      rejected: of these, records by reason.
    """

    manifest: dict[str, Any] | None
    shards: int
    rejected: Counter[str]


def open_images(data: str, model: Pretrained) -> Source:
    """Opens what is to be embedded.

    Args:
      data: as in `clip_jax.data.loader.open_named`.
      model: for the size of synthetic images.

    Raises:
      UserError: nothing there, or another kind of thing.
    """
    return open_named(data, RunConfig(model.config), need_captions=False)


def embed(
    source: Source,
    folder: str,
    *,
    model: Pretrained,
    model_source: str,
    options: EmbedOptions | None = None,
    process_index: int = 0,
    process_count: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> Embedded:
    """Embeds a source, or what is left of it.

    Args:
      source: the records.
      folder: where to; see `clip_jax.evals.store`. May be remote.
      model: whose towers are used, over all devices of this process.
      model_source: where `clip_jax.load` finds it.
      options: what is made of the records.
      process_index: of this process.
      process_count: processes that share the shards.
      report: is given a line for every shard.

    Raises:
      UserError: the folder holds another job's embeddings, or cannot be written; or no record can be used.
    """
    options = options or EmbedOptions()
    store = VectorStore(folder)
    shards = -(-len(source) // options.shard)
    job = _job(source, model, model_source, options)
    store.begin(job)
    own = range(process_index, shards, process_count)
    missing = [shard for shard, found in zip(own, store.read_shards(own), strict=True) if found is None]
    rejected: Counter[str] = Counter()
    encode = _Encoder(model, options)
    began = time.monotonic()
    for made, (shard, rows) in enumerate(_shards_of_rows(source, missing, model.preprocess, options), 1):
        tables, rejects = _tables(rows, encode, options)
        first = shard * options.shard
        about = {"first": first, "records": min(options.shard, len(source) - first), "rejects": rejects}
        store.write_shard(shard, tables, about)
        rejected.update(reject["reason"] for reject in rejects)
        speed = (made * options.shard) / (time.monotonic() - began)
        counts = ", ".join(f"{table.num_rows:,} {kind}" for kind, table in tables.items())
        report(f"shard {shard} ({made}/{len(missing)}): {counts}, {len(rejects):,} rejected; {speed:,.0f} records/s")
    return Embedded(_finish(store, job, shards), len(missing), rejected)


class _Row(NamedTuple):
    """A record that is ready to be embedded, or why it is not."""

    record: int
    key: str
    pixels: np.ndarray | None
    thumbnail: bytes | None
    captions: tuple[str, ...]
    reject: dict[str, Any] | None = None


class _Encoder:
    """Both towers over this process's devices."""

    def __init__(self, model: Pretrained, options: EmbedOptions) -> None:
        mesh = make_mesh(MeshConfig(), devices=jax.local_devices())
        self.batch = -(-options.batch // mesh.size) * mesh.size
        self._embedder = Embedder(model.model, model.tokenize, mesh=mesh, batch=self.batch, preprocess=model.preprocess)
        self._variables = jax.device_put(model.variables, replicated(mesh))
        self._dtype, self._width = np.dtype(options.dtype), model.config.embed_dim

    def images(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Returns unit vectors [n, e]."""
        return self._stored(self._embedder.pixels(self._variables, np.stack(pixels)) if pixels else None)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns unit vectors [n, e]."""
        return self._stored(self._embedder.texts(self._variables, texts) if texts else None)

    def _stored(self, vectors: np.ndarray | None) -> np.ndarray:
        return np.zeros((0, self._width), self._dtype) if vectors is None else vectors.astype(self._dtype)


def _job(source: Source, model: Pretrained, model_source: str, options: EmbedOptions) -> dict[str, Any]:
    """Returns what must be the same when a run is continued."""
    root = getattr(source, "root", None)
    return {
        "format": FORMAT,
        "model": {
            "source": str(Path(model_source).resolve()) if Path(model_source).exists() else model_source,
            "fingerprint": model.fingerprint,
            "embed_dim": model.config.embed_dim,
            "compute": model.config.dtype,
            "preprocess": model.preprocess.to_dict(),
        },
        "data": source.fingerprint,
        "state": source.state,
        "root": None if root is None else str(Path(root).resolve()),
        "records": len(source),
        "kinds": list(options.kinds),
        "dtype": options.dtype,
        "shard_records": options.shard,
        "thumbnail": options.thumbnail,
    }


def _finish(store: VectorStore, job: dict[str, Any], shards: int) -> dict[str, Any] | None:
    """Writes the manifest, if all shards are there; whichever process sees them all does, and all write the same."""
    whole = [about for about in store.read_shards(range(shards)) if about is not None]
    if len(whole) < shards:
        return None
    rejects = [reject for about in whole for reject in about["rejects"]]
    rejected = Counter(reject["reason"] for reject in rejects)
    if len(rejects) == job["records"] > 0:
        reason, count = rejected.most_common(1)[0]
        first = next(reject for reject in rejects if reject["reason"] == reason)
        raise UserError(
            f"none of the {len(rejects):,} records can be used: {count:,} for {reason}, such as {first['where']}: "
            f"{first['message']}; correct that, remove {store.folder}, and run the same command again"
        )
    manifest = {
        **job,
        "rows": {kind: sum(about["files"][kind]["rows"] for about in whole) for kind in job["kinds"]},
        "rejected": dict(sorted(rejected.items())),
        "shards": [{key: about[key] for key in ("first", "records", "files")} for about in whole],
    }
    store.write_manifest(manifest)
    return manifest


def _shards_of_rows(
    source: Source, shards: Sequence[int], preprocess: Preprocess, options: EmbedOptions
) -> Iterator[tuple[int, Iterator[_Row]]]:
    """Yields the rows of each shard, read and decoded ahead by threads, across shards."""
    tasks = (
        (shard, range(first, min(first + _READ_AT_ONCE, (shard + 1) * options.shard, len(source))))
        for shard in shards
        for first in range(shard * options.shard, min((shard + 1) * options.shard, len(source)), _READ_AT_ONCE)
    )
    with ThreadPoolExecutor(options.threads) as pool:

        def submit(task: tuple[int, range]) -> tuple[int, Future[list[_Row]]]:
            return task[0], pool.submit(_read_rows, source, task[1], preprocess, options)

        made = _in_order(map(submit, tasks), ahead=2 * options.threads)
        for shard, parts in itertools.groupby(made, key=lambda part: part[0]):
            yield shard, (row for _, future in parts for row in future.result())


def _in_order(futures: Iterator[tuple[int, Future]], *, ahead: int) -> Iterator[tuple[int, Future]]:
    """Yields futures in order, with so many of them under way."""
    waiting = collections.deque(itertools.islice(futures, ahead))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(futures, 1))


def _tables(
    rows: Iterator[_Row], encode: _Encoder, options: EmbedOptions
) -> tuple[dict[Kind, pyarrow.Table], list[dict[str, Any]]]:
    """Returns the tables of a shard, and its rejects."""
    kept: list[_Row] = []
    rejects: list[dict[str, Any]] = []
    vectors: list[np.ndarray] = []
    pixels: list[np.ndarray] = []
    for row in rows:
        if row.reject is not None:
            rejects.append(row.reject)
            continue
        if row.pixels is not None:
            pixels.append(row.pixels)
            if len(pixels) == encode.batch:
                vectors.append(encode.images(pixels))
                pixels = []
        kept.append(row._replace(pixels=None))  # a shard's pixels need not fit in memory
    tables: dict[Kind, pyarrow.Table] = {}
    if "images" in options.kinds:
        vectors.append(encode.images(pixels))
        captions = [row.captions[0] if row.captions else None for row in kept]
        thumbnails = [row.thumbnail for row in kept] if options.thumbnail else None
        tables["images"] = _table(kept, captions, np.concatenate(vectors), thumbnails)
    if "texts" in options.kinds:
        pairs = [(row, caption) for row in kept for caption in row.captions]
        captions = [caption for _, caption in pairs]
        tables["texts"] = _table([row for row, _ in pairs], captions, encode.texts(captions))
    return tables, rejects


def _table(
    rows: Sequence[_Row],
    captions: Sequence[str | None],
    vectors: np.ndarray,
    thumbnails: Sequence[bytes | None] | None = None,
) -> pyarrow.Table:
    columns: dict[str, Any] = {
        "record": pyarrow.array([row.record for row in rows], pyarrow.int64()),
        "key": pyarrow.array([row.key for row in rows], pyarrow.string()),
        "caption": pyarrow.array(captions, pyarrow.string()),
    }
    if thumbnails is not None:
        columns["thumbnail"] = pyarrow.array(thumbnails, pyarrow.binary())
    return pyarrow.table(columns | {"embedding": embedding_column(vectors)})


def _read_rows(source: Source, records: range, preprocess: Preprocess, options: EmbedOptions) -> list[_Row]:
    """Returns the rows of consecutive records; what cannot be used says why.

    Raises:
      UserError: a tar shard cannot be read, which may pass: the run is to be continued then.
    """
    rows = []
    for index, read, key in _reads(source, records):
        try:
            rows.append(_row(index, read(), key, preprocess, options))
        except (ImageError, RecordError) as error:
            if error.reason in ("shard_missing", UNREACHABLE):
                raise UserError(f"{error}; when it can be read, run the same command again") from None
            reject = {"record": index, "where": name_record(source, index), "message": str(error)}
            reject = {name: _utf8(value) if isinstance(value, str) else value for name, value in reject.items()}
            rows.append(_Row(index, "", None, None, (), reject | {"reason": error.reason}))
    return rows


def _reads(source: Source, records: range) -> Iterator[tuple[int, Callable[[], Record], Callable[[], str]]]:
    """Yields a record's number, what reads it, and what then gives its key."""
    if isinstance(source, TarSource):
        for part in source.split(records):
            block = source.read_block(part.start, len(part))
            for index in part:
                read = functools.partial(block.__getitem__, index - part.start)
                yield index, read, functools.partial(source.key, index, block)
        return
    key = getattr(source, "key", str)
    for index in records:
        yield index, functools.partial(source.__getitem__, index), functools.partial(key, index)


def _row(index: int, record: Record, key: Callable[[], str], preprocess: Preprocess, options: EmbedOptions) -> _Row:
    captions = tuple(caption for caption in record.captions if caption.strip())
    row = _Row(index, _utf8(key()), None, None, captions)
    if "images" not in options.kinds:
        return row
    image = open_image(record.image)
    thumbnail = to_jpeg(image, longest=options.thumbnail) if options.thumbnail else None
    return row._replace(pixels=eval_image(image, preprocess), thumbnail=thumbnail)


def _utf8(text: str) -> str:
    """Returns text that Parquet can hold: a path need not be UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
