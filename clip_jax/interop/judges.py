"""An export's unit features, computed by the library that its layout is for; none where that is not installed."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Verdict(NamedTuple):
    """What another library makes of an export.

    Attributes:
      library: its name and version.
      image: float [b, e], unit features of the images.
      text: float [b, e], unit features of the texts.
    """

    library: str
    image: np.ndarray
    text: np.ndarray


Judge = Callable[[Path, np.ndarray, np.ndarray], Verdict | None]
"""(folder, normalised float32 images [b, s, s, 3], int32 tokens [b, l]) to a verdict, or None without the library."""


def judge_open_clip(folder: Path, images: np.ndarray, tokens: np.ndarray) -> Verdict | None:
    """Loads a folder with open_clip, as `local-dir:`."""
    return _judge_by_open_clip(
        lambda open_clip: open_clip.create_model_from_pretrained(f"local-dir:{folder}", return_transform=False),
        images,
        tokens,
    )


def judge_openai(file: Path, images: np.ndarray, tokens: np.ndarray) -> Verdict | None:
    """Loads a `.pt` file with open_clip's builder of OpenAI's models.

    The builder, like OpenAI's own, rounds the weights to float16; they are loaded again into its model in float32.
    """

    def load(open_clip: Any) -> Any:
        import torch

        tensors = torch.load(file, map_location="cpu", weights_only=True)
        model = open_clip.model.build_model_from_openai_state_dict(tensors).float()
        model.load_state_dict(tensors)
        return model

    return _judge_by_open_clip(load, images, tokens)


def judge_hugging_face(folder: Path, images: np.ndarray, tokens: np.ndarray) -> Verdict | None:
    """Loads a folder with transformers, offline."""
    with _quiet():
        try:
            import torch
            import transformers
            from transformers import CLIPModel  # transformers imports it only now
        except (ImportError, RuntimeError):
            return None
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        with torch.no_grad():
            output = model(input_ids=torch.tensor(tokens), pixel_values=_nchw(images))
    return Verdict(f"transformers {transformers.__version__}", output.image_embeds.numpy(), output.text_embeds.numpy())


def _judge_by_open_clip(load: Callable[[Any], Any], images: np.ndarray, tokens: np.ndarray) -> Verdict | None:
    with _quiet():
        try:
            import open_clip
            import torch
        except (ImportError, RuntimeError):
            return None
        model = load(open_clip).float().eval()
        with torch.no_grad():
            image = model.encode_image(_nchw(images), normalize=True)
            text = model.encode_text(torch.tensor(tokens), normalize=True)
    return Verdict(f"open_clip {open_clip.__version__}", image.numpy(), text.numpy())


def _nchw(images: np.ndarray) -> Any:
    import torch

    return torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' warnings and progress bars off the user's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
