"""The Python API: a model that is loaded is the model that was trained, whatever it is loaded from."""

import dataclasses
import functools
import http.server
import math
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_like
from references import import_open_clip
from test_interop import CONFIGS, TEXT, assert_same, weights_of
from tiny import TINY
from torch_clip import torch_clip, torch_images

import clip_jax
from clip_jax.checkpoints.checkpoint import Checkpoints
from clip_jax.config import CheckpointConfig, MeshConfig
from clip_jax.errors import UserError
from clip_jax.interop import download, read
from clip_jax.interop.hugging_face import write_hugging_face
from clip_jax.interop.open_clip import write_open_clip
from clip_jax.interop.openai import write_openai
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, forward, init_variables
from clip_jax.models.resolution import change_resolution, resize_positions
from clip_jax.models.variants import ResNetConfig
from clip_jax.partition import make_mesh
from clip_jax.pretrained import Pretrained
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import abstract_state


@pytest.fixture(scope="module", params=["vit", "resnet"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_open_clip(folder, weights_of(request.param))
    return request.param, folder, clip_jax.load(folder)


def test_loaded_features_are_the_models(loaded):
    kind, _, model = loaded
    weights = weights_of(kind)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    tokens = np.array([[78, 5, 79, 0], [78, 79, 0, 0]])
    output = forward(CLIP(weights.config), weights.variables, jnp.asarray(images), jnp.asarray(tokens))
    np.testing.assert_allclose(model.encode_image(images, normalize=True), output.image, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(tokens, normalize=True), output.text, atol=1e-6)
    raw = model.encode_image(images)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.01).all()
    np.testing.assert_allclose(raw / lengths, output.image, atol=1e-6)
    assert float(model.scale) == pytest.approx(20)
    assert model.params["logit_scale"] == model.variables["params"]["logit_scale"]


def test_preprocess_and_tokenize_fit_the_model(loaded):
    _, _, model = loaded
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    images = model.preprocess([pixels, pixels])
    assert images.shape == (2, 32, 32, 3)
    text = dataclasses.replace(model.config.text, vocab_size=49_408)
    whole = Pretrained(dataclasses.replace(weights_of("vit"), config=dataclasses.replace(model.config, text=text)))
    assert whole.tokenize("a dog").shape == (1, TEXT.context)
    with pytest.raises(UserError, match="the model knows 80 tokens, and CLIP's tokenizer has 49,408"):  # NaN otherwise
        model.tokenize("a dog")
    assert model.encode_image(images).shape == (2, 24)


def test_bfloat16(loaded):
    _, folder, model = loaded
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    half = clip_jax.load(folder, dtype="bfloat16").encode_image(images, normalize=True)
    assert half.dtype == jnp.float32
    difference = np.abs(half - model.encode_image(images, normalize=True)).max()
    assert 1e-4 < difference < 0.1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 32, 32), np.float32), r"images are float32 \[2, 3, 32, 32\]; .* floats \[b, 32, 32, 3\]"),
        (np.zeros((2, 32, 32, 3), np.uint8), "images are uint8"),
        (np.zeros((32, 32, 3), np.float32), r"\[32, 32, 3\]"),
        (np.zeros((0, 32, 32, 3), np.float32), r"\[0, 32, 32, 3\]"),
    ],
)
def test_images_that_are_none(loaded, images, message):
    kind, _, model = loaded
    for encode in (model.encode_image, functools.partial(model.image_states, layer=-1))[: 2 if kind == "vit" else 1]:
        with pytest.raises(UserError, match=message):
            encode(images)


@pytest.mark.parametrize(
    "tokens",
    [np.zeros((1, 11), np.int32), np.zeros((1, 10), np.float32), np.zeros(10, np.int32), np.zeros((0, 10), np.int32)],
)
def test_tokens_that_are_none(loaded, tokens):
    model = loaded[2]
    for encode in (model.encode_text, functools.partial(model.text_states, layer=-1)):
        with pytest.raises(UserError, match=r"tokens are .*needs integers \[b, 10\]"):
            encode(tokens)


def test_tokens_of_another_tokenizer(loaded):
    model = loaded[2]
    most = model.config.text.vocab_size - 1
    for wrong, found in ((-1, "-1 to 5"), (most + 1, f"3 to {most + 1}")):
        with pytest.raises(UserError, match=f"tokens are from {found}, and the model knows 0 to {most};"):
            model.encode_text(np.array([[3, wrong, 5]]))
    jax.jit(model.encode_text)(np.array([[3, 4, 5]]))


