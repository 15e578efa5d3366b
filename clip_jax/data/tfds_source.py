"""TFDS datasets, record by record.

A TFDS dataset prepared as ArrayRecord is read through TFDS's NumPy path: TensorFlow writes such datasets, but nothing
here imports it. Images stay encoded, so that decoding happens in the pipeline's threads and worker processes.
"""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_jax.data.records import UNREACHABLE, Record, RecordError, decode_caption
from clip_jax.data.storage import OUTAGES
from clip_jax.data.tfds_files import FILE_FORMAT
from clip_jax.errors import UserError, one_line
from clip_jax.files import allow_open_files, check_shape, json_object, local_path, state_of

OWN_DATASETS = ("digits",)
"""Datasets that this package can prepare itself (`clip-jax data build`)."""

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[^/:]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_USUAL_KEYS = {"image": "image", "caption": "caption", "label": ""}


class TfdsSource:
    """A split of a TFDS dataset prepared as ArrayRecord.

    The files are opened at once, again in every process that receives the source, before it has threads: while TFDS is
    imported, what others import is replaced by stand-ins (`etils.epy.lazy_imports`), and may wait for it for ever.

    Attributes:
      classes: names of the label's classes, in order; empty without `label_key`.
      fingerprint: name, version, split, number of records, and keys that are not the usual ones, as JSON holds them.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        *,
        data_dir: str = "",
        image_key: str = "image",
        caption_key: str = "caption",
        label_key: str = "",
        images_only: bool = False,
    ):
        """Finds the dataset and checks that it holds what is asked for.

        Args:
          dataset: TFDS name: `name`, `name/config`, `name:1.0.0` or `name/config:1.0.0`; the newest version if none
            is given.
          split: as TFDS slices splits: `train`, `train[:50%]`, `train[10:]+test`.
          data_dir: folder of prepared datasets; empty means TFDS's default.
          image_key: feature of images.
          caption_key: feature of a text or a sequence of texts, nested ones as `captions/text`; may be empty if
            `label_key` is given. A feature of this name and `_shares` behind it says how often each text is drawn.
          label_key: feature of class labels; empty for none.
          images_only: `caption_key` and `label_key` may both be empty.

        Raises:
          UserError: TFDS is not installed; no such dataset or split; not in ArrayRecord files; or the features are
            not what the keys say.
        """
        self._directory = find_dataset(dataset, data_dir)
        _check_format(self._directory, dataset, data_dir)
        self._split = split
        self._keys = {"image": image_key, "caption": caption_key, "label": label_key}
        self._records: Any = None
        builder = _open_builder(self._directory)
        self._check_features(builder.info.features, images_only=images_only)
        self._records = self._open(builder)
        shares = f"{caption_key}_shares"
        self._shares_key = shares if caption_key and shares in builder.info.features else ""
        self.classes: tuple[str, ...] = tuple(builder.info.features[label_key].names or ()) if label_key else ()
        self.fingerprint: dict[str, Any] = {
            "name": _name_and_config(builder.info),
            "version": str(builder.info.version),
            "split": split,
            "records": len(self._records),
            **{f"{role}_key": key for role, key in self._keys.items() if key != _USUAL_KEYS[role]},
        }

    @property
    def state(self) -> str:
        """A digest of the dataset's ArrayRecord files' sizes and times of change."""
        files = self._directory.glob(f"*.{FILE_FORMAT}*")
        return state_of(self._directory, sorted(file.name for file in files))

    def __len__(self) -> int:
        return self.fingerprint["records"]

    def __getitem__(self, index: int) -> Record:
        """Returns record `index`, which must be in [0, len(self)).

        Raises:
          RecordError: it cannot be used.
        """
        image_key, caption_key, label_key = self._keys.values()
        values = _parse_example(self._read(index))
        image = values[image_key].bytes_list.value
        if not image:
            raise RecordError("image_missing", "there is no image")
        captions = values[caption_key].bytes_list.value if caption_key else ()
        shares = tuple(values[self._shares_key].float_list.value) if self._shares_key else ()
        if shares and len(shares) != len(captions):
            message = f"there are {len(captions)} captions and {len(shares)} shares of them"
            raise RecordError("caption_unreadable", message)
        return Record(
            image=image[0],
            captions=tuple(map(decode_caption, captions)),
            shares=shares,
            label=values[label_key].int64_list.value[0] if label_key else -1,
        )

    def __str__(self) -> str:
        return f"{self.fingerprint['name']}:{self.fingerprint['version']} ({self._split})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with contextlib.suppress(UserError, OSError):  # which who reads it will hear of
            self._records = self._open(_open_builder(self._directory))

    def _read(self, index: int) -> bytes:
        if self._records is None:
            self._records = self._open(_open_builder(self._directory))
        try:
            return self._records[index]
        except RuntimeError as error:  # of ArrayRecord's reader, whatever it found
            raise _unreadable(one_line(error)) from None

    def _open(self, builder: Any) -> Any:
        import tensorflow_datasets as tfds

        allow_open_files(sum(split.num_shards for split in builder.info.splits.values()))  # each stays open

        # Bytes, and our own look at the named features: TFDS's decoding would decode every other feature as well.
        method = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            with _missing_module_named(self._directory):
                records = builder.as_data_source(self._split, deserialize_method=method, file_format=FILE_FORMAT)
            len(records)  # a ValueError where a slice ends before it begins
            return records
        except (ValueError, KeyError):
            counts = ", ".join(f"{name} ({split.num_examples:,})" for name, split in builder.info.splits.items())
            known = f"it has {counts or 'none'} and slices of these, as in 'train[:50%]'"
            raise UserError(f"{self._directory} has no split {self._split!r}; {known}") from None

    def _check_features(self, features: Any, *, images_only: bool) -> None:
        import tensorflow_datasets as tfds

        if not any((self._keys["caption"], self._keys["label"], images_only)):
            raise UserError("caption_key and label_key are both empty; a record needs a caption or a label")
        kinds = {"image": tfds.features.Image, "caption": tfds.features.Text, "label": tfds.features.ClassLabel}
        for role, key in self._keys.items():
            asked = key or role == "image"
            if asked and not isinstance(_feature(features, key, texts=role == "caption"), kinds[role]):
                raise UserError(self._wrong_feature(role, kinds[role].__name__, features))

    def _wrong_feature(self, role: str, kind: str, features: Any) -> str:
        found = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in features.items())
        labelled = bool(self._keys["label"])  # evaluation asks for labels, training for captions
        fields = (
            "config.eval.image_key and config.eval.label_key"
            if labelled
            else "config.data.image_key and config.data.caption_key"
        )
        return (
            f"{self._directory} has no feature {self._keys[role]!r} of kind {kind} for the {role}; it has {found}; "
            f"name the right one with {fields}"
        )


def _feature(features: Any, key: str, *, texts: bool) -> Any:
    """Returns the feature of a key, of a sequence of texts what it is a sequence of; None where there is none."""
    import tensorflow_datasets as tfds

    found: Any = features
    for name in key.split("/"):
        if isinstance(found, tfds.features.Sequence) and texts:
            found = found.feature
        if not isinstance(found, tfds.features.FeaturesDict) or name not in found:
            return None
        found = found[name]
    return found.feature if texts and isinstance(found, tfds.features.Sequence) else found


def _unreadable(message: str) -> UserError:
    """Returns why a record cannot be read, by the message of ArrayRecord's reader, which ends with the file's name."""
    if os.strerror(errno.EMFILE) in message:
        return UserError(f"{message}; allow this process more of them (ulimit -n), or prepare larger shards")
    if any(os.strerror(number) in message for number in OUTAGES):
        return RecordError(UNREACHABLE, message)
    return RecordError("shard_missing" if message.startswith("open() failed") else "shard_changed", message)


def find_dataset(dataset: str, data_dir: str = "") -> Path:
    """Returns the folder of a prepared TFDS dataset, the newest version if `dataset` names none.

    TFDS renames this folder into place when a dataset is whole, so what is found is whole. The catalogue's code is not
    consulted: it may import TensorFlow.

    Raises:
      UserError: not a name, or nothing prepared under it; the line says what is there and how to prepare it.
    """
    parts = _NAME.fullmatch(dataset)
    if parts is None:
        raise UserError(f"{dataset!r} is not a TFDS name (name, name/config, name:1.0.0 or name/config:1.0.0)")
    root = datasets_root(data_dir)
    folder = root / parts["name"] / parts["config"] if parts["config"] else root / parts["name"]
    versions = _versions(folder)
    version = parts["version"] or (versions[-1] if versions else "")
    if version in versions:
        return folder / version
    raise UserError(_not_found(dataset, root, folder))


def datasets_root(data_dir: str) -> Path:
    """Returns the folder of prepared datasets: `data_dir`, or TFDS's default if that is empty.

    Raises:
      UserError: a URL.
    """
    given = "data_dir" if data_dir else "TFDS_DATA_DIR"
    return local_path(given, data_dir or os.environ.get(given) or "~/tensorflow_datasets")


def prepare_command(dataset: str, root: Path) -> str:
    """Returns the command line that prepares a dataset in a form that can be read here.

    Not `tfds build`: in TFDS 4.9.10 that does not start without Apache Beam.
    """
    own = dataset.partition(":")[0]
    if own in OWN_DATASETS:
        return f"clip-jax data build {own} --data-dir={root}"
    builder = f"tfds.builder('{dataset}', data_dir='{root}', file_format='{FILE_FORMAT}')"
    return f'python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'


def _not_found(dataset: str, root: Path, folder: Path) -> str:
    remedy = f"prepare it with: {prepare_command(dataset, root)}"
    if versions := _versions(folder):
        return f"dataset {dataset!r} is not in {root}, which has {', '.join(versions)} of it; use that, or {remedy}"
    if configs := sorted(path.name for path in folder.glob("*") if _versions(path)):
        return f"dataset {dataset!r} needs a config: {folder} has {', '.join(configs)} (as in {dataset}/{configs[0]})"
    if unfinished := sorted(folder.glob("*.preparing")):
        return f"{unfinished[-1]} is not finished; run its clip-jax data prepare again: it goes on where it stopped"
    there = sorted(path.name for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))
    if close := difflib.get_close_matches(folder.name, there, n=1):
        remedy = f"did you mean {close[0]!r}? Otherwise {remedy}"
    return f"dataset {dataset!r} is not in {root}; {remedy}"


def _versions(folder: Path) -> list[str]:
    """Returns the whole versions in a dataset's folder, oldest first."""
    names = [
        path.parent.name for path in folder.glob("*/dataset_info.json") if (path.parent / "features.json").exists()
    ]
    return sorted(filter(_VERSION.fullmatch, names), key=lambda name: tuple(map(int, name.split("."))))


