"""Fixtures around search: a small model, a folder of pictures good and bad, their embeddings and indexes."""

import io
import json
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image
from random_weights import random_like

import clip_jax
from clip_jax.data.folder_source import FolderSource
from clip_jax.data.images import Preprocess
from clip_jax.interop.open_clip import write_open_clip
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.variants import ModelConfig, TextConfig, ViTConfig
from clip_jax.search.embed import EmbedOptions, embed
from clip_jax.search.index import build_index

MODEL = ModelConfig(
    16,
    ViTConfig(image_size=16, patch=8, width=64, heads=1, layers=1),
    TextConfig(width=64, heads=1, layers=1, context=12),
)
GOOD, BAD = 30, 3


def picture(number: int, *, kind: str = "PNG") -> bytes:
    """A picture that is like no other: coarse random colours."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 32), Image.Resampling.NEAREST).save(buffer, kind)
    return buffer.getvalue()


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG that says it has so many pixels; a few hundred bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def write_pictures(folder, count: int) -> None:
    """Writes pictures, each with a caption beside it."""
    for number in range(count):
        path = folder / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        captions = [f"picture number {number}", f"another text of {number}"]
        path.with_suffix(".json").write_text(json.dumps({"caption": captions}))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A small model in open_clip's layout."""
    folder = tmp_path_factory.mktemp("model") / "small"
    folder.mkdir()
    shapes = jax.eval_shape(lambda: init_variables(CLIP(MODEL), jax.random.key(0)))
    write_open_clip(folder, Weights(MODEL, random_like(shapes, dtype=np.float32), Preprocess(size=16)))
    return folder


@pytest.fixture(scope="session")
def model(model_dir):
    """The same, loaded."""
    return clip_jax.load(model_dir)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """GOOD pictures with two captions each, and BAD ones."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, GOOD)
    (folder / "damaged.jpg").write_bytes(picture(0, kind="JPEG")[:-40])
    (folder / "empty.png").write_bytes(b"")
    (folder / "vast.png").write_bytes(bomb())
    (folder / ".hidden.png").write_bytes(picture(1))
    return folder


@pytest.fixture(scope="session")
def vectors(tmp_path_factory, pictures, model, model_dir):
    """Embeddings of the pictures and of their captions."""
    folder = tmp_path_factory.mktemp("vectors")
    embed(
        FolderSource(pictures),
        str(folder),
        model=model,
        model_source=str(model_dir),
        options=EmbedOptions(kinds=("images", "texts"), shard=8, batch=8),
    )
    return folder


@pytest.fixture(scope="session")
def index_dir(tmp_path_factory, vectors):
    """An index of the pictures."""
    folder = tmp_path_factory.mktemp("index") / "images"
    build_index(str(vectors), folder)
    return folder


@pytest.fixture(scope="session")
def texts_dir(tmp_path_factory, vectors):
    """An index of their captions."""
    folder = tmp_path_factory.mktemp("index") / "texts"
    build_index(str(vectors), folder, kind="texts")
    return folder
