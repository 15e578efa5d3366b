"""Finding images by text."""

import numpy as np


def find_images(images: np.ndarray, texts: np.ndarray, *, top: int) -> np.ndarray:
    """Returns the positions of the images nearest to each text, best first: int64 [q, top].

    Args:
      images: unit features, [n, e].
      texts: unit features, [q, e].
      top: images a text; at most n.
    """
    return np.argsort(-(texts @ images.T), axis=1, kind="stable")[:, :top]
