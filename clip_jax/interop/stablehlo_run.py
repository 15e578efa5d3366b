"""Runs an exported CLIP model without clip_jax; a copy lies beside every StableHLO export as `run.py`.

Needs jax, and flatbuffers, with which `jax.export` reads its programs. The JAX that reads may be up to six months
newer than the one that wrote, or three weeks older
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).

`python run.py images.npy` (uint8 [b, s, s, 3]) prints a row for each image: the probabilities of the exported
classes or, without classes, its features. Every new batch size is compiled once.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export


class ExportedModel:
    """An exported model; its arguments are NumPy or JAX arrays.

    Attributes:
      manifest: what `stablehlo.json` holds: image size, tokenizer, classes, shapes.
      weights: float32 arrays by name, on the default device.
      programs: `jax.export.Exported` by name; the first argument is a dict of the weights that the manifest lists.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "stablehlo.json").read_text(encoding="utf-8"))
        self.weights = {name: jax.device_put(x) for name, x in read_weights(folder / "weights.safetensors").items()}
        self.programs, self._run = {}, {}
        for name, entry in self.manifest["programs"].items():
            self.programs[name] = export.deserialize(bytearray((folder / entry["file"]).read_bytes()))
            self._run[name] = jax.jit(self.programs[name].call)
        self._arguments = {
            name: {weight: self.weights[weight] for weight in entry["weights"]}
            for name, entry in self.manifest["programs"].items()
        }

    def encode_image(self, images: Any) -> jax.Array:
        """Returns unit features, float32 [b, e], of uint8 [b, s, s, 3]: RGB, resized and cropped, not normalised."""
        return self._run["encode_image"](self._arguments["encode_image"], images)

    def encode_text(self, tokens: Any) -> jax.Array:
        """Returns unit features, float32 [b, e], of int32 [b, context]: CLIP's token ids, zeros after the end."""
        return self._run["encode_text"](self._arguments["encode_text"], tokens)

    def zero_shot_head(self, features: Any, class_weights: Any) -> jax.Array:
        """Returns probabilities, float32 [b, c], of unit features [b, e] among classes of unit weights [c, e]."""
        return self._run["zero_shot_head"](self._arguments["zero_shot_head"], features, class_weights)

    def classify(self, images: Any) -> jax.Array:
        """Returns probabilities, float32 [b, c], of images, as `encode_image` takes them, among the exported classes.

        Raises:
          ValueError: the model was exported without classes.
        """
        if "class_weights" not in self.weights:
            raise ValueError("exported without classes: give class weights [c, e] to zero_shot_head")
        return self.zero_shot_head(self.encode_image(images), self.weights["class_weights"])


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Returns the float32 arrays of a safetensors file: 8 bytes of header length, a JSON header, raw values."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = np.frombuffer(raw, "<f4", (end - begin) // 4, start + begin)
        arrays[name] = values.reshape(entry["shape"])
    return arrays


if __name__ == "__main__":
    model, pixels = ExportedModel(Path(__file__).parent), np.load(sys.argv[1])
    np.savetxt(sys.stdout, model.classify(pixels) if model.manifest["classes"] else model.encode_image(pixels))
