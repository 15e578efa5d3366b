"""Images in a folder and the folders below it; a caption is a text file beside its image, with the same name."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_jax.data.records import Record, RecordError, decode_caption, read_image_file
from clip_jax.data.tar_index import IMAGES
from clip_jax.errors import UserError


class FolderSource:
    """Images by the order of their paths; what begins with a dot is passed over.

    Attributes:
      root: the folder.
      fingerprint: folder, number of images and a digest of their paths, as JSON holds them.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the folder.

        Raises:
          UserError: no folder, or no images in it.
        """
        self.root = folder.expanduser().resolve()
        if not self.root.is_dir():
            raise UserError(f"{folder} is not a folder")
        self._paths = sorted(_images_below(self.root))
        if not self._paths:
            raise UserError(f"{folder} holds no images (files that end in {', '.join(sorted(IMAGES))})")
        listing = "\n".join(self._paths).encode("utf-8", "surrogateescape")
        self.fingerprint: dict[str, Any] = {
            "name": "folder",
            "folder": str(self.root),
            "records": len(self._paths),
            "paths": hashlib.sha256(listing).hexdigest()[:16],
        }

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


def _images_below(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGES:
                yield os.path.normpath(os.path.join(below, name)).replace(os.sep, "/")


def _captions_beside(image: Path) -> tuple[str, ...]:
    """Returns the lines of the text file beside an image, or nothing where there is none that can be read."""
    try:
        lines = decode_caption(image.with_suffix(".txt").read_bytes()).splitlines()
    except (OSError, RecordError):
        return ()
    return tuple(line.strip() for line in lines if line.strip())
