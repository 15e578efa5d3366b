"""Published figures of OpenAI's models, to which an import is held: `clip-jax eval … --check=published`.

ImageNet and ImageNet-V2: measured by open_clip with OpenAI's weights and ImageNet's 80 templates (open_clip 3.3,
`docs/openclip_results.csv`). Retrieval on MS COCO and Flickr30k: the same (`docs/openclip_retrieval_results.csv`).
"""

from typing import NamedTuple

from clip_jax.errors import UserError


class Published(NamedTuple):
    """A published figure: dataset, metric by CLIP_benchmark's name, model by the paper's, and its value, 0 to 1."""

    dataset: str
    metric: str
    model: str
    value: float


_ALIASES = {
    "imagenet1k": "imagenet1k",
    "imagenet2012": "imagenet1k",
    "imagenet": "imagenet1k",
    "imagenet_v2": "imagenetv2",
    "imagenetv2": "imagenetv2",
    "mscoco_captions": "mscoco_captions",
    "coco_captions": "mscoco_captions",
    "flickr30k": "flickr30k",
}
"""What the datasets are called by CLIP_benchmark, TFDS and people."""

# fmt: off
# In percent.
_PERCENT = {
    ("imagenet1k", "acc1"): {
        "RN50": 59.82, "RN101": 62.28, "RN50x4": 66.27, "RN50x16": 70.72, "RN50x64": 73.91,
        "ViT-B/32": 63.32, "ViT-B/16": 68.34, "ViT-L/14": 75.54, "ViT-L/14@336": 76.56,
    },
    ("imagenetv2", "acc1"): {"ViT-B/32": 55.93},
    ("imagenetv2", "acc5"): {"ViT-B/32": 83.36},
    ("mscoco_captions", "image_retrieval_recall@1"): {"ViT-B/32": 30.4, "ViT-L/14": 36.5},
    ("mscoco_captions", "text_retrieval_recall@1"): {"ViT-B/32": 50.1, "ViT-L/14": 56.3},
    ("flickr30k", "image_retrieval_recall@1"): {"ViT-B/32": 58.8, "ViT-L/14": 65.0},
    ("flickr30k", "text_retrieval_recall@1"): {"ViT-B/32": 78.9, "ViT-L/14": 85.2},
}
# fmt: on


PUBLISHED = tuple(
    Published(dataset, metric, model, round(percent / 100, 6))
    for (dataset, metric), by_model in _PERCENT.items()
    for model, percent in by_model.items()
)


def published(model: str, dataset: str, metrics: tuple[str, ...]) -> tuple[Published, ...]:
    """Returns the figures that there are for a model on a dataset.

    Args:
      model: the paper's name.
      dataset: as CLIP_benchmark or TFDS calls it; what is before `/` and behind `:` does not matter.
      metrics: those that were measured.

    Raises:
      UserError: there are none.
    """
    parts = [part for part in dataset.split(":")[0].split("/") if part in _ALIASES]
    known = _ALIASES[parts[0]] if parts else ""
    found = tuple(row for row in PUBLISHED if (row.model, row.dataset) == (model, known) and row.metric in metrics)
    if not found:
        datasets = ", ".join(dict.fromkeys(row.dataset for row in PUBLISHED if row.model == model)) or "none"
        raise UserError(
            f"no published figure is known of {model} on {dataset!r} (of this model: {datasets}); if it is one of "
            "these under another name, say so with --name"
        )
    return found
