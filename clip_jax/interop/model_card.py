"""The README.md of an export: what the model is, how it is loaded, and how far the copy is from the original."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import clip_jax
from clip_jax.interop.weights import Weights, facts
from clip_jax.models.variants import variant_name

# What each layout's page on the Hub is filed under, and how the folder is loaded.
_LIBRARIES = {"openai": "clip", "open_clip": "open_clip", "hugging_face": "transformers", "stablehlo": "jax"}
_LOADING = {
    "openai": 'import open_clip\n\nmodel = open_clip.load_openai_model("model.pt", precision="fp32", device="cpu")',
    "open_clip": (
        "import open_clip\n\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:path/to/this/folder")'
    ),
    "hugging_face": (
        "from transformers import CLIPModel, CLIPProcessor\n\n"
        'model = CLIPModel.from_pretrained("path/to/this/folder")\n'
        'processor = CLIPProcessor.from_pretrained("path/to/this/folder")'
    ),
    "stablehlo": (
        "from pathlib import Path\n\nfrom run import ExportedModel  # the file in this folder; it needs only jax\n\n"
        'model = ExportedModel(Path("path/to/this/folder"))'
    ),
}


def write_model_card(
    folder: Path, weights: Weights, *, layout: str, source: str, comparisons: Sequence[tuple[str, float]]
) -> None:
    """Writes `README.md` into an export.

    Args:
      folder: the export's.
      weights: what was exported.
      layout: `openai`, `open_clip`, `hugging_face` or `stablehlo`.
      source: where the weights came from.
      comparisons: (what read the export, the largest difference of its unit features from the original's).
    """
    front = _front_matter({"library_name": _LIBRARIES[layout], "pipeline_tag": "zero-shot-image-classification"})
    known = {"weights from": f"`{source}`"} | facts(weights)
    table = "\n".join(f"| {name} | {value} |" for name, value in known.items())
    proof = "\n".join(f"| {reader} | {difference:.1e} |" for reader, difference in comparisons)
    (folder / "README.md").write_text(
        f"{front}\n# CLIP {variant_name(weights.config)}\n\n"
        f"Exported by clip_jax {clip_jax.__version__} in the layout `{layout}`.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Load\n\n```python\n{_LOADING[layout]}\n```\n\n"
        "## Proof\n\nLargest difference of unit features from the original's, on fixed images and texts:\n\n"
        f"| read by | difference |\n|---|---|\n{proof}\n\n"
        "## Limits\n\nWhat the training data, its licence and its biases were, the weights do not say: state it here "
        "before you share this model.\n",
        encoding="utf-8",
    )


def _front_matter(values: Mapping[str, str]) -> str:
    lines = "\n".join(f"{key}: {value}" for key, value in values.items())
    return f"---\n{lines}\ntags:\n- clip\n---\n"
