"""Zero-shot classification from text prompts alone (paper, §3.1).

A class's weight is the normalised mean of the unit embeddings of its name in every template.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clip_jax.data.labelled import LabelledSource
from clip_jax.errors import UserError

_AT_ONCE = 4_096
_RESAMPLED = 2_000


def named_classes(given: Sequence[str], source: LabelledSource) -> tuple[str, ...]:
    """Returns the names of a dataset's classes: those given, else the dataset's own.

    Raises:
      UserError: none, or another number of names than the dataset has classes.
    """
    classes, own = tuple(given or source.classes), source.classes
    if not classes:
        raise UserError(f"{source} does not name its classes; give their names with --classes or config.eval.classes")
    if own and len(classes) != len(own):
        raise UserError(f"{len(classes):,} class names are given, and {source} has {len(own):,} classes")
    return classes


@dataclass(frozen=True)
class ZeroShotResult:
    """How a set of prompts classifies a dataset.

    Attributes:
      prompts: name of the template set.
      classes: names, in the order of the labels.
      confusion: int64 [c, c], images by (true class, class found).
      top5: share of images whose class is among the five highest; NaN with fewer than five classes.
      correct: bool [n], whether the highest class is the image's own; in the images' order.
      found: int64 [n], the highest class.
    """

    prompts: str
    classes: tuple[str, ...]
    confusion: np.ndarray
    top5: float
    correct: np.ndarray
    found: np.ndarray

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

    @property
    def top5_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % confidence interval of top-5; None with fewer than five classes."""
        return None if math.isnan(self.top5) else wilson_interval(self.top5, self.images)

    @property
    def mean_per_class_interval(self) -> tuple[float, float]:
        """95 % of the means when the images of each class are drawn again, with replacement (the bootstrap)."""
        totals = self.confusion.sum(axis=1)
        kept = totals > 0
        shares = np.diag(self.confusion)[kept] / totals[kept]
        drawn = np.random.default_rng(0).binomial(totals[kept], shares, (_RESAMPLED, len(shares))) / totals[kept]
        low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
        return float(low), float(high)

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
    return mean_weights(prompt_features(embed, classes, templates))


def prompt_features(
    embed: Callable[[Sequence[str]], np.ndarray], classes: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Returns the unit features of every class in every template, float [c, t, e]; see `class_weights`."""
    prompts = [template.format(name) for name in classes for template in templates]
    return embed(prompts).reshape(len(classes), len(templates), -1)


def mean_weights(prompts: np.ndarray) -> np.ndarray:
    """Returns the classifier of prompt features [c, t, e]: their mean over templates, normalised; [c, e]."""
    mean = prompts.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def classify(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray, *, prompts: str, classes: Sequence[str]
) -> ZeroShotResult:
    """Classifies embedded images; of two classes that are equally near, the first one wins.

    Args:
      features: float [n, e].
      labels: int [n].
      weights: a classifier, [c, e], such as `class_weights` gives it.
      prompts: name of the template set.
      classes: c names.

    Raises:
      UserError: a label that is no class's.
    """
    check_labels(labels, len(classes))
    found, rank = np.zeros(len(labels), np.int64), np.zeros(len(labels), np.int64)
    for start in range(0, len(labels), _AT_ONCE):  # a matrix of all images and classes need not fit in memory
        part = slice(start, start + _AT_ONCE)
        scores, own = features[part] @ weights.T, labels[part][:, None]
        mine = np.take_along_axis(scores, own, axis=1)
        before = np.arange(len(classes)) < own
        found[part] = scores.argmax(axis=1)
        rank[part] = ((scores > mine) | ((scores == mine) & before)).sum(axis=1)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels, found), 1)
    top5 = float(np.mean(rank < 5)) if len(classes) >= 5 else math.nan
    return ZeroShotResult(prompts, tuple(classes), confusion, top5, found == labels, found)


def check_labels(labels: np.ndarray, classes: int) -> None:
    """Refuses labels that are no class's.

    Raises:
      UserError: there is one.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"the dataset has the label {wrong}, and {classes:,} classes are named (0 is the first)")


def wilson_interval(share: float, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Returns Wilson's score interval of a share among `count` trials (Wilson 1927), by default at 95 %."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
