"""Images with a class each: TFDS datasets, folders by class, and tar shards with a `.cls` beside every image."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from clip_jax.config import kind_named
from clip_jax.data.captions import parse_metadata
from clip_jax.data.folder_source import FolderSource
from clip_jax.data.patterns import expand
from clip_jax.data.records import MAX_FILE_BYTES, MAX_METADATA_BYTES, Record, RecordError, Source
from clip_jax.data.storage import Storage, StorageError
from clip_jax.data.tar_index import IMAGES, members, read_at, sample_key
from clip_jax.data.tfds_source import TfdsSource
from clip_jax.errors import UserError
from clip_jax.files import absolute, digest, is_remote, state_of

_LONGEST_LABEL = 1 << 12
_MOST_CLASSES = 1 << 20


@runtime_checkable
class LabelledSource(Source, Protocol):
    """Records that have a `label`.

    Attributes:
      classes: names of the classes in the order of the labels; empty where the dataset has none.
    """

    classes: tuple[str, ...]


def open_labelled(
    dataset: str,
    *,
    split: str = "test",
    data_dir: str = "",
    image_key: str = "image",
    label_key: str = "label",
) -> LabelledSource:
    """Opens a dataset for classification.

    Args:
      dataset: a folder with a folder of images for every class; tar shards such as `/data/{000..049}.tar`; or a TFDS
        name.
      split: of a TFDS dataset.
      data_dir: of prepared TFDS datasets; empty means TFDS's default.
      image_key: feature of a TFDS dataset that holds the image.
      label_key: feature of a TFDS dataset that holds the class. In tar shards it is the number in the `.cls`, or with
        `json.key` one in the `.json`.

    Raises:
      UserError: nothing there, no classes, or a split without labels, such as ImageNet's `test`.
    """
    kind = kind_named(dataset)
    if kind == "tars":
        return ClassTars(dataset, label_key="cls" if label_key == "label" else label_key)
    if kind == "folder":
        return ClassFolders(Path(dataset))
    if kind != "tfds":
        raise UserError(
            f"{dataset} names no classes; for classification a dataset is a folder with a folder of images for every "
            "class, tar shards, or a TFDS name"
        )
    if dataset.startswith((os.sep, ".", "~")) or dataset.endswith(os.sep):
        raise UserError(f"{dataset} is not a folder")
    source = TfdsSource(dataset, split, data_dir=data_dir, image_key=image_key, caption_key="", label_key=label_key)
    if len(source) and source[0].label < 0:
        raise UserError(
            f"{source} has no labels (the first is {source[0].label}); name another split, such as validation, with "
            "--split or config.eval.split"
        )
    return source


class ClassFolders:
    """A folder with a folder of images for every class, in the order of their names, as torchvision's `ImageFolder`.

    Where all names are numbers, as ImageNet-V2's 0 to 999, they are in the order of these, as lists of class names are.

    Attributes:
      classes: the folders' names.
      fingerprint: folder, number of images and a digest of their paths, as JSON holds them.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the folder.

        Raises:
          UserError: as `clip_jax.data.folder_source.images_below`; or an image that is in no class's folder.
        """
        self._images = FolderSource(folder)
        root = self._images.root
        names = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
        self.classes = tuple(sorted(names, key=int) if all(map(str.isdecimal, names)) else names)
        number = {name: label for label, name in enumerate(self.classes)}
        self._labels = [number.get(self.key(i).partition(os.sep)[0], -1) for i in range(len(self._images))]
        if -1 in self._labels:
            raise UserError(
                f"{self._images.where(self._labels.index(-1))} is in no class's folder; {root} must hold a folder of "
                "images for every class, and nothing beside them"
            )
        self.fingerprint: dict[str, Any] = self._images.fingerprint | {"name": root.name}
        if self.classes != tuple(names):
            self.fingerprint["order"] = "by number"  # kept features hold labels
        if set(self._labels) != set(range(len(names))):
            self.fingerprint["classes"] = digest(*self.classes)  # the paths of images do not name the empty ones

    @property
    def state(self) -> str:
        """A digest of the images' sizes and times of change."""
        return state_of(self._images.root, map(self.key, range(len(self))))

    def __len__(self) -> int:
        return len(self._images)

    def __str__(self) -> str:
        return str(self._images)

    def __getitem__(self, index: int) -> Record:
        """Returns an image with its class.

        Raises:
          RecordError: it cannot be read.
        """
        return self._images[index]._replace(label=self._labels[index])

    def where(self, index: int) -> str:
        """Returns an image's path, for messages."""
        return self._images.where(index)

    def key(self, index: int) -> str:
        """Returns an image's path below the folder."""
        return self._images.key(index)


class _Place(NamedTuple):
    """Where an image lies: shard, first byte, bytes; its class, and its key."""

    shard: int
    start: int
    size: int
    label: int
    key: str


@dataclass
class _Sample:
    """What a shard holds of a sample: first byte and bytes of each file by its extension, and the class."""

    key: str
    parts: dict[str, tuple[int, int]]
    label: int | None = None


