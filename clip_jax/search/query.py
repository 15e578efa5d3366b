"""Questions to an index: by text or by image, for images or for captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_jax.data.images import Images
from clip_jax.errors import UserError
from clip_jax.pretrained import Pretrained, load
from clip_jax.search.index import Item, SearchIndex


class Hit(NamedTuple):
    """Something that was found.

    Attributes:
      number: in the index.
      score: cosine with the query.
      item: what it is.
    """

    number: int
    score: float
    item: Item


class Searcher:
    """An index, and the model with which it was made.

    Args:
      index: to be searched.
      model: its towers embed the queries.

    Raises:
      UserError: the index was made with another model.
    """

    def __init__(self, index: SearchIndex, model: Pretrained) -> None:
        made_with = index.about["model"]
        if made_with["fingerprint"] != model.fingerprint:
            raise UserError(
                f"{index.folder} was made with the model {made_with['source']} (fingerprint "
                f"{made_with['fingerprint']}), and this one is another ({model.fingerprint}); cosines between two "
                "models mean nothing"
            )
        self.index, self.model = index, model

    def by_text(self, texts: str | Sequence[str], *, top: int) -> list[list[Hit]]:
        """Returns what is nearest to each text, best first; a single text is a list of one.

        Raises:
          UserError: a text is blank.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not all(text.strip() for text in texts):
            raise UserError('the text to search for is blank; write what to look for, such as "red car at night"')
        return self.nearest(self.model.embed_texts(texts), top=top)

    def by_image(self, images: Images, *, top: int) -> list[list[Hit]]:
        """Returns what is nearest to each image, best first; a single image is a list of one.

        Raises:
          ImageError: what is no image.
        """
        return self.nearest(self.model.embed_images(images), top=top)

    def nearest(self, vectors: np.ndarray, *, top: int) -> list[list[Hit]]:
        """Returns what is nearest to each unit vector of [q, e], best first."""
        scores, numbers = self.index.search(vectors, top=top)
        return [
            [
                Hit(int(number), float(score), self.index.item(int(number)))
                for score, number in zip(*row, strict=True)
                if number >= 0
            ]
            for row in zip(scores, numbers, strict=True)
        ]


def open_searcher(folder: str | Path, model: str | None = None, *, nprobe: int | None = None) -> Searcher:
    """Opens an index and loads its model.

    Args:
      folder: of the index.
      model: what `clip_jax.load` takes; None means the model that the index names.
      nprobe: see `SearchIndex`.

    Raises:
      UserError: one of them is not there, or they do not belong together.
    """
    index = SearchIndex(folder, nprobe=nprobe)
    source = model or index.about["model"]["source"]
    try:
        loaded = load(source)
    except UserError as error:
        hint = "" if model else f" ({folder} was made with it; if it was moved, say where to with --model)"
        raise UserError(f"{error}{hint}") from None
    return Searcher(index, loaded)
