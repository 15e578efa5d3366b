"""Nearest neighbours among embeddings, with FAISS: exact for few, IVF with 8-bit vectors for many.

An index is a folder that needs nothing else: `index.faiss`; `items.arrow`, which says what lies at each number and
holds the thumbnails; `index.json`, which says how it was made and what it was measured to find. Both large files are
mapped into memory, so opening one takes no time and several processes share the pages.

IVF (Jégou et al., 2011) puts every vector into the cell of its nearest centroid and compares a query with the vectors
of `nprobe` cells only. `nprobe` is not guessed: it is raised until the ten nearest are found as often as asked for,
judged against an exact search with queries that are not themselves in the way.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow

from clip_jax.console import plain_table
from clip_jax.errors import UserError, one_line
from clip_jax.evals.store import REMEDY, Kind, VectorStore, vectors_of
from clip_jax.files import check_shape, json_object, new_folder

EXACT_LIMIT = 100_000
"""Up to so many vectors are searched exactly."""

NEIGHBOURS = 10
FORMAT = 1
_QUERIES = 256
_TRAINED_PER_CELL = 64
_ABOUT = {"of": str, "count": int, "kind": str, "root": str | None, "model": {"source": str, "fingerprint": str}}
_MANIFEST = {"rows": {...: int}, "rejected": {}, "data": {}, "root": str | None, "model": {"embed_dim": int}}


class Item(NamedTuple):
    """What was embedded.

    Attributes:
      record: its number in the source.
      key: its path or name there.
      caption: a text, or None.
      thumbnail: a JPEG, or None.
    """

    record: int
    key: str
    caption: str | None
    thumbnail: bytes | None


class SearchIndex:
    """An index that was built; threads may share one.

    Attributes:
      about: what `index.json` says.
      nprobe: cells that a query is compared with; 0 for an exact index.
    """

    def __init__(self, folder: str | Path, *, nprobe: int | None = None) -> None:
        """Opens an index.

        Args:
          folder: as `build_index` made it.
          nprobe: cells that are searched, where it is to differ.

        Raises:
          UserError: none there, or damaged; or `nprobe` of one that has no cells.
        """
        import faiss

        self.folder = Path(folder).expanduser()
        self.about = _read_about(self.folder)
        try:
            mapped = faiss.IO_FLAG_MMAP_IFC if self.about["kind"] == "exact" else faiss.IO_FLAG_MMAP
            self._index = cast(Any, faiss.read_index(str(self.folder / "index.faiss"), mapped))
            self._items = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.folder / "items.arrow")))
        except (RuntimeError, OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{self.folder} cannot be opened as an index: {one_line(error)}") from None
        sizes = [self._items.get_batch(i).num_rows for i in range(self._items.num_record_batches)]
        self._ends = np.cumsum(sizes)
        if not self._index.ntotal == sum(sizes) == self.about["count"]:
            raise UserError(
                f"{self.folder}: {self._index.ntotal:,} vectors, {sum(sizes):,} items and a count of "
                f"{self.about['count']:,} do not belong together; build the index again"
            )
        if nprobe and self.about["kind"] == "exact":
            raise UserError(
                f"{self.folder} is an exact index, which has no cells to search {nprobe} of; leave nprobe out"
            )
        self.nprobe = max(0, min(nprobe or self.about.get("nprobe", 0), getattr(self._index, "nlist", 0)))
        if self.nprobe:
            self._index.nprobe = self.nprobe

    def __len__(self) -> int:
        return self.about["count"]

    @property
    def root(self) -> Path | None:
        """The folder below which keys are paths of images, if there is one."""
        return None if self.about["root"] is None else Path(self.about["root"])

    def search(self, vectors: np.ndarray, *, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the cosines, float32 [q, k], and numbers, int64 [q, k], of the nearest, best first.

        Args:
          vectors: unit length, [q, e].
          top: of each query; k is at most the number of items. A number is -1 where the cells searched held fewer.

        Raises:
          UserError: another dimension, or a `top` that is not positive.
        """
        if top < 1:
            raise UserError(f"top is {top}; it must be positive")
        if vectors.shape[1] != self._index.d:
            raise UserError(f"queries have {vectors.shape[1]} dimensions, and {self.folder} has {self._index.d}")
        return self._index.search(np.ascontiguousarray(vectors, np.float32), min(top, len(self)))

    def item(self, number: int) -> Item:
        """Returns what lies at a number.

        Raises:
          IndexError: there is no such number.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        batch = int(np.searchsorted(self._ends, number, side="right"))
        rows = self._items.get_batch(batch)
        row = number - int(self._ends[batch]) + rows.num_rows
        values = {name: rows.column(name)[row].as_py() for name in rows.schema.names}
        return Item(values["record"], values["key"], values["caption"], values.get("thumbnail"))


def build_index(
    vectors: str,
    folder: str | Path,
    *,
    kind: Kind = "images",
    target: float = 0.95,
    exact_limit: int = EXACT_LIMIT,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Builds an index of embeddings; returns what its `index.json` says.

    It needs memory for the index: 4 bytes a dimension and vector for an exact one, 1 for IVF.

    Args:
      vectors: folder of `clip-jax embed`.
      folder: where to; must not exist. Appears whole.
      kind: index images or texts.
      target: share of the ten nearest that IVF must find.
      exact_limit: more vectors than this are searched with IVF.
      report: is given lines to show.

    Raises:
      UserError: `folder` exists, the embeddings are not whole, or there are none.
    """
    if not 0 < target <= 1:
        raise UserError(f"--recall is {target}; it must be over 0 and at most 1")
    store = VectorStore(vectors)
    manifest = store.read_manifest(_MANIFEST)
    count = manifest["rows"].get(kind, 0)
    if kind in manifest["kinds"] and not count:
        raise UserError(f"{vectors} holds no {kind}; records that were rejected: {manifest['rejected'] or 'none'}")
    _check_manifest(store, kind, manifest)
    with new_folder(Path(folder).expanduser()) as partial:
        began = time.monotonic()
        index, found = _build(store, kind, count, exact=count <= exact_limit, items=partial / "items.arrow")
        found |= {"build_seconds": round(time.monotonic() - began, 2)}
        found |= _measure(index, store, kind, manifest, target=target, report=report)
        _write_faiss(index, partial / "index.faiss")
        about = {
            "format": FORMAT,
            "of": kind,
            "count": count,
            "dimensions": index.d,
            **found,
            "vectors": str(Path(vectors).resolve()) if "://" not in vectors else vectors,
            "model": manifest["model"],
            "data": manifest["data"],
            "root": manifest["root"],
            "bytes": (partial / "index.faiss").stat().st_size,
        }
        (partial / "index.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def _check_manifest(store: VectorStore, kind: Kind, manifest: dict[str, Any]) -> None:
    """Refuses a manifest whose sums are not those of its shards."""
    first = next(store.tables(kind, ["embedding"]))
    stated = (manifest["rows"][kind], manifest["model"]["embed_dim"])
    found = (sum(shard["files"][kind]["rows"] for shard in manifest["shards"]), vectors_of(first).shape[1])
    if stated != found:
        raise UserError(
            f"{store.folder}/manifest.json says {stated[0]:,} {kind} of {stated[1]:,} dimensions, and its shards hold "
            f"{found[0]:,} of {found[1]:,}; {REMEDY}"
        )


def _build(store: VectorStore, kind: Kind, count: int, *, exact: bool, items: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the FAISS index of all vectors, and a few facts; writes the items on the way."""
    import faiss

    dimensions = store.read_manifest()["model"]["embed_dim"]
    cells = 0 if exact else max(1, min(round(4 * count**0.5), count // 4))
    if exact:
        index, facts = faiss.IndexFlatIP(dimensions), {"kind": "exact"}
    else:
        index = cast(Any, faiss.index_factory(dimensions, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT))
        index.cp.max_points_per_centroid = _TRAINED_PER_CELL
        index.train(_sample(store, kind, count, cells * _TRAINED_PER_CELL))
        facts = {"kind": "ivf_sq8", "cells": cells}
    writer = None
    for table, rows in _shards(store, kind):
        index.add(rows)
        table = table.drop_columns("embedding").combine_chunks()
        writer = writer or pyarrow.ipc.new_file(str(items), table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return index, facts


def _sample(store: VectorStore, kind: Kind, count: int, wanted: int, *, seed: int = 0) -> np.ndarray:
    """Returns vectors at random places, float32 [min(count, wanted), e]."""
    chosen = np.sort(np.random.default_rng(seed).choice(count, min(count, wanted), replace=False))
    parts, first = [], 0
    for _, rows in _shards(store, kind, ["embedding"]):
        inside = chosen[(chosen >= first) & (chosen < first + len(rows))] - first
        parts.append(rows[inside])
        first += len(rows)
    return np.concatenate(parts)


def _shards(
    store: VectorStore, kind: Kind, columns: Sequence[str] | None = None
) -> Iterator[tuple[pyarrow.Table, np.ndarray]]:
    """Yields the shards' tables in order, and their vectors, float32 [n, e].

    Raises:
      UserError: as `VectorStore.tables`; or a shard's vectors are of other dimensions than the manifest says.
    """
    dimensions = store.read_manifest()["model"]["embed_dim"]
    for table in store.tables(kind, columns):
        rows = vectors_of(table)
        if rows.shape[1] != dimensions:
            raise UserError(
                f"{store.folder} holds vectors of {rows.shape[1]} dimensions; its manifest says {dimensions}; {REMEDY}"
            )
        yield table, rows


def _measure(
    index: Any, store: VectorStore, kind: Kind, manifest: dict[str, Any], *, target: float, report: Callable
) -> dict[str, Any]:
    """Chooses `nprobe` and says what it finds; see `choose_nprobe`.

    Queries are of the other kind where there is one, as people search images by texts; else perturbed vectors.
    """
    others: Kind = "texts" if kind == "images" else "images"
    if manifest["rows"].get(others):
        queries, what = _sample(store, others, manifest["rows"][others], _QUERIES), others
    else:
        queries, what = perturbed(_sample(store, kind, manifest["rows"][kind], _QUERIES)), f"perturbed {kind}"
    queries = np.ascontiguousarray(queries)
    if not hasattr(index, "nprobe"):
        began = time.monotonic()
        index.search(queries, min(NEIGHBOURS, index.ntotal))
        milliseconds = (time.monotonic() - began) / len(queries) * 1_000
        report(f"exact search: {milliseconds:.3f} ms a query in batches of {len(queries)} {what}")
        return {"recall_at_10": 1.0, "milliseconds": milliseconds, "queries": what}
    blocks = (rows for _, rows in _shards(store, kind, ["embedding"]))
    return {"queries": what} | choose_nprobe(index, queries, blocks, target=target, report=report, what=what)


def perturbed(vectors: np.ndarray, *, noise: float = 0.5, seed: int = 0) -> np.ndarray:
    """Returns unit vectors near those given: a random direction of so much length is added."""
    away = np.random.default_rng(seed).standard_normal(vectors.shape, np.float32)
    moved = vectors + noise * away / np.linalg.norm(away, axis=1, keepdims=True)
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def choose_nprobe(
    index: Any,
    queries: np.ndarray,
    blocks: Iterator[np.ndarray],
    *,
    target: float,
    report: Callable[[str], None],
    what: str = "queries",
) -> dict[str, Any]:
    """Sets the smallest power of two of `nprobe` that finds enough; returns it, the recall and times.

    Args:
      index: IVF.
      queries: unit length, float32 [q, e].
      blocks: all vectors, for the exact search.
      target: wanted share of the ten nearest.
      report: is given the table of what was tried.
      what: the queries are, for the table.
    """
    top = min(NEIGHBOURS, index.ntotal)
    exact, exact_ms = exact_neighbours(queries, blocks, top=top)
    rows, found = [["exact", "100.0 %", f"{exact_ms:.3f}"]], {}
    nprobe = 1
    while True:
        index.nprobe = nprobe
        began = time.monotonic()
        _, numbers = index.search(queries, top)
        milliseconds = (time.monotonic() - began) / len(queries) * 1_000
        recall = np.mean([len(set(a) & set(b)) / top for a, b in zip(numbers, exact, strict=True)])
        rows.append([str(nprobe), f"{recall:.1%}".replace("%", " %"), f"{milliseconds:.3f}"])
        found = {"nprobe": nprobe, "recall_at_10": float(recall), "milliseconds": milliseconds}
        if recall >= target or nprobe >= index.nlist:
            break
        nprobe = min(2 * nprobe, index.nlist)
    title = f"{index.ntotal:,} vectors in {index.nlist:,} cells; {len(queries)} {what}"
    report(plain_table(title, ["nprobe", f"recall@{top}", "ms a query"], rows))
    return found | {"exact_milliseconds": exact_ms}


def exact_neighbours(queries: np.ndarray, blocks: Iterator[np.ndarray], *, top: int) -> tuple[np.ndarray, float]:
    """Returns the numbers of the nearest, int64 [q, top], and the milliseconds that the search took a query."""
    import faiss

    best = np.full((len(queries), top), -np.inf, np.float32)
    numbers = np.full((len(queries), top), -1, np.int64)
    first, seconds = 0, 0.0
    for block in blocks:
        began = time.monotonic()
        scores, near = faiss.knn(queries, block, min(top, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        best, numbers = np.hstack([best, scores]), np.hstack([numbers, near + first])
        order = np.argsort(-best, axis=1, kind="stable")[:, :top]
        best, numbers = np.take_along_axis(best, order, 1), np.take_along_axis(numbers, order, 1)
        first += len(block)
        seconds += time.monotonic() - began
    return numbers, seconds / len(queries) * 1_000


def _write_faiss(index: Any, path: Path) -> None:
    import faiss

    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise UserError(f"{path.parent} cannot be written: {one_line(error)}") from None


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json_object((folder / "index.json").read_bytes())
        if about.get("format") == FORMAT:
            check_shape(about, _ABOUT | ({} if about.get("kind") == "exact" else {"nprobe": int}))
    except OSError as error:
        hint = " (it holds embeddings; build one: clip-jax index)" if (folder / "manifest.json").exists() else ""
        raise UserError(f"{folder} holds no index: {one_line(error)}{hint}") from None
    except ValueError as error:
        raise UserError(f"{folder / 'index.json'} cannot be read: {one_line(error)}; build the index again") from None
    if about.get("format") != FORMAT:
        raise UserError(f"{folder / 'index.json'} is not of an index of format {FORMAT}")
    return about