def test_a_fingerprint_stays_what_indexes_hold():
    weights = weights_of("vit")
    zeros = jax.tree.map(np.zeros_like, weights.variables)
    assert Pretrained(dataclasses.replace(weights, variables=zeros)).fingerprint == "beb29e93f9b6b010"


def test_another_model_than_asked_for_is_refused(loaded):
    with pytest.raises(UserError, match=r"holds another model \((vit|resnet) .*embed_dim 24 -> 512"):
        clip_jax.load(loaded[1], model="ViT-B/32")


def test_expecting_another_activation_is_refused(loaded):
    kind, folder, _ = loaded
    gelu = dataclasses.replace(CONFIGS[kind], activation="gelu")
    with pytest.raises(UserError, match="activation 'quick_gelu' -> 'gelu'"):
        read.read_weights(folder, expect=gelu)
    read.read_weights(folder, expect=dataclasses.replace(CONFIGS[kind], init="scaled", dtype="bfloat16"))


@pytest.mark.parametrize(
    "vision",
    [
        pytest.param(TINY.model.vision, id="vit"),
        pytest.param(ResNetConfig(32, 8, 4, (1, 1, 1, 1)), id="resnet", marks=pytest.mark.slow),
    ],
)
def test_a_runs_newest_whole_checkpoint_is_loaded_or_the_one_that_is_named(vision, tmp_path, store):
    run = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, vision=vision, dtype="bfloat16"))
    mesh, optimizer = make_mesh(MeshConfig(fsdp=2)), make_optimizer(run.optim, steps=run.steps)
    target = abstract_state(CLIP(run.model), optimizer, mesh=mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    states = [jax.device_put(random_like(target, dtype=np.float32, seed=seed), shardings) for seed in (0, 1)]
    workdir = tmp_path / "run"
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    for step, state in enumerate(states, 1):
        checkpoints.save(step, state, position=0, config=run, data={}, now=True)
        checkpoints.wait()
    checkpoints.close()
    before = sorted(workdir.rglob("*"))
    model = clip_jax.load(workdir)
    assert model.config == dataclasses.replace(run.model, dtype="float32")
    assert read.read_weights(workdir).config == model.config  # so that an export compares float32 with float32
    expected = jax.device_get(states[1].variables)
    assert jax.tree.structure(model.variables) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (model.variables, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(workdir.rglob("*")) == before
    upload(workdir, f"{store}/run")
    for a, b in zip(*map(jax.tree.leaves, (read.read_weights(f"{store}/run").variables, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    older = jax.device_get(states[0].variables)
    shutil.copytree(workdir / "checkpoints" / "1", tmp_path / "best")
    for source in (workdir / "checkpoints" / "1", tmp_path / "best", f"{store}/run/checkpoints/1"):
        for a, b in zip(*map(jax.tree.leaves, (read.read_weights(source).variables, older)), strict=True):
            np.testing.assert_array_equal(a, b)
    shutil.rmtree(tmp_path / "best" / "config")
    with pytest.raises(UserError, match="checkpoint .*best lacks config; take another one"):
        clip_jax.load(tmp_path / "best")


def test_a_run_without_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no whole checkpoint yet"):
        clip_jax.load(tmp_path)


@pytest.mark.parametrize(("before", "after"), [(16, 24), (24, 16), (7, 12)])
def test_resized_positions_equal_open_clips(before, after):
    import_open_clip()
    import types

    import torch
    from open_clip.model import resize_pos_embed

    positions = np.random.default_rng(0).standard_normal((before**2 + 1, 32)).astype(np.float32)
    tensors = {"visual.positional_embedding": torch.tensor(positions)}
    grid = types.SimpleNamespace(grid_size=(after, after))
    resize_pos_embed(tensors, types.SimpleNamespace(visual=grid))
    ours = resize_positions(jnp.asarray(positions), tokens=after**2 + 1)
    difference = np.abs(ours - tensors["visual.positional_embedding"].numpy()).max()
    print(f"positions {before}² -> {after}²: {difference:.1e}")
    assert difference <= 1e-5
    np.testing.assert_array_equal(ours[0], positions[0])


def test_another_resolution_equals_open_clips(loaded):
    """Features at 64 pixels of weights for 32, beside open_clip's model with the same resized positions."""
    kind, folder, model = loaded
    import_open_clip()
    import torch

    larger = clip_jax.load(folder, image_size=64)
    assert larger.config.vision.image_size == larger.preprocess.size == 64
    weights = weights_of(kind)
    config, variables = change_resolution(weights.config, weights.variables, 64)
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = torch_clip(config, jax.tree.map(np.asarray, variables)).encode_image(torch_images(images)).numpy()
    np.testing.assert_allclose(larger.encode_image(images), theirs, atol=2e-5 * np.abs(theirs).max())
    with pytest.raises(UserError):
        larger.encode_image(images[:, :32, :32])
    assert model.config.vision.image_size == 32


def test_a_resolution_that_does_not_fit_is_refused(loaded):
    with pytest.raises(UserError, match=r"image_size is 50; it must be a multiple of"):
        clip_jax.load(loaded[1], image_size=50)


@pytest.fixture
def server(tmp_path):
    """A local server of a folder, and the list of what was asked of it."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "served"))

        def log_message(self, *arguments):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()


def test_named_weights_are_downloaded_once_and_checked(server, tmp_path, monkeypatch):
    address, asked = server
    file = tmp_path / "served" / "0" / "tiny.pt"
    file.parent.mkdir(parents=True)
    write_openai(file, weights_of("vit"))
    sha256 = download.file_sha256(file)
    file.parent.rename(tmp_path / "served" / sha256)
    monkeypatch.setitem(download._SHA256, "ViT-B/32", ("tiny.pt", sha256))
    monkeypatch.setattr(download, "_SERVER", address)
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        assert clip_jax.load("vit-b-32").config == CONFIGS["vit"]
    assert len(asked) == 1
    (tmp_path / "cache" / "tiny.pt").write_bytes(b"damaged")
    clip_jax.load("ViT-B/32")
    assert len(asked) == 2
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"tiny.pt", ".tiny.pt.lock"}


def test_a_download_that_is_something_else_is_not_kept(server, tmp_path, monkeypatch):
    address, _ = server
    file, sha256 = download._SHA256["RN50"]
    (tmp_path / "served" / sha256).mkdir(parents=True)
    (tmp_path / "served" / sha256 / file).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"sent 14 bytes of another SHA-256"):
        download.download_openai("RN50", server=address, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"RN101\.pt cannot be downloaded to .*404.*fetch it otherwise"):
        download.download_openai("RN101", server=address, cache=tmp_path / "cache")
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"RN50\.pt cannot be downloaded to .*Not a directory"):
        download.download_openai("RN50", server=address, cache=tmp_path / "file" / "cache")


def test_hub_names_are_fetched_and_read(tmp_path, monkeypatch):
    import huggingface_hub

    repository, fetched = tmp_path / "repository", tmp_path / "fetched"
    repository.mkdir()
    write_hugging_face(repository, weights_of("vit"))

    def snapshot(name, allow_patterns):
        assert name == "owner/name"
        fetched.mkdir(exist_ok=True)
        for file in {file for pattern in allow_patterns for file in repository.glob(pattern)}:
            shutil.copy(file, fetched)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert clip_jax.load("hf-hub:owner/name").config == CONFIGS["vit"]
    assert clip_jax.load("https://huggingface.co/owner/name/").config == CONFIGS["vit"]
    shutil.rmtree(fetched)
    write_open_clip(repository, weights_of("vit"))  # beside the other, as in most of open_clip's: the weights twice
    assert clip_jax.load("hf-hub:owner/name").config == CONFIGS["vit"]
    assert {file.name for file in fetched.glob("*model*")} == {"open_clip_model.safetensors"}

    def fail(repository, allow_patterns):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="^hf-hub:owner/name cannot be downloaded: no network$"):
        clip_jax.load("hf-hub:owner/name")


def upload(folder, url):
    for path in folder.rglob("*"):
        if path.is_file():
            fsspec.filesystem("memory").pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def brought(tmp_path):
    """Returns which files the cache holds, without its folders for one state of a URL each, and their locks."""
    paths = [path.relative_to(tmp_path / "cache" / "urls") for path in tmp_path.glob("cache/urls/*/**/*")]
    return {"/".join(path.parts[1:]) for path in paths if (tmp_path / "cache" / "urls" / path).is_file()}


def test_weights_of_a_store_are_brought_once_and_again_when_they_change(store, tmp_path, capsys):
    files = {"b32/open_clip_config.json", "b32/open_clip_model.safetensors"}
    fsspec.filesystem("memory").pipe_file(f"{store}/b32/logs/large", b"not needed")
    for seed in (0, 1):
        weights, folder = weights_of("vit", seed), tmp_path / str(seed)
        folder.mkdir()
        write_open_clip(folder, weights)
        upload(folder, f"{store}/b32")
        for _ in range(2):
            assert_same(read.read_weights(f"{store}/b32"), weights)
        assert capsys.readouterr().out.count("downloading") == 1
    assert brought(tmp_path) == files


def test_of_processes_that_want_the_same_one_downloads(store, capsys, monkeypatch):
    fsspec.filesystem("memory").pipe_file(f"{store}/run/checkpoints/1/a", b"a")
    bring = download.bring
    monkeypatch.setattr(download, "bring", lambda *what: time.sleep(0.1) or bring(*what))
    with ThreadPoolExecutor(4) as several:  # a lock keeps threads apart as it does processes
        found = list(several.map(download.download_url, [f"{store}/run"] * 4))
    assert {path.name for path in found} == {"run"}
    assert capsys.readouterr().out.count("downloading") == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CLIP_JAX_CACHE": "~/weights"}, "home/weights"),
        ({"CLIP_JAX_CACHE": "", "XDG_CACHE_HOME": ""}, "home/.cache/clip_jax"),
        ({"CLIP_JAX_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/clip_jax"),
    ],
)
def test_where_downloads_go(variables, expected, store, tmp_path, monkeypatch):
    for name, value in {"HOME": str(tmp_path / "home"), **variables}.items():
        monkeypatch.setenv(name, value)
    assert download._cache() == tmp_path / expected


def test_a_file_of_weights_by_http(server, store, tmp_path):
    address, asked = server
    (tmp_path / "served").mkdir()
    write_openai(tmp_path / "served" / "tiny.pt", weights_of("vit"))
    for _ in range(2):
        assert_same(read.read_weights(f"{address}/tiny.pt"), weights_of("vit"))
    assert brought(tmp_path) == {"tiny.pt"}
    (tmp_path / "served" / "tiny.pt").rename(tmp_path / "served" / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.bin alone does not say which model it is"):  # not taken for OpenAI's
        read.read_weights(f"{address}/open_clip_pytorch_model.bin?download=true")
    with pytest.raises(UserError, match=r"/none\.pt cannot be downloaded: .*404"):
        read.read_weights(f"{address}/none.pt")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["checkpoints/9/a", "checkpoints/10/a", "checkpoints/10/b/c", "checkpoints/x/a", "metrics.jsonl"],
            ["10/a", "10/b/c"],
        ),
        (["checkpoints/9/a", "checkpoints/9/files.json", "checkpoints/10/a"], ["9/a"]),
    ],
    ids=["workdir in a bucket", "copy that is not whole yet"],
)
def test_of_a_run_in_a_store_the_newest_checkpoint_is_brought(files, expected, store, tmp_path):
    for name in files:
        fsspec.filesystem("memory").pipe_file(f"{store}/run/{name}", name.encode())
    assert download.download_url(f"{store}/run").name == "run"
    assert brought(tmp_path) == {f"run/checkpoints/{name}" for name in expected}


def test_urls_of_no_weights(store, monkeypatch):
    with pytest.raises(UserError, match="unknown protocol; did you mean 'memory'"):
        clip_jax.load("memry://run")
    with pytest.raises(UserError, match=f"^{store}/run: nothing is there$"):
        clip_jax.load(f"{store}/run")
    fsspec.filesystem("memory").pipe_file(f"{store}/run/config.json", b"{}")
    with pytest.raises(UserError, match=f"^{store}/run: no weights are there$"):
        clip_jax.load(f"{store}/run")

    def fail(*_, **__):
        raise OSError("no\nnetwork")

    with monkeypatch.context() as patched:
        patched.setattr(type(fsspec.filesystem("memory")), "find", fail)
        with pytest.raises(UserError, match=f"^{store}/run cannot be downloaded: no network$"):
            clip_jax.load(f"{store}/run")


def test_openais_checksums_are_the_files_addresses():
    assert set(download._SHA256) == set(clip_jax.models.variants.VARIANTS)
    for file, sha256 in download._SHA256.values():
        assert file.endswith(".pt")
        assert len(bytes.fromhex(sha256)) == 32


def test_the_readmes_example(tmp_path, monkeypatch):
    """The lines in the README run as they stand, with a stand-in for the downloaded weights."""
    import re
    from pathlib import Path

    from PIL import Image

    text = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "clip_jax.load" in code)
    assert len(example.strip().splitlines()) <= 8
    weights = weights_of("vit")
    config = dataclasses.replace(weights.config, text=dataclasses.replace(TEXT, vocab_size=49_408))
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0)))
    stand_in = Weights(config, random_like(shapes, dtype=np.float32), weights.preprocess)
    monkeypatch.setattr(clip_jax.pretrained, "read_weights", lambda source, **_: stand_in)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 50), "brown").save("dog.jpg")
    found = {}
    exec(example, found)
    shares = [value for value in found.values() if isinstance(value, jax.Array) and value.shape == (1, 2)]
    assert any(math.isclose(float(share.sum()), 1, rel_tol=1e-5) for share in shares)
