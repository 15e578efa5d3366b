"""Tar shards in the layout of img2dataset and webdataset, local or remote.

Only the number of samples of each shard must be known when a run begins. Where they lie is looked up shard by shard,
the first time that one is read, and kept in sidecars (`clip_jax.data.tar_index`). A record is (shard, number in it), so
that what a shard lacks, or cannot be read, costs only its own slots.
"""

import bisect
import contextlib
import logging
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data.captions import CaptionFields, parse_metadata
from clip_jax.data.filters import Filter
from clip_jax.data.patterns import expand
from clip_jax.data.records import MAX_FILE_BYTES, UNREACHABLE, Record, RecordError
from clip_jax.data.storage import FAILURES, Storage, StorageError
from clip_jax.data.tar_counts import find_counts, remembered_in
from clip_jax.data.tar_index import (
    BLOCK,
    PARTS,
    ReadAt,
    ShardIndex,
    Sidecars,
    header_size,
    members,
    sample_key,
)
from clip_jax.errors import OutageError, UserError
from clip_jax.files import is_remote, state_of

_LOG = logging.getLogger(__name__)
_GAP = 256 << 10
_KEPT_INDEXES = 1_024
_JUDGED_AT_ONCE = 256


class TarSource:
    """Samples of tar shards, numbered through in the order of the shards.

    Threads may share one; a pickle of it carries paths and counts only.

    Attributes:
      counts: samples of each shard; int64 [shards].
      fingerprint: what identifies the samples, as JSON holds it.
    """

    def __init__(
        self,
        shards: str,
        *,
        index_dir: str,
        counts: str = "",
        captions: tuple[str, ...] = (),
        keep: Filter | None = None,
        retry_s: float = 300.0,
        threads: int = 8,
        index: bool = False,
        need_captions: bool = True,
        captions_by_line: bool = False,
    ) -> None:
        """Finds the shards and how many samples each has.

        Args:
          shards: paths or URLs, see `clip_jax.data.patterns.expand`.
          index_dir: folder of the sidecars.
          counts: JSON file {name or path of a shard: samples}; empty means `sizes.json` beside the shards, or
            img2dataset's `_stats.json`, or what the sidecars say.
          captions: see `CaptionFields`.
          keep: which samples are used; None means all.
          retry_s: seconds for which remote reads are tried again.
          threads: shards looked at at the same time.
          index: look into however many shards whose number of samples is not known, remote ones too.
          need_captions: a sample without one cannot be used.
          captions_by_line: every line of a `.txt` is a caption.

        Raises:
          UserError: no shards, or their counts are neither known nor to be found out.
        """
        self._storage = Storage(retry_s)
        self._sidecars = Sidecars(self._storage, index_dir)
        self._patterns = shards
        self._captions = CaptionFields(captions, needed=need_captions, by_line=captions_by_line)
        self._keep = keep or None
        self._paths = expand(shards)
        digest = keep.digest if keep else ""
        with ThreadPoolExecutor(threads) as pool:
            self.counts = find_counts(
                self._paths,
                self._storage,
                file=counts,
                remembered=remembered_in(index_dir, self._paths, digest),
                all_used=not keep,
                count=self._count,
                pool=pool,
                index_all=index,
            )
        if not self.counts.sum():
            raise UserError(f"{shards} has no samples" + (" that the filters keep" if keep else ""))
        self._starts = np.cumsum(self.counts) - self.counts
        self._reset()
        self.fingerprint: dict[str, Any] = {
            "name": "tars",
            "shards": shards,
            "records": int(self.counts.sum()),
            "filter": digest,
        }

    @property
    def state(self) -> str | None:
        """A digest of local shards' sizes and times of change.

        Remote ones are not asked for theirs, which would be a request for each from every process.
        """
        local = [path for path in self._paths if not is_remote(path)]
        return state_of(Path(), local) if local else None

    @property
    def sizes(self) -> dict[str, int]:
        """The samples of each shard, as a file for `counts` holds them."""
        return dict(zip(self._paths, self.counts.tolist(), strict=True))

    def __len__(self) -> int:
        return self.fingerprint["records"]

    def __str__(self) -> str:
        return f"{len(self._paths):,} tar shards ({self._patterns})"

    def __getitem__(self, index: int) -> Record:
        """Returns a record.

        Raises:
          RecordError: it cannot be used.
        """
        return self.read_block(index, 1)[0]

    def where(self, index: int) -> str:
        """Returns a record's shard and number, for messages."""
        shard, number = self._split(index)
        return f"sample {number} of {self._paths[shard]}"

    def split(self, records: range) -> Iterator[range]:
        """Yields consecutive records shard by shard."""
        while records:
            shard, _ = self._split(records.start)
            end = min(records.stop, int(self._starts[shard] + self.counts[shard]))
            yield range(records.start, end)
            records = range(end, records.stop)

    def key(self, index: int, block: "TarBlock") -> str:
        """Returns the shard's name and, after a slash, the sample's; of a record in `block`.

        Raises:
          RecordError: it cannot be used.
        """
        shard, number = self._split(index)
        name = posixpath.basename(self._paths[shard]).removesuffix(".tar")
        return f"{name}/{block.key(number - block.first)}"

    def read_block(self, first: int, count: int) -> "TarBlock":
        """Reads consecutive records of one shard, in as few requests as their gaps allow.

        Never raises: what cannot be read is said by the block, record by record.
        """
        shard, number = self._split(first)
        path = self._paths[shard]
        try:
            samples = self._samples(shard)[number : number + count]
            return TarBlock(number, samples, read_ranges(self._storage, path, samples), self._captions)
        except FAILURES as error:
            return TarBlock(number, error, [], self._captions)

    def close(self) -> None:
        """Ends waiting for the storage."""
        self._storage.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_looking", "_shards")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._looking: dict[int, threading.Lock] = {}
        self._shards: OrderedDict[int, np.ndarray] = OrderedDict()

    def _split(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _samples(self, shard: int) -> np.ndarray:
        """Returns the samples of a shard that are used; of threads that want them at once, one looks for them."""
        if (known := self._known(shard)) is not None:
            return known
        with self._lock:
            looking = self._looking.setdefault(shard, threading.Lock())
        with looking:
            if (known := self._known(shard)) is not None:
                return known
            path = self._paths[shard]
            samples = self._used(path, self._sidecars.get(path))
            if len(samples) != self.counts[shard]:
                _LOG.warning("%s has %d samples; %d were expected", path, len(samples), self.counts[shard])
            with self._lock:
                self._shards[shard] = samples
                self._looking.pop(shard, None)
                if len(self._shards) > _KEPT_INDEXES:
                    self._shards.popitem(last=False)
            return samples

    def _known(self, shard: int) -> np.ndarray | None:
        with self._lock:
            if shard in self._shards:
                self._shards.move_to_end(shard)
            return self._shards.get(shard)

    def _used(self, path: str, index: ShardIndex) -> np.ndarray:
        """Returns the samples that the filter keeps; which ones is remembered beside the index."""
        if self._keep is None:
            return index.samples
        kept_in = self._sidecars.path(f"{path}|{self._keep.digest}|{index.stat.size}|{index.stat.tag}")
        try:
            kept = np.frombuffer(self._storage.read_whole(kept_in), np.uint8)
        except StorageError:
            kept = np.zeros(0, np.uint8)
        if len(kept) != len(index.samples):
            kept = self._judge(path, index, self._keep)
            self._sidecars.keep(kept_in, kept.tobytes())
        return index.samples[kept > 0]

    def _judge(self, path: str, index: ShardIndex, keep: Filter) -> np.ndarray:
        """Returns 1 for every sample whose metadata passes; uint8 [n]."""
        with contextlib.suppress(StorageError):
            table = self._storage.read_whole(f"{posixpath.splitext(path)[0]}.parquet")
            if (found := keep.judge_table(table, index.keys.tolist())) is not None:
                return np.asarray(found, np.uint8)
        verdicts: list[bool] = []
        for first in range(0, len(index.samples), _JUDGED_AT_ONCE):
            part = index.samples[first : first + _JUDGED_AT_ONCE]
            block = TarBlock(first, part, read_ranges(self._storage, path, part), self._captions)
            verdicts += [keep(block.metadata(member)) for member in range(len(part))]
        return np.asarray(verdicts, np.uint8)

    def _count(self, path: str) -> int:
        try:
            return len(self._used(path, self._sidecars.get(path)))
        except StorageError as error:
            raise UserError(
                f"{error}; take it out of config.data.shards, or say in config.data.counts what it has"
            ) from None


class TarBlock:
    """Consecutive samples of a shard in memory.

    Args:
      first: number of the first sample, for messages.
      samples: where they lie; or why they could not be read.
      chunks: (start, bytes) of the ranges that were read, in order.
      captions: which texts are captions.
    """

    def __init__(
        self,
        first: int,
        samples: np.ndarray | StorageError | OutageError,
        chunks: list[tuple[int, bytes]],
        captions: CaptionFields,
    ) -> None:
        self.first, self._samples, self._chunks, self._captions = first, samples, chunks, captions
        self._chunk_starts = [start for start, _ in chunks]

    def __getitem__(self, member: int) -> Record:
        """Returns a sample.

        Raises:
          RecordError: it cannot be used.
        """
        sample = self._sample(member)
        image, text, metadata = (self._part(sample, part) for part in PARTS)
        if image is None:
            raise RecordError("image_missing", "there is no image")
        return Record(image, *self._captions.find(text, metadata))

    def key(self, member: int) -> str:
        """Returns what a sample's files are called, up to the first dot.

        Raises:
          RecordError: it cannot be used.
        """
        begin, chunk = self._find(self._sample(member))
        first = next(members(ReadAt(lambda offset, length: chunk[begin + offset :][:length], len(chunk) - begin)), None)
        if first is None:
            raise RecordError("shard_changed", "the sample is not where it was when the shard was indexed")
        return sample_key(first.name)

    def metadata(self, member: int) -> Mapping[str, Any]:
        """Returns a sample's JSON, or nothing where it has none that can be read."""
        try:
            content = self._part(self._sample(member), "json")
            return {} if content is None else parse_metadata(content)
        except RecordError:
            return {}

    def _sample(self, member: int) -> dict[str, int]:
        if isinstance(self._samples, StorageError):
            raise RecordError("shard_missing", str(self._samples))
        if isinstance(self._samples, OutageError):
            raise RecordError(UNREACHABLE, str(self._samples))
        if member >= len(self._samples):
            raise RecordError("shard_changed", f"the shard has only {self.first + len(self._samples)} samples")
        return dict(zip(self._samples.dtype.names or (), self._samples[member].tolist(), strict=True))

    def _part(self, sample: dict[str, int], part: str) -> bytes | None:
        """Returns the content of one file of a sample, whose header must still be where it was."""
        if not sample[part]:
            return None
        if sample[f"{part}_size"] > MAX_FILE_BYTES:
            reason = "image_too_large" if part == "image" else "caption_unreadable"
            raise RecordError(reason, f"the {part} has {sample[f'{part}_size']:,} bytes, over {MAX_FILE_BYTES:,}")
        begin, chunk = self._find(sample)
        begin, size = begin + sample[part], sample[f"{part}_size"]
        header, content = chunk[begin - BLOCK : begin], chunk[begin : begin + size]
        if len(header) == BLOCK and header_size(header) != size:
            raise RecordError("shard_changed", f"the {part} is not where it was when the shard was indexed")
        if len(content) < size:
            raise RecordError("shard_changed", f"the shard ends within the {part}")
        return content

    def _find(self, sample: dict[str, int]) -> tuple[int, bytes]:
        """Returns where a sample begins within the range that holds it, and that range."""
        start, chunk = self._chunks[bisect.bisect_right(self._chunk_starts, sample["start"]) - 1]
        return sample["start"] - start, chunk


def read_ranges(storage: Storage, path: str, samples: np.ndarray) -> list[tuple[int, bytes]]:
    """Returns (start, bytes) of ranges of a shard that cover the samples, SAMPLE [n].

    Raises:
      StorageError: it cannot be read.
    """
    ranges: list[list[int]] = []
    for start, end in zip(samples["start"].tolist(), _ends(samples).tolist(), strict=True):
        if ranges and 0 <= start - ranges[-1][1] <= _GAP:
            ranges[-1][1] = end
        else:
            ranges.append([start, end])
    return [(start, storage.read(path, start, end - start)) for start, end in ranges]


def _ends(samples: np.ndarray) -> np.ndarray:
    """Returns where the last part of each sample ends that is read; int64 [n]."""
    sizes = {part: samples[f"{part}_size"].astype(np.int64) for part in PARTS}
    ends = [np.where(size <= MAX_FILE_BYTES, samples[part] + size, 0) for part, size in sizes.items()]
    return samples["start"].astype(np.int64) + np.max(ends, axis=0)
