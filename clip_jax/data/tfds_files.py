"""The files of a TFDS dataset of images and captions, written without TensorFlow.

What TFDS itself writes for these features: ArrayRecord files of `tf.train.Example`, `features.json` and
`dataset_info.json` (tensorflow_datasets 4.9: `core/features`, `core/proto/dataset_info.proto`). TFDS reads it with
`builder_from_directory`, and so does `TfdsSource`.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE_FORMAT = "array_record"
"""The TFDS file format that is read and written: the one with cheap random access."""

_WRITER_OPTIONS = "group_size:1,uncompressed"  # one record is read at a time, and JPEGs do not get smaller

_FEATURES = "tensorflow_datasets.core.features."
_TEXT = {"pythonClassName": f"{_FEATURES}text_feature.Text", "text": {}}
_FLOAT = {
    "pythonClassName": f"{_FEATURES}tensor_feature.Tensor",
    "tensor": {"shape": {}, "dtype": "float32", "encoding": "none"},
}
_JPEG = {
    "pythonClassName": f"{_FEATURES}image_feature.Image",
    "image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8", "encodingFormat": "jpeg"},
}


def _sequence(feature: dict[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": f"{_FEATURES}sequence_feature.Sequence",
        "sequence": {"feature": feature, "length": "-1"},
    }


FEATURES: dict[str, Any] = {
    "pythonClassName": f"{_FEATURES}features_dict.FeaturesDict",
    "featuresDict": {
        "features": {
            "image": _JPEG,
            "caption": _sequence(_TEXT),
            "caption_shares": _sequence(_FLOAT),
            "key": _TEXT,
            "uid": _TEXT,
        }
    },
}
"""`features.json`: the image, all its captions, how often each is drawn (none: equally often), where the sample came
from, and the uid that its metadata had."""


class WriteError(OSError):
    """A file that cannot be written; `strerror` says why."""


class RecordWriter:
    """Writes an ArrayRecord file; for use in `with`.

    Args:
      path: of the file.
    """

    def __init__(self, path: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        try:
            self._writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        except RuntimeError as error:
            raise _write_error(error) from None

    def write(self, record: bytes) -> None:
        """Adds a record.

        Raises:
          WriteError: it cannot be written.
        """
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise _write_error(error) from None

    def close(self) -> None:
        """Writes what is left, and the index of the records.

        Raises:
          WriteError: it, or an earlier record, cannot be written.
        """
        try:
            self._writer.close()
        except RuntimeError as error:
            raise _write_error(error) from None

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(WriteError):  # the first error is the one to tell
            self.close()


def record_count(path: Path) -> int:
    """Returns the number of records of an ArrayRecord file; -1 where it is none, or not whole."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        try:
            return reader.num_records()
        finally:
            reader.close()
    except (RuntimeError, ValueError):
        return -1


def serialize(image: bytes, captions: Sequence[str], shares: Sequence[float], *, key: str, uid: str) -> bytes:
    """Returns a sample as a serialized `tf.train.Example`; the same sample gives the same bytes.

    Args:
      image: a JPEG.
      captions: all of them.
      shares: how often each is drawn; empty means equally often.
      key: where the sample came from.
      uid: empty for none.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()  # pyrefly: ignore[missing-attribute]  # generated when it is imported
    features = example.features.feature
    features["image"].bytes_list.value.append(image)
    features["caption"].bytes_list.value.extend(caption.encode() for caption in captions)
    features["caption_shares"].float_list.value.extend(shares)
    features["key"].bytes_list.value.append(key.encode("utf-8", "replace"))
    features["uid"].bytes_list.value.append(uid.encode("utf-8", "replace"))
    return example.SerializeToString(deterministic=True)


def shard_name(dataset: str, split: str, number: int, shards: int) -> str:
    """Returns the name of a shard's file."""
    digits = max(5, len(str(shards)))
    return f"{dataset}-{split}.{FILE_FORMAT}-{number:0{digits}d}-of-{shards:0{digits}d}"


def dataset_info(
    dataset: str, version: str, split: str, *, description: str, lengths: Sequence[int], total_bytes: int
) -> str:
    """Returns `dataset_info.json`.

    Args:
      dataset: its name.
      version: such as 1.0.0.
      split: the only one.
      description: for people.
      lengths: records of each shard.
      total_bytes: of all shards.
    """
    shards = {
        "name": split,
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": str(total_bytes),
        "shardLengths": [str(length) for length in lengths],
    }
    info = {
        "description": description,
        "fileFormat": FILE_FORMAT,
        "name": dataset,
        "splits": [shards],
        "version": version,
    }
    return json.dumps(info, indent=2) + "\n"


def _write_error(error: RuntimeError) -> WriteError:
    """Returns riegeli's "write() failed: No space left on device; writing …; at byte …" as an OSError."""
    reason = str(error).partition("failed: ")[2] or str(error)
    return WriteError(0, reason.partition(";")[0])
