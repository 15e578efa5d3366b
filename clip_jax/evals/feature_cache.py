"""Features of a dataset's images on disk: embedded once, and gone on with where a run was stopped.

The folder is one of `clip_jax.evals.store`: shards of consecutive records, each whole or not there, and what was
embedded with what, so that another model's features are never taken for this one's. Only the first process reads and
writes it.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pyarrow

from clip_jax.data.images import Preprocess
from clip_jax.data.labelled import LabelledSource
from clip_jax.data.reading import Subset
from clip_jax.data.records import Records
from clip_jax.evals.embedding import ImageFeatures
from clip_jax.evals.store import FORMAT, VectorStore, embedding_column, vectors_of
from clip_jax.processes.distributed import from_first

SHARD = 8_192


class FeatureCache:
    """Keeps features of one model's images below a folder, which may be remote.

    Args:
      folder: gets a folder for every model, kind of features and dataset.
      model: its fingerprint.
      dtype: in which it computes.
      kind: of the features.
      preprocess: how images were cut.
      shard: records that are embedded, and lost by a kill, at once.
    """

    def __init__(
        self, folder: str, *, model: str, dtype: str, kind: str, preprocess: Preprocess, shard: int = SHARD
    ) -> None:
        self._folder, self._shard = folder.rstrip("/"), shard
        about = {"fingerprint": model, "compute": dtype, "preprocess": preprocess.to_dict()}
        self._about = {"model": about, "features": kind}

    def images(self, source: LabelledSource, embed: Callable[[Records], ImageFeatures]) -> ImageFeatures:
        """Returns a source's features and labels; collective over processes.

        Args:
          source: the same in every process.
          embed: embeds what is not there.

        Raises:
          UserError: the folder cannot be read or written.
        """
        data = {"data": source.fingerprint, "state": source.state}
        job = self._about | data | {"records": len(source), "shard_records": self._shard}
        name = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
        store = VectorStore(f"{self._folder}/{name}")
        first = jax.process_index() == 0
        if first:
            store.begin(job)
        ranges = [range(at, min(at + self._shard, len(source))) for at in range(0, len(source), self._shard)]
        there = (
            [found is not None for found in store.read_shards(range(len(ranges)))] if first else [False] * len(ranges)
        )
        everywhere = from_first(np.array(there, np.int32))
        for shard, records in enumerate(ranges):
            if not everywhere[shard]:
                made = embed(Subset(source, records))
                if first:
                    store.write_shard(shard, {"images": _table(made, records.start)}, {"records": len(records)})
        return self._read(store, job, len(ranges))

    def _read(self, store: VectorStore, job: dict[str, Any], shards: int) -> ImageFeatures:
        """Returns what is stored, as the first process reads it."""
        features, labels = np.zeros((0, 0), np.float32), np.zeros(0, np.int32)
        if jax.process_index() == 0:
            written = [store.read_shard(shard) or {} for shard in range(shards)]
            store.write_manifest({**job, "format": FORMAT, "kinds": ["images"], "shards": written})
            tables = list(store.tables("images"))
            features = np.concatenate([vectors_of(table) for table in tables])
            labels = np.concatenate([table.column("label").to_numpy() for table in tables]).astype(np.int32)
        rows, width = from_first(np.array(features.shape)).tolist()
        if jax.process_index() != 0:
            features, labels = np.zeros((rows, width), np.float32), np.zeros(rows, np.int32)
        return ImageFeatures(from_first(features), from_first(labels), np.arange(rows, dtype=np.int32))


def _table(found: ImageFeatures, first: int) -> pyarrow.Table:
    columns = {
        "record": pyarrow.array(found.index.astype(np.int64) + first),
        "label": pyarrow.array(found.labels.astype(np.int64)),
        "embedding": embedding_column(found.features.astype(np.float32)),
    }
    return pyarrow.table(columns)
