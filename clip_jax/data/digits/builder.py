"""TFDS builder of `digits`: 1,797 real scans of handwritten digits, with captions in many wordings.

The scans are scikit-learn's `load_digits` (the test part of UCI's "Optical Recognition of Handwritten Digits",
8 x 8 pixels of 17 grey levels); the captions are made here. Every sixth scan is held out: `test` has one record a
scan, with a wording that training never sees; `train` has six records a scan, each with another wording.

Import it only to prepare the dataset: writing records needs TensorFlow, reading them does not.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from clip_jax.data.digits import VERSION
from clip_jax.data.digits.captions import CLASSES, TRAIN_TEMPLATES, UNSEEN_TEMPLATES, caption

HELD_OUT_EVERY = 6
CAPTIONS_PER_SCAN = 6
_DARKEST = 16  # scikit-learn's grey levels are 0..16


class Digits(tfds.core.GeneratorBasedBuilder):
    """Scans of handwritten digits with captions; see the module."""

    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Scans of handwritten digits, 8 x 8 pixels, with captions in many wordings.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            license="CC BY 4.0",
            citation=(
                "E. Alpaydin and C. Kaynak. Optical Recognition of Handwritten Digits. "
                "UCI Machine Learning Repository, 1998. https://doi.org/10.24432/C50P49"
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "scan": tfds.features.Scalar(np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        scans, labels = map(np.asarray, load_digits(return_X_y=True))
        images = [_png(scan.reshape(8, 8)) for scan in scans]
        held_out = {scan for scan in range(len(images)) if is_held_out(scan)}
        train = [scan for scan in range(len(images)) if scan not in held_out]
        return {
            "train": _records(train, images, labels, TRAIN_TEMPLATES, captions=CAPTIONS_PER_SCAN),
            "test": _records(sorted(held_out), images, labels, UNSEEN_TEMPLATES, captions=1),
        }

    def _generate_examples(self) -> None:
        """Never called: the split generators are the examples."""


def is_held_out(scan: int) -> bool:
    """Returns whether scan number `scan` of scikit-learn's order belongs to `test`."""
    return scan % HELD_OUT_EVERY == 0


def _records(
    scans: list[int], images: list[bytes], labels: np.ndarray, templates: tuple[str, ...], *, captions: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (key, record): for each scan `captions` records with different wordings, half of them with the word."""
    for scan in scans:
        label = int(labels[scan])
        rng = np.random.default_rng(scan)
        first = rng.integers(2)
        for number, template in enumerate(rng.permutation(len(templates))[:captions]):
            text = caption(templates[template], label, word=bool((first + number) % 2))
            yield f"{scan}_{number}", {"image": images[scan], "caption": text, "label": label, "scan": scan}


def _png(scan: np.ndarray) -> bytes:
    """Returns the PNG of a scan, 0..16 stretched to 0..255."""
    encoded = io.BytesIO()
    Image.fromarray(np.rint(scan * (255 / _DARKEST)).astype(np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()
