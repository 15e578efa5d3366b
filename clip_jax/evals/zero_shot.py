"""Zero-shot classification from text prompts alone (paper, §3.1).

A class's weight is the normalised mean of the unit embeddings of its name in every template.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ZeroShotResult:
    """How a set of prompts classifies a dataset.

    Attributes:
      prompts: name of the template set.
      classes: names, in the order of the labels.
      confusion: int64 [c, c], images by (true class, class found).
      top5: share of images whose class is among the five highest; NaN with fewer than five classes.
    """

    prompts: str
    classes: tuple[str, ...]
    confusion: np.ndarray
    top5: float

    @property
    def images(self) -> int:
        """Images classified."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of images whose class is the highest."""
        return float(np.trace(self.confusion)) / self.images

    @property
    def mean_per_class(self) -> float:
        """Mean over the classes that have images of their own top-1."""
        totals = self.confusion.sum(axis=1)
        return float(np.mean(np.diag(self.confusion)[totals > 0] / totals[totals > 0]))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of top-1."""
        return wilson_interval(self.top1, self.images)

    def confusions(self) -> list[tuple[str, str, int]]:
        """Returns (true class, class found, images), most frequent first, mistakes only."""
        wrong = [
            (self.classes[true], self.classes[found], int(count))
            for (true, found), count in np.ndenumerate(self.confusion)
            if true != found and count
        ]
        return sorted(wrong, key=lambda row: -row[2])


def class_weights(
    embed: Callable[[Sequence[str]], np.ndarray], classes: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Returns the classifier, float [c, e] of unit length.

    Args:
      embed: texts to unit features, [n, e].
      classes: c names.
      templates: prompts with `{}` for the name.
    """
    prompts = [template.format(name) for name in classes for template in templates]
    mean = embed(prompts).reshape(len(classes), len(templates), -1).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def classify(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray, *, prompts: str, classes: Sequence[str]
) -> ZeroShotResult:
    """Classifies embedded images.

    Args:
      features: float [n, e], unit length.
      labels: int [n].
      weights: as `class_weights` gives them.
      prompts: name of the template set.
      classes: c names.
    """
    ranked = np.argsort(-(features @ weights.T), axis=1, kind="stable")
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels, ranked[:, 0]), 1)
    top5 = float(np.mean(np.any(ranked[:, :5] == labels[:, None], axis=1))) if len(classes) >= 5 else math.nan
    return ZeroShotResult(prompts, tuple(classes), confusion, top5)


def wilson_interval(share: float, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Returns Wilson's score interval of a share among `count` trials (Wilson 1927), by default at 95 %."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
