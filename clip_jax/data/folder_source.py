"""Images in a folder and the folders below it; captions are in a `.txt` or `.json` of the same name beside an image.

Links to folders are followed, but for those that lead back to a folder which they lie in.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clip_jax.data.captions import CaptionFields
from clip_jax.data.records import MAX_FILE_BYTES, UNREACHABLE, Record, RecordError, file_reason, read_image_file
from clip_jax.data.tar_index import IMAGES
from clip_jax.errors import UserError
from clip_jax.files import state_of

_IMAGES = IMAGES | {"avif", "pgm", "ppm"}


class FolderSource:
    """Images by the order of their paths; one without a caption has none, which is no fault.

    Attributes:
      root: the folder.
      fingerprint: folder, number of images and a digest of their paths, as JSON holds them.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the folder.

        Raises:
          UserError: as `images_below`.
        """
        self.root = folder.expanduser().resolve()
        self._paths = images_below(self.root)
        listing = "\n".join(self._paths).encode("utf-8", "surrogateescape")
        self.fingerprint: dict[str, Any] = {
            "name": "folder",
            "folder": str(self.root),
            "records": len(self._paths),
            "paths": hashlib.sha256(listing).hexdigest()[:16],
        }

    @property
    def state(self) -> str:
        """A digest of the sizes and times of change of the images and of what lies beside them."""
        return state_of(self.root, with_captions(self._paths))

    def __len__(self) -> int:
        return len(self._paths)

    def __str__(self) -> str:
        return str(self.root)

    def __getitem__(self, index: int) -> Record:
        """Returns an image.

        Raises:
          RecordError: it cannot be used.
        """
        path = self.root / self._paths[index]
        return Record(read_image_file(path), _captions_beside(path))

    def where(self, index: int) -> str:
        """Returns an image's path, for messages."""
        return str(self.root / self._paths[index])

    def key(self, index: int) -> str:
        """Returns an image's path below `root`."""
        return self._paths[index]


def images_below(root: Path) -> list[str]:
    """Returns the paths of images in a folder and the folders below it, sorted; what begins with a dot is passed over.

    Raises:
      UserError: no folder, one that cannot be read, or no images.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    try:
        found = sorted(_walk(root))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not found:
        raise UserError(f"{root} holds no images (files that end in {', '.join(sorted(_IMAGES))})")
    return found


def beside(image: Path, suffix: str) -> bytes | None:
    """Returns the content of the file of the same name with another suffix; None where there is none.

    Raises:
      RecordError: it cannot be read.
    """
    file = image.with_suffix(suffix)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise RecordError("caption_unreadable", f"{file} has over {MAX_FILE_BYTES:,} bytes")
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = file_reason(error, "caption_unreadable")
        raise RecordError(reason, f"{file} cannot be read: {error.strerror}") from None


def with_captions(images: Iterable[str]) -> Iterator[str]:
    """Yields the paths of images, and of what may lie beside them."""
    for image in images:
        stem = os.path.splitext(image)[0]
        yield from (image, f"{stem}.txt", f"{stem}.json")


def _walk(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(Path(folder, name))]
        below = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in _IMAGES:
                yield os.path.normpath(os.path.join(below, name))


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one of those above it, by device and inode."""
    return folder.is_symlink() and any(map(folder.samefile, folder.parents))


def _refuse(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that it may not read


def _captions_beside(image: Path) -> tuple[str, ...]:
    """Returns an image's captions, or none where they are missing or cannot be read.

    Raises:
      RecordError: their share does not answer.
    """
    try:
        return CaptionFields().find(beside(image, ".txt"), beside(image, ".json"))[0]
    except RecordError as error:
        if error.reason == UNREACHABLE:
            raise
        return ()