class ClassTars:
    """Samples of tar shards, local or remote, with the number of their class beside the image.

    All shards are looked through when they are opened. As in CLIP_benchmark's exports, the classes' names may lie in a
    `classnames.txt`, and templates in a `zeroshot_classification_templates.txt`, beside the shards or in the folder
    above.

    Attributes:
      classes: of `classnames.txt`; empty where there is none.
      templates: of `zeroshot_classification_templates.txt`, as they stand there; empty where there is none.
      fingerprint: the shards, number of samples and a digest of where they lie, as JSON holds them.
      state: a digest of the shards' sizes and tags.
    """

    def __init__(self, shards: str, *, label_key: str = "cls") -> None:
        """Looks through the shards.

        Args:
          shards: paths or URLs, see `clip_jax.data.patterns.expand`.
          label_key: `cls`, or `json.key`.

        Raises:
          UserError: no shards, one that cannot be read, no samples, or one without a class.
        """
        self._storage, self._paths, self._patterns = Storage(), expand(shards), shards
        try:
            stats = [self._storage.stat(path) for path in self._paths]
            self._places = [
                place for shard, stat in enumerate(stats) for place in self._look(shard, stat.size, label_key)
            ]
        except StorageError as error:
            raise UserError(str(error)) from None
        if not self._places:
            raise UserError(f"{shards} has no images (members that end in {', '.join(sorted(IMAGES))})")
        self.classes = tuple(self._lines("classnames.txt"))
        self.templates = tuple(self._lines("zeroshot_classification_templates.txt"))
        self.state = digest(*stats)
        samples = hashlib.sha256(repr([(*place[1:4], place.key) for place in self._places]).encode())
        self.fingerprint: dict[str, Any] = {
            "name": "tars",
            "shards": shards,
            "records": len(self._places),
            "samples": samples.hexdigest()[:16],
        }

    def __len__(self) -> int:
        return len(self._places)

    def __str__(self) -> str:
        return f"{len(self._paths):,} tar shards ({self._patterns})"

    def __getitem__(self, index: int) -> Record:
        """Returns an image with its class.

        Raises:
          RecordError: it cannot be read.
        """
        place = self._places[index]
        if place.size > MAX_FILE_BYTES:
            raise RecordError("image_too_large", f"the image has {place.size:,} bytes, over {MAX_FILE_BYTES:,}")
        try:
            image = self._storage.read(self._paths[place.shard], place.start, place.size)
        except StorageError as error:
            raise RecordError("shard_missing", str(error)) from None
        return Record(image, label=place.label)

    def where(self, index: int) -> str:
        """Returns an image's shard and key, for messages."""
        place = self._places[index]
        return f"{place.key} in {self._paths[place.shard]}"

    def key(self, index: int) -> str:
        """Returns what a sample's files are called, up to the first dot."""
        return self._places[index].key

    def _look(self, shard: int, size: int, label_key: str) -> Iterator[_Place]:
        """Yields the samples of a shard."""
        path = self._paths[shard]
        file = read_at(self._storage, path, size)
        is_json = label_key.startswith("json.")
        label_file, longest = ("json", MAX_METADATA_BYTES) if is_json else (label_key, _LONGEST_LABEL)
        samples: list[_Sample] = []
        latest: dict[str, _Sample] = {}
        for member in members(file):
            key, extension = sample_key(member.name), member.name.rpartition("/")[2].partition(".")[2].lower()
            part = "image" if extension in IMAGES else extension
            if key not in latest or part in latest[key].parts:  # a key that comes again is another sample
                latest[key] = _Sample(key, {})
                samples.append(latest[key])
            latest[key].parts[part] = member.data, member.size
            if part == label_file:  # now, while its piece of a remote shard is at hand
                latest[key].label = _label(file.read(member.data, min(member.size, longest)), label_key)
        for sample in samples:
            if "image" not in sample.parts:
                continue
            if sample.label is None:
                raise UserError(
                    f"{sample.key} in {path} has no class: there must be a number in its .{label_key}, under "
                    f"{_MOST_CLASSES:,}"
                )
            yield _Place(shard, *sample.parts["image"], sample.label, sample.key)

    def _lines(self, name: str) -> list[str]:
        """Returns the lines of a file beside the shards, or in the folder above; none where there is no such file."""
        folder = absolute(self._paths[0]).rpartition("/")[0]
        above = folder.rpartition("/")[0]
        for where in (folder, above):
            if is_remote(where) != is_remote(folder):
                continue  # above a bucket or a server there is none
            try:
                text = self._storage.read_whole(f"{where}/{name}").decode("utf-8-sig")
            except StorageError:
                continue
            except UnicodeDecodeError as error:
                raise UserError(f"{where}/{name} is not UTF-8: {error.reason}") from None
            return [line.strip() for line in text.splitlines() if line.strip()]
        return []


def _label(content: bytes, label_key: str) -> int | None:
    """Returns the class that a file of a sample states, or None."""
    if label_key.startswith("json."):
        try:
            value = parse_metadata(content).get(label_key.removeprefix("json."))
        except RecordError:
            return None
    else:
        text = content.decode("ascii", "replace").strip()
        value = int(text) if text.isdecimal() else None
    return value if type(value) is int and 0 <= value < _MOST_CLASSES else None
