"""The unit of preparing a dataset: one part of the input becomes one ArrayRecord shard.

`process_shard` is idempotent: it may run again, elsewhere, or twice at the same time, and the result is the same bytes.
The shard and the list of its rejects are written under other names and renamed, and a marker is written last; a shard
whose marker and size agree is not made again.
"""

import functools
import hashlib
import json
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from clip_jax.data.augment import Augment, shrink
from clip_jax.data.captions import CaptionFields
from clip_jax.data.filters import Filter
from clip_jax.data.images import ImageError, decode_jpeg, encode_jpeg, jpeg_size
from clip_jax.data.prepare_inputs import Part, Sample
from clip_jax.data.records import UNREACHABLE, Record, RecordError
from clip_jax.data.storage import StorageError
from clip_jax.data.tfds_files import RecordWriter, serialize
from clip_jax.errors import UserError
from clip_jax.files import appearing, json_object


class OutputError(UserError):
    """A shard that cannot be written; others could not either."""


@dataclass(frozen=True)
class ShardSettings:
    """What is made of a sample.

    Attributes:
      short_side: pixels to which the shorter side of larger images is resized.
      quality: of the JPEGs, 1 to 100.
      resize: `fast` or `exact`, see `clip_jax.data.augment`.
      captions: which texts are captions, see `CaptionFields`.
      filters: conditions on the metadata, see `Filter`.
      uids: file of the uids that are used; empty means all.
      retry_s: seconds for which a remote read is tried again.
    """

    short_side: int = 256
    quality: int = 95
    resize: Literal["fast", "exact"] = "fast"
    captions: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    uids: str = ""
    retry_s: float = 300.0


@dataclass(frozen=True)
class ShardTask:
    """A part of the input, and where its shard belongs.

    Attributes:
      part: what is read.
      shard: file of the shard.
      notes: beginning of the paths of its marker and of its rejects, in a folder that exists.
      settings: what is made of a sample.
    """

    part: Part
    shard: Path
    notes: Path
    settings: ShardSettings

    @property
    def marker(self) -> Path:
        """Written when all is in place."""
        return self.notes.with_suffix(".done.json")

    @property
    def rejects(self) -> Path:
        """JSON lines, one for each sample that could not be used."""
        return self.notes.with_suffix(".rejects.jsonl")


class ShardReport(NamedTuple):
    """What became of a part.

    Attributes:
      file: name of the shard.
      input: what it was made from.
      digest: of the part.
      records: samples that were written.
      filtered: samples that the filters left out.
      rejected: samples that could not be used, by reason.
      bytes_in: of the images that were read.
      bytes: of the shard.
      sha256: of the shard.
    """

    file: str
    input: str
    digest: str
    records: int
    filtered: int
    rejected: dict[str, int]
    bytes_in: int
    bytes: int
    sha256: str

    @property
    def samples(self) -> int:
        """All that the part has."""
        return self.records + self.filtered + sum(self.rejected.values())


def process_shard(task: ShardTask) -> ShardReport:
    """Makes one shard, unless it is there.

    Raises:
      UserError: the part cannot be read.
      OutputError: the shard cannot be written; what was written of it is gone.
    """
    if (report := find_report(task)) is not None:
        return report
    if not task.notes.parent.is_dir():
        raise OutputError(
            f"{task.notes.parent} is not on {socket.gethostname()}; --data-dir must be a folder that every machine sees"
        )
    try:
        report = _make(task)
        with appearing(task.marker) as path:
            path.write_text(json.dumps(report._asdict()) + "\n", encoding="utf-8")
    except StorageError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise OutputError(
            f"cannot write {task.shard}: {error.strerror}; when there is room and leave to write, run the same command "
            "again: it goes on with the shards that are missing"
        ) from None
    return report


def find_report(task: ShardTask) -> ShardReport | None:
    """Returns the report of a shard that is whole; None if it must be made."""
    try:
        report = ShardReport(**json_object(task.marker.read_bytes()))
        whole = report.digest == task.part.digest and report.bytes == task.shard.stat().st_size
        return report if whole and task.rejects.exists() else None
    except (OSError, ValueError, TypeError):
        return None


def _make(task: ShardTask) -> ShardReport:
    counts: Counter[str] = Counter()
    with appearing(task.rejects) as rejects, appearing(task.shard) as shard:
        with rejects.open("w", encoding="utf-8") as file, RecordWriter(shard) as writer:
            for record in _records(task, counts, file):
                writer.write(record)
        size, digest = shard.stat().st_size, _sha256(shard)
    bytes_in, records, filtered = (counts.pop(name, 0) for name in ("bytes_in", "records", "filtered"))
    rejected = dict(sorted(counts.items()))
    part = task.part
    return ShardReport(task.shard.name, part.name, part.digest, records, filtered, rejected, bytes_in, size, digest)


def _records(task: ShardTask, counts: Counter[str], rejects: IO[str]) -> Iterator[bytes]:
    """Yields the serialized samples; counts them, the others by reason, and the bytes of images.

    Raises:
      StorageError, OutageError, RecordError: the part cannot be read.
    """
    settings = task.settings
    keep = _filter(settings.filters, settings.uids)
    for sample in task.part.samples(CaptionFields(settings.captions), settings.retry_s):
        if isinstance(sample.record, Record):
            counts["bytes_in"] += len(sample.record.image)
        elif sample.record.reason == UNREACHABLE:
            raise sample.record  # it is no fault of the sample's
        if keep and not keep(sample.metadata):
            counts["filtered"] += 1
            continue
        try:
            record = _prepared(sample, settings)
        except (ImageError, RecordError) as error:
            counts[error.reason] += 1
            line = {"record": sample.where, "reason": error.reason, "message": str(error)}
            rejects.write(json.dumps(line) + "\n")
            continue
        counts["records"] += 1
        yield record


def _prepared(sample: Sample, settings: ShardSettings) -> bytes:
    """Returns a sample as it is stored.

    Raises:
      ImageError: the image cannot be decoded.
      RecordError: the sample cannot be used.
    """
    if isinstance(sample.record, RecordError):
        raise sample.record
    captions, shares = sample.record.spoken()
    image = _resized(sample.record.image, settings)
    return serialize(image, captions, shares, key=sample.key, uid=str(sample.metadata.get("uid", "")))


def _resized(image: Any, settings: ShardSettings) -> bytes:
    """Returns an image as a JPEG of the right size; a JPEG that is small enough as it is, if it can be decoded.

    As in training, pixels are taken as they are stored: EXIF orientation is not applied.
    """
    size = jpeg_size(image) if isinstance(image, bytes) else None
    if size is not None and min(size) <= settings.short_side:
        decode_jpeg(image)
        return image
    return encode_jpeg(shrink(image, settings.short_side, Augment(resize=settings.resize)), settings.quality)


@functools.lru_cache(maxsize=1)
def _filter(conditions: tuple[str, ...], uids: str) -> Filter:
    return Filter(conditions, uids)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
