"""Adds ArrayRecord files to a TFDS dataset that was prepared as TFRecord.

Record by record, in the same order, without decoding or preparing anything again. Every new file is written under
another name and put in place whole; the dataset says that it has them (`alternativeFileFormats`, as TFDS has it) only
when all are there. The TFRecord files stay as they are. What is interrupted goes on where it stopped.

TensorFlow reads TFRecord and checks its checksums; it is imported in worker processes only.
"""

import contextlib
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.console import WorkProgress
from clip_jax.data.build import load_tensorflow_quietly
from clip_jax.data.tfds_files import FILE_FORMAT, RecordWriter, record_count
from clip_jax.data.tfds_source import datasets_root, file_formats, find_dataset
from clip_jax.data.workers import run
from clip_jax.errors import UserError, one_line
from clip_jax.files import alone, appearing, sweep

_FROM, _INFO = "tfrecord", "dataset_info.json"
_NODE = re.compile(r"\{\{.*?\}\} *| \[.*")  # where in its graph TensorFlow was


@dataclass(frozen=True)
class FileTask:
    """A file to convert.

    Attributes:
      source: TFRecord.
      target: ArrayRecord.
      records: that it must have.
    """

    source: Path
    target: Path
    records: int


def convert(dataset: str, data_dir: str = "", *, workers: int = 0) -> Path:
    """Adds ArrayRecord files to a dataset, unless it has them, and returns its folder.

    Args:
      dataset: TFDS name, see `find_dataset`.
      data_dir: folder of prepared datasets; empty means TFDS's default.
      workers: processes; 0 means one for each core.

    Raises:
      UserError: no such dataset, not in TFRecord; a file is missing, damaged or has another number of records; the
        folder cannot be written; or another process is converting it.
    """
    folder = find_dataset(dataset, data_dir)
    found = file_formats(folder)
    if FILE_FORMAT in found:
        return folder
    if _FROM not in found:
        raise UserError(f"{folder} is prepared as {', '.join(found)}; only {_FROM} can be converted")
    tasks = _tasks(folder)
    again = f"clip-jax data convert {dataset} --data-dir={datasets_root(data_dir)}"
    busy, without = f"another process is converting {folder}; wait for it, or end it", "do not convert it twice at once"
    with contextlib.ExitStack() as held:  # or each would sweep away what the other has begun
        try:
            held.enter_context(alone(folder / _INFO, busy=busy, without=without, mode="r+"))
        except OSError as error:
            raise UserError(f"cannot write {folder / _INFO}: {error.strerror}") from None
        sweep(folder)
        try:
            _convert_files(tasks, workers, again)
        finally:
            sweep(folder)
        _announce(folder)
    return folder


def _convert_files(tasks: list[FileTask], workers: int, again: str) -> None:
    outcomes = run(convert_file, tasks, workers=workers)
    try:
        with contextlib.closing(outcomes), WorkProgress("files", len(tasks)) as progress:
            for outcome in outcomes:
                if isinstance(outcome, UserError):
                    raise UserError(f"{outcome}; what is converted is kept, and used by: {again}")
                progress.advance(f"{outcome:,} records")
    except KeyboardInterrupt:
        raise UserError(f"stopped; what is converted is kept, and used by: {again}") from None


def convert_file(task: FileTask) -> int:
    """Converts one file, unless it is converted, and returns its number of records.

    Raises:
      UserError: it cannot be read, has another number of records, or cannot be written.
    """
    if record_count(task.target) == task.records:
        return task.records
    load_tensorflow_quietly()
    import tensorflow as tf

    count = 0
    try:
        with appearing(task.target) as path:
            with RecordWriter(path) as writer:
                for record in tf.data.TFRecordDataset(str(task.source)).as_numpy_iterator():
                    writer.write(record)
                    count += 1
            if count != task.records:
                raise UserError(f"{task.source} has {count:,} records, and its dataset_info.json says {task.records:,}")
    except tf.errors.OpError as error:
        raise UserError(f"{task.source} cannot be read: {_NODE.sub('', one_line(error))}") from None
    except OSError as error:
        raise UserError(f"cannot write {task.target}: {error.strerror}") from None
    return count


def _tasks(folder: Path) -> list[FileTask]:
    from tensorflow_datasets.core import file_adapters, read_only_builder

    splits = read_only_builder.builder_from_directory(str(folder), file_format=_FROM).info.splits
    tasks = []
    for split in splits.values():
        suffix = file_adapters.FileFormat.from_value(FILE_FORMAT).file_suffix
        renamed: Any = dataclasses.replace(split.filename_template, filetype_suffix=suffix)
        targets = renamed.sharded_filepaths(len(split.shard_lengths))
        for source, target, records in zip(split.filepaths, targets, split.shard_lengths, strict=True):
            if Path(source) == Path(target):
                raise UserError(f"{folder} names its files without their format; it cannot have them in two")
            tasks.append(FileTask(Path(source), Path(target), records))
    return tasks


def _announce(folder: Path) -> None:
    """Says in the dataset's own description that it has ArrayRecord files too."""
    file = folder / _INFO
    info = json.loads(file.read_text(encoding="utf-8"))
    info["alternativeFileFormats"] = [*info.get("alternativeFileFormats", []), FILE_FORMAT]
    try:
        with appearing(file) as path:
            path.write_text(json.dumps(info, indent=2), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
