"""The photographs that come with scikit-learn and scikit-image, with a name for what they show."""

import importlib.util
from pathlib import Path
from typing import Any

from clip_jax.data.records import Record, read_image_file
from clip_jax.errors import UserError

_FILES = {
    "sklearn": ("datasets/images", {"china.jpg": "temple", "flower.jpg": "flower"}),
    "skimage": (
        "data",
        {
            "astronaut.png": "astronaut",
            "camera.png": "photographer",
            "chelsea.png": "cat",
            "coffee.png": "cup of coffee",
            "coins.png": "coins",
            "moon.png": "moon",
            "motorcycle_left.png": "motorcycle",
            "brick.png": "brick wall",
            "grass.png": "grass",
            "gravel.png": "gravel",
            "rocket.jpg": "rocket",
        },
    ),
}


class Photographs:
    """A photograph a class: two with scikit-learn, thirteen with scikit-image besides.

    Attributes:
      classes: what they show.
      fingerprint: their names.
    """

    state = None

    def __init__(self) -> None:
        """Finds them.

        Raises:
          UserError: neither package has them.
        """
        found = [(folder / name, shows) for folder, names in _folders() for name, shows in names.items()]
        self._files = [(path, shows) for path, shows in found if path.exists()]
        if len(self._files) < 2:
            raise UserError("scikit-learn and scikit-image have no photographs here; name a --dataset")
        self.classes = tuple(shows for _, shows in self._files)
        self.fingerprint: dict[str, Any] = {"name": "photographs", "files": [path.name for path, _ in self._files]}

    def __len__(self) -> int:
        return len(self._files)

    def __str__(self) -> str:
        return "the photographs of scikit-learn and scikit-image"

    def __getitem__(self, index: int) -> Record:
        return Record(read_image_file(self._files[index][0]), label=index)

    def where(self, index: int) -> str:
        """Returns a photograph's path, for messages."""
        return str(self._files[index][0])


def _folders() -> list[tuple[Path, dict[str, str]]]:
    """Returns the folders of photographs of the packages that are installed."""
    folders = []
    for package, (below, names) in _FILES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            folders.append((Path(spec.origin).parent / below, names))
    return folders