def _open_builder(directory: Path) -> Any:
    """Returns TFDS's read-only builder of a prepared dataset."""
    with _missing_module_named(directory):
        import tensorflow_datasets as tfds

        try:
            return tfds.builder_from_directory(str(directory))
        except ImportError:
            raise
        except Exception as error:  # of any kind: of TFDS, of protocol buffers, of JSON
            raise _damaged(directory, error) from None


def _damaged(directory: Path, error: Exception) -> UserError:
    return UserError(
        f"{directory} cannot be opened: dataset_info.json or features.json is damaged ({one_line(error)}); copy or "
        "prepare the dataset again"
    )


@contextlib.contextmanager
def _missing_module_named(directory: Path) -> Iterator[None]:
    """Turns what is not installed into an error with the remedy; TFDS imports some modules at first use."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"reading {directory} needs the module {error.name}; "
            "install it with: pip install tensorflow-datasets array-record importlib_resources"
        ) from None


def _parse_example(serialized: bytes) -> Any:
    """Returns the features of one record by name, each with a `bytes_list` and an `int64_list`."""
    from tensorflow_datasets.proto import tf_example_pb2

    parse = tf_example_pb2.Example.FromString  # pyrefly: ignore[missing-attribute]  # generated when it is imported
    return parse(serialized).features.feature


def _check_format(directory: Path, dataset: str, data_dir: str) -> None:
    found = file_formats(directory)
    if FILE_FORMAT in found:
        return
    root = datasets_root(data_dir)
    remedy = f"remove that folder and prepare it again with: {prepare_command(dataset, root)}"
    if "tfrecord" in found:
        remedy = f"convert it with: clip-jax data convert {dataset} --data-dir={root}"
    raise UserError(f"{directory} is prepared as {', '.join(found)}, and random access needs {FILE_FORMAT}; {remedy}")


def file_formats(directory: Path) -> list[str]:
    """Returns the formats in which a dataset's files are there."""
    try:
        info = json_object((directory / "dataset_info.json").read_bytes())
        formats = [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", [])]
        check_shape(formats, [str])
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(directory, error) from None
    return formats


def _name_and_config(info: Any) -> str:
    return f"{info.name}/{info.config_name}" if info.config_name else info.name
