"""Weights in and out of other projects' layouts: equal to the bit, refused by name, proven by the other library."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from random_weights import random_like
from references import import_open_clip
from torch_clip import torch_clip

from clip_jax import cli
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizer import tokenize
from clip_jax.errors import UserError
from clip_jax.interop import export as export_module
from clip_jax.interop.export import LAYOUTS, Classes, export, features_of
from clip_jax.interop.hugging_face import (
    config_to_hugging_face,
    preprocess_to_hugging_face,
    read_hugging_face,
    write_hugging_face,
)
from clip_jax.interop.names import from_torch, source_of, to_torch
from clip_jax.interop.open_clip import (
    CONFIG,
    SAFETENSORS,
    _mlp_ratio,
    config_to_open_clip,
    read_open_clip,
    write_open_clip,
)
from clip_jax.interop.openai import infer_config, read_openai, write_openai
from clip_jax.interop.read import read_weights
from clip_jax.interop.torch_write import write_torch_file
from clip_jax.interop.weights import Weights, facts, read_safetensors, write_safetensors
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.variants import VARIANTS, ModelConfig, ResNetConfig, TextConfig, ViTConfig, model_config
from clip_jax.rules import leaf_paths

TEXT = TextConfig(width=64, heads=1, layers=1, context=10, vocab_size=80)
CONFIGS = {
    "vit": ModelConfig(24, ViTConfig(image_size=32, patch=8, width=128, heads=2, layers=2), TEXT),
    "other MLPs": ModelConfig(
        24,
        ViTConfig(image_size=32, patch=8, width=128, heads=2, layers=1, mlp_width=630),
        dataclasses.replace(TEXT, mlp_width=100),
    ),
    "resnet": ModelConfig(24, ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 2, 1, 1)), TEXT),
}
READERS = {
    "openai": lambda folder: read_openai(folder / "model.pt"),
    "open_clip": read_open_clip,
    "hugging_face": read_hugging_face,
}
WRITERS = {
    "openai": lambda folder, weights: write_openai(folder / "model.pt", weights),
    "open_clip": write_open_clip,
    "hugging_face": write_hugging_face,
}
REFUSED = {
    ("resnet", "hugging_face"): "has no ResNets",
    ("other MLPs", "openai"): "takes MLPs four times as wide as their tower for granted",
}
PAIRS = [(kind, layout) for kind in CONFIGS for layout in READERS if (kind, layout) not in REFUSED]


@functools.cache
def weights_of(kind, seed=0):
    config = CONFIGS[kind]
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0)))
    return Weights(config, random_like(shapes, dtype=np.float32, seed=seed), Preprocess(size=config.vision.image_size))


def assert_same(found, expected):
    assert found.config == expected.config
    assert found.preprocess == expected.preprocess
    assert leaf_paths(found.variables) == leaf_paths(expected.variables)
    for path, a, b in zip(
        leaf_paths(found.variables), *map(jax.tree.leaves, (found.variables, expected.variables)), strict=True
    ):
        assert a.dtype == np.float32, path
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_every_parameter_has_a_name_of_its_own_for_hugging_face():
    paths = [path.split("/", 1)[1] for path in leaf_paths(weights_of("vit").variables)]
    names = [name for path in paths for name in source_of(path, "hugging_face").names]
    assert len(set(names)) == len(names) > len(paths)  # a kernel of all three projections is three of theirs


@pytest.mark.parametrize("name", [*VARIANTS, "other MLPs"])
def test_openais_shapes_imply_the_model(name):
    """And every parameter has a name of its own."""
    config = CONFIGS.get(name) or model_config(name)
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0)))
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float16(0), leaf.shape), shapes)
    tensors = {}
    for path, leaf in zip(leaf_paths(shapes), jax.tree.leaves(empty), strict=True):
        source = source_of(path.split("/", 1)[1], "openai")
        (name_of_theirs,) = source.names
        assert name_of_theirs not in tensors
        tensors[name_of_theirs] = source.layout.to_torch(leaf)
    assert infer_config(tensors, where="here") == config


@pytest.mark.parametrize(("kind", "layout"), PAIRS)
def test_what_is_written_is_read_to_the_bit(kind, layout, tmp_path):
    WRITERS[layout](tmp_path, weights_of(kind))
    assert_same(READERS[layout](tmp_path), weights_of(kind))


def test_every_width_of_an_mlp_is_a_ratio_that_open_clip_makes_it_of():
    """open_clip takes int(width * ratio); the nearest ratio loses a channel of 1 width in 25."""
    widths = [(width, mlp) for width in [*range(1, 130), 1408, 1664, 1792] for mlp in range(1, 10 * width, 7)]
    for width, mlp in widths:
        written = json.loads(json.dumps(_mlp_ratio(ViTConfig(32, 8, width, 1, 1, mlp))))
        assert int(width * written.get("mlp_ratio", 4.0)) == mlp
        assert len(written) == (mlp != 4 * width)


def test_gelu_and_other_pixels_travel(tmp_path):
    for layout in ("open_clip", "hugging_face"):
        weights = weights_of("vit")
        config = dataclasses.replace(weights.config, activation="gelu")
        preprocess = Preprocess(size=32, mean=(0.5, 0.25, 0.125), std=(0.5, 1.0, 2.0))
        other = Weights(config, weights.variables, preprocess)
        (tmp_path / layout).mkdir()
        WRITERS[layout](tmp_path / layout, other)
        assert_same(read_weights(tmp_path / layout), other)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_half_precision_archives_of_openai(kind, tmp_path):
    """A TorchScript archive in float16, as OpenAI's are, and a plain state dict in float16."""
    import_open_clip()
    import torch

    weights = weights_of(kind)
    rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), weights.variables)
    expected = dataclasses.replace(weights, variables=rounded)
    model = torch_clip(weights.config, rounded)
    given = torch.zeros((1, 3, 32, 32)), torch.zeros((1, TEXT.context), dtype=torch.int32)
    with pytest.warns():  # torch deprecates torch.jit, in which OpenAI's files are
        torch.jit.trace(model, given, check_trace=False).half().save(tmp_path / "traced.pt")
    assert_same(read_weights(tmp_path / "traced.pt"), expected)
    torch.save(
        {name: x.half() if x.is_floating_point() else x for name, x in model.state_dict().items()}, tmp_path / "p.pt"
    )
    assert_same(read_weights(tmp_path / "p.pt"), expected)


def test_a_trainers_checkpoint_wants_its_activation(tmp_path):
    """open_clip's has GELU unless the model's name says otherwise, and the file has neither."""
    torch = pytest.importorskip("torch")
    weights = weights_of("vit")
    state = {f"module.{name}": torch.tensor(value) for name, value in to_torch(weights.variables, "openai").items()}
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {}}, path)
    with pytest.raises(UserError, match=r"epoch_1.pt is a trainer's checkpoint.* --activation=gelu"):
        read_weights(path)
    for activation in ("gelu", "quick_gelu"):
        config = dataclasses.replace(weights.config, activation=activation)
        assert_same(read_weights(path, activation=activation), dataclasses.replace(weights, config=config))
    cli.main(["export", str(path), str(tmp_path / "folder"), "--layout=open_clip", "--activation=gelu"])
    assert read_weights(tmp_path / "folder").config.activation == "gelu"
    with pytest.raises(UserError, match="folder says that its activation is gelu, not quick_gelu"):
        read_weights(tmp_path / "folder", activation="quick_gelu")


def test_heads_that_a_file_does_not_say_are_not_guessed(tmp_path):
    """open_clip's ViT-H has 16 heads, and OpenAI's rule would make 20 of its width."""
    vision = ViTConfig(image_size=8, patch=8, width=1280, heads=16, layers=1, mlp_width=8)
    config = ModelConfig(8, vision, TEXT, activation="gelu")
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0)))
    weights = Weights(config, random_like(shapes, dtype=np.float32), Preprocess(size=8))
    path = tmp_path / "open_clip_pytorch_model.bin"
    write_torch_file(path.with_suffix(".pt"), to_torch(weights.variables, "openai"))
    with pytest.raises(UserError, match=r"does not say how many attention heads .* 1280 wide .* beside the model's"):
        read_weights(path.with_suffix(".pt"), activation="gelu")
    path.with_suffix(".pt").rename(path)
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": config_to_open_clip(weights)["model_cfg"]}))
    assert_same(read_weights(tmp_path), weights)
    guessed = dataclasses.replace(config, activation="quick_gelu", vision=dataclasses.replace(vision, heads=20))
    with pytest.raises(UserError, match=r"takes attention heads of 64 channels and ViTs at most 1024 wide"):
        write_openai(path, dataclasses.replace(weights, config=guessed))


@pytest.mark.parametrize(
    ("layout", "name"), [("open_clip", "open_clip_pytorch_model.bin"), ("hugging_face", "pytorch_model.bin")]
)
def test_older_folders_hold_a_bin(layout, name, tmp_path):
    weights = weights_of("vit")
    WRITERS[layout](tmp_path, weights)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    write_torch_file(tmp_path / name, to_torch(weights.variables, "openai" if layout == "open_clip" else layout))
    assert_same(read_weights(tmp_path), weights)


def test_of_two_layouts_in_a_folder_the_one_with_weights_is_read(tmp_path):
    """As in a copy of a Hub repository that was made without open_clip's file."""
    weights = weights_of("vit")
    write_open_clip(tmp_path, weights)
    write_hugging_face(tmp_path, weights)
    assert_same(read_weights(tmp_path), weights)
    (tmp_path / SAFETENSORS).unlink()
    assert_same(read_weights(tmp_path), weights)


def test_reading_needs_neither_torch_nor_its_friends(tmp_path):
    for layout in READERS:
        (tmp_path / layout).mkdir()
        WRITERS[layout](tmp_path / layout, weights_of("vit"))
    script = f"""
import sys
for name in ("torch", "open_clip", "transformers", "torchvision", "tensorflow"):
    sys.modules[name] = None
import pickle
pickle.loads = pickle.load = pickle.Unpickler = pickle._Unpickler = None
import clip_jax
for source in ("openai/model.pt", "open_clip", "hugging_face"):
    model = clip_jax.load("{tmp_path}/" + source)
    assert model.encode_text([[78, 5, 79]], normalize=True).shape == (1, 24)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


CHANGES = [
    (lambda t: [t.pop("visual.proj"), t.pop("ln_final.bias")], r"here lacks ln_final\.bias, visual\.proj$"),
    (lambda t: t.update(more=np.ones(2, np.float32)), r"here has unknown tensors: more$"),
    (lambda t: t.update(logit_scale=np.ones(2, np.float32)), r"here: logit_scale has shape \[2\], and .* \[\]$"),
    (lambda t: t.update(logit_scale=np.ones((), np.int32)), r"here: logit_scale holds int32, not floats$"),
    (lambda t: t["ln_final.bias"].__setitem__(3, np.nan), r"here: 1 of the 64 values in ln_final\.bias are not finite"),
    (lambda t: t["visual.proj"].__setitem__(3, np.inf), r"here: 24 of the 3,072 values in visual\.proj are not finite"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_wrong_tensors_are_refused_by_name(change, message):
    tensors = to_torch(weights_of("vit").variables, "openai")
    change(tensors)
    with pytest.raises(UserError, match=message):
        from_torch(tensors, CONFIGS["vit"], "openai", where="here")


def edit(path, *keys, value):
    values = json.loads(path.read_text())
    section = functools.reduce(lambda inner, key: inner[key], keys[:-1], values)
    section[keys[-1]] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("layout", "file", "keys", "value", "message"),
    [
        ("open_clip", CONFIG, ("model_cfg", "quick_gelu"), False, "trained with the activation quick_gelu.*says gelu"),
        ("open_clip", CONFIG, ("model_cfg", "embed_dim"), 25, r"visual\.proj has shape \[128, 24\].*\[128, 25\]"),
        ("open_clip", CONFIG, ("model_cfg", "embed_dim"), "24", r"config\.model\.embed_dim"),
        ("open_clip", CONFIG, ("model_cfg", "custom_text"), True, "model_cfg.custom_text is True"),
        ("open_clip", CONFIG, ("model_cfg", "vision_cfg", "timm_model_name"), "x", "timm_model_name is 'x'"),
        (
            "open_clip",
            CONFIG,
            ("model_cfg", "vision_cfg", "layers"),
            3,
            r"lacks visual\.transformer\.resblocks\.2\..* and 6 more",
        ),
        (
            "open_clip",
            CONFIG,
            ("model_cfg", "vision_cfg", "layers"),
            [1, 2],
            r"layers is \[1, 2\]; it must be a tuple of 4",
        ),
        ("open_clip", CONFIG, ("model_cfg", "vision_cfg", "head_width"), 0, "does not describe a CLIP model"),
        ("open_clip", CONFIG, ("model_cfg", "vision_cfg", "image_size"), [], "does not describe a CLIP model"),
        ("open_clip", CONFIG, ("model_cfg", "text_cfg", "pool_type"), "last", "text_cfg.pool_type is 'last'"),
        ("open_clip", CONFIG, ("preprocess_cfg", "resize_mode"), "squash", "resize_mode is 'squash'"),
        ("open_clip", CONFIG, ("preprocess_cfg", "mean"), [1, 2], "does not describe a CLIP model"),
        ("open_clip", CONFIG, ("model_cfg",), 3, "does not describe a CLIP model"),
        ("hugging_face", "config.json", ("model_type",), "siglip", "model_type is 'siglip', not 'clip'"),
        ("hugging_face", "config.json", ("text_config", "hidden_act"), "gelu", "hidden_act is 'gelu' in text_config"),
        (
            "hugging_face",
            "config.json",
            ("vision_config_dict",),
            {"hidden_act": "gelu", "eos_token_id": None},
            "hidden_act is 'quick_gelu' in text_config and 'gelu' in vision_config",
        ),
        ("hugging_face", "config.json", ("text_config", "eos_token_id"), 7, "eos_token_id is 7; CLIP's captions"),
        ("hugging_face", "config.json", ("text_config", "vocab_size"), "49408", "vocab_size is '49408'"),
        ("hugging_face", "config.json", ("text_config", "hidden_act"), "silu", "hidden_act is 'silu'"),
        ("hugging_face", "config.json", ("vision_config", "layer_norm_eps"), 1e-6, "layer_norm_eps is 1e-06"),
        ("hugging_face", "config.json", ("vision_config", "intermediate_size"), 5, r"fc1.* has shape \[512"),
        ("hugging_face", "config.json", ("text_config", "intermediate_size"), -1, "mlp_width is -1; it must not be"),
        ("open_clip", CONFIG, ("model_cfg", "vision_cfg", "mlp_ratio"), 5, r"c_fc.* has shape \[512.*\[640"),
        ("open_clip", CONFIG, ("model_cfg", "text_cfg", "mlp_ratio"), "4", "does not describe a CLIP model"),
        ("open_clip", CONFIG, ("model_cfg", "text_cfg", "mlp_ratio"), 0.01, "mlp_ratio 0.01 leaves no channel"),
        ("open_clip", CONFIG, ("model_cfg", "text_cfg", "mlp_ratio"), 1e30, "mlp_width is 64.*; it must be at most"),
        ("hugging_face", "config.json", ("text_config",), 3, "text_config is 3, not an object"),
        ("hugging_face", "config.json", ("text_config", "intermediate_size"), 0, "intermediate_size is 0"),
        ("hugging_face", "config.json", ("vision_config", "patch_size"), 7, r"image_size is 32; it must be a multiple"),
        ("hugging_face", "preprocessor_config.json", ("resample",), 2, "resample is 2"),
        ("hugging_face", "preprocessor_config.json", ("size",), {"height": 32, "width": 32}, "size is"),
        ("hugging_face", "preprocessor_config.json", ("rescale_factor",), 1 / 127.5, "rescale_factor is 0.0078"),
        ("hugging_face", "preprocessor_config.json", ("image_mean",), ["a", 1, 2], "three numbers"),
    ],
)
def test_configs_that_are_not_these_weights_are_refused(layout, file, keys, value, message, tmp_path):
    WRITERS[layout](tmp_path, weights_of("vit"))
    edit(tmp_path / file, *keys, value=value)
    with pytest.raises(UserError, match=message) as caught:
        read_weights(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_pixels_as_transformers_5_writes_them(tmp_path):
    """In a file of CLIPProcessor's, which comes before the image processor's own."""
    weights = weights_of("vit")
    other = dataclasses.replace(weights, preprocess=Preprocess(size=32, mean=(0.5, 0.25, 0.125)))
    write_hugging_face(tmp_path, weights)
    values = {"processor_class": "CLIPProcessor", "image_processor": preprocess_to_hugging_face(other.preprocess)}
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    assert_same(read_weights(tmp_path), other)
    edit(tmp_path / "processor_config.json", "image_processor", "do_resize", value=False)
    with pytest.raises(UserError, match=r"processor_config\.json: do_resize is False"):
        read_weights(tmp_path)


def test_weights_in_several_files(tmp_path):
    weights = weights_of("vit")
    write_hugging_face(tmp_path, weights)
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        write_safetensors(tmp_path / file, {name: tensors[name] for name in tensors if places[name] == file})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(read_weights(tmp_path), weights)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors cannot be read"):
        read_weights(tmp_path)
    edit(index, "weight_map", "logit_scale", value="../model.safetensors")
    with pytest.raises(UserError, match=r"index.json has no weight_map that names the files beside it"):
        read_weights(tmp_path)


def test_both_activations_changed_together_are_refused_by_the_weights(tmp_path):
    write_hugging_face(tmp_path, weights_of("vit"))
    for section in ("text_config", "vision_config"):
        edit(tmp_path / "config.json", section, "hidden_act", value="gelu")
    with pytest.raises(UserError, match=r"trained with the activation quick_gelu.*says gelu"):
        read_weights(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 9, 300, 5_000, -1])
def test_truncated_safetensors(keep, tmp_path):
    write_open_clip(tmp_path, weights_of("vit"))
    path = tmp_path / SAFETENSORS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"open_clip_model\.safetensors cannot be read as safetensors: \w"):
        read_weights(tmp_path)


def test_a_git_lfs_pointer_is_known(tmp_path):
    write_open_clip(tmp_path, weights_of("vit"))
    (tmp_path / SAFETENSORS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"safetensors is a Git LFS pointer, .*; run git lfs pull$"):
        read_weights(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '"' * 3, "[" * 100_000])
def test_damaged_configs(text, tmp_path):
    write_open_clip(tmp_path, weights_of("vit"))
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError, match=r"open_clip_config\.json (cannot be read as JSON|holds a list)"):
        read_weights(tmp_path)


def test_sources_that_are_none_say_what_would_be(tmp_path):
    with pytest.raises(UserError, match=r"^'ViT-B/23' is neither .*did you mean 'ViT-B/32'\?.*RN50x64"):
        read_weights("ViT-B/23")
    with pytest.raises(UserError, match="holds no weights: neither open_clip_config.json"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="alone does not say which model it is"):
        read_weights(tmp_path / "model.safetensors")
    write_open_clip(tmp_path, weights_of("vit"))
    (tmp_path / SAFETENSORS).unlink()
    with pytest.raises(UserError, match="has neither open_clip_model.safetensors nor open_clip_pytorch_model.bin"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for layout in LAYOUTS for kind in CONFIGS if (kind, layout) != ("other MLPs", "stablehlo")],
)
def test_exports_prove_themselves(kind, layout, tmp_path, capsys):
    import_open_clip()  # makes torchvision importable, and open_clip and transformers with it
    source = tmp_path / "source"
    source.mkdir()
    write_open_clip(source, weights_of(kind))
    folder = tmp_path / "exports" / layout
    if (kind, layout) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[kind, layout]):
            export(weights_of(kind), folder, layout, source="here")
        assert list(folder.parent.iterdir()) == []
        return
    cli.main(["export", str(source), str(folder), "--layout", layout])
    shown = capsys.readouterr().out
    readers = {"openai": "open_clip", "open_clip": "open_clip", "hugging_face": "transformers", "stablehlo": "clip_jax"}
    assert f"read by {readers[layout]}" in shown
    card = (folder / "README.md").read_text()
    assert f"| {readers[layout]} " in card
    assert f"`{source}`" in card
    assert [path.name for path in folder.parent.iterdir()] == [layout]
    print(f"{kind}, {layout}: {shown}")


def test_an_export_that_is_not_the_original_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "BOUND", -1.0)
    with pytest.raises(UserError, match=r"not the original: read by clip_jax, .* nothing was kept"):
        export(weights_of("vit"), tmp_path / "new", "open_clip", source="here")
    assert list(tmp_path.iterdir()) == []


def test_a_verdict_of_another_library_counts(tmp_path, monkeypatch):
    def judge(folder, images, tokens):
        image, text = features_of(weights_of("vit"), export_module._fixed_input(weights_of("vit")))
        return export_module.judges.Verdict("another 1.0", image, text + np.float32(2e-4))

    monkeypatch.setitem(LAYOUTS, "open_clip", LAYOUTS["open_clip"]._replace(judge=judge))
    with pytest.raises(UserError, match=r"read by another 1\.0, its unit features differ by 2\.0e-04, more than 1e-04"):
        export(weights_of("vit"), tmp_path / "new", "open_clip", source="here")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_read_an_export_counts(tmp_path, monkeypatch):
    def judge(folder, images, tokens):
        raise KeyError("visual.proj")

    monkeypatch.setitem(LAYOUTS, "open_clip", LAYOUTS["open_clip"]._replace(judge=judge))
    with pytest.raises(UserError, match=r"cannot read the export: 'visual\.proj'; nothing was kept"):
        export(weights_of("vit"), tmp_path / "new", "open_clip", source="here")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_be_imported_is_no_judge(tmp_path, monkeypatch):
    """Such as transformers beside a torchvision of another torch."""
    transformers = pytest.importorskip("transformers")

    def fail(name):
        raise ModuleNotFoundError(f"Could not import module {name!r}")

    monkeypatch.delitem(vars(transformers), "CLIPModel", raising=False)
    monkeypatch.setattr(type(transformers), "__getattr__", lambda self, name: fail(name))
    ((reader, _),) = export(weights_of("vit"), tmp_path / "new", "hugging_face", source="here")
    assert reader == "clip_jax"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import safetensors
    import safetensors.numpy

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(UserError, match=r"safetensors cannot be written: I/O error: No space left"):
        export(weights_of("vit"), tmp_path / "new", "open_clip", source="here")
    assert list(tmp_path.iterdir()) == []


def test_a_bias_travels_in_open_clips_layout_alone(tmp_path):
    import_open_clip()
    weights = weights_of("vit")
    bias = dataclasses.replace(
        weights,
        config=dataclasses.replace(weights.config, logit_bias=True, initial_bias=-7.0),
        variables=weights.variables | {"params": weights.variables["params"] | {"logit_bias": np.float32(-9.5)}},
    )
    ((reader, _), (other, difference)) = export(bias, tmp_path / "new", "open_clip", source="here")
    assert (reader, other.split()[0]) == ("clip_jax", "open_clip")
    assert difference <= 1e-5
    found = read_weights(tmp_path / "new")
    assert_same(found, bias)
    assert facts(found)["logit_bias"] == "-9.5000"
    with pytest.raises(UserError, match="has no logit_bias"):
        export(bias, tmp_path / "hugging_face", "hugging_face", source="here")
    with pytest.raises(UserError, match="takes logits without a bias for granted"):
        export(bias, tmp_path / "openai", "openai", source="here")
    write_torch_file(tmp_path / "siglip.pt", to_torch(bias.variables, "openai"))  # as open_clip's trainer with --siglip
    assert facts(read_weights(tmp_path / "siglip.pt"))["logit_bias"] == "-9.5000"
    export(bias, tmp_path / "stablehlo", "stablehlo", source="here")


def test_exports_refuse_what_they_cannot_hold(tmp_path):
    weights = weights_of("vit")
    gelu = dataclasses.replace(weights, config=dataclasses.replace(weights.config, activation="gelu"))
    heads = dataclasses.replace(
        weights, config=dataclasses.replace(weights.config, text=dataclasses.replace(TEXT, heads=2))
    )
    pixels = dataclasses.replace(weights, preprocess=Preprocess(size=32, mean=(0.5, 0.5, 0.5)))
    for wrong, message in ((gelu, "QuickGELU"), (heads, "heads of 64 channels"), (pixels, "mean and deviation")):
        with pytest.raises(UserError, match=rf"OpenAI's layout takes .*{message}"):
            export(wrong, tmp_path / "new", "openai", source="here")
    with pytest.raises(UserError, match=r"no layout 'openclip'; did you mean 'open_clip'\?"):
        export(weights, tmp_path / "new", "openclip", source="here")
    with pytest.raises(UserError, match="exists, and nothing is written over"):
        export(weights, tmp_path, "open_clip", source="here")
    classes = Classes(("a",), np.eye(1, 24))
    with pytest.raises(UserError, match="open_clip has no place for classes"):
        export(weights, tmp_path / "new", "open_clip", source="here", classes=classes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"new cannot be written: .*file"):
        export(weights_of("vit"), tmp_path / "file" / "new", "open_clip", source="here")


def test_transformers_loads_tokenizer_and_pixels_offline(tmp_path):
    """The files beside the weights: ids of plain captions, padding aside, and the preprocessing."""
    import_open_clip()
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIGS["vit"], text=dataclasses.replace(TEXT, vocab_size=49_408, context=77))
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0)))
    write_hugging_face(tmp_path, Weights(config, random_like(shapes, dtype=np.float32), Preprocess(size=32)))
    captions = ["a photo of a dog.", "It's 1 of 22 cafés; naïve, isn't it?", "", "ab " * 100]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    theirs = np.array(tokenizer(captions, padding="max_length", truncation=True)["input_ids"])
    ours = tokenize(captions)
    ends = ours.argmax(axis=1)
    assert theirs.shape == ours.shape
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(theirs[row, : end + 1], ours[row, : end + 1])
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    images = processor(pixels, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    assert np.abs(images[0] - read_weights(tmp_path).preprocess(pixels)).max() <= 2 / 255 / 0.26


def test_a_stablehlo_export_with_classes(tmp_path, capsys):
    """A name may be there twice: two of ImageNet's classes are called missile, and two sunglasses."""
    source, folder = tmp_path / "source", tmp_path / "programs"
    source.mkdir()
    weights = weights_of("vit")
    config = dataclasses.replace(weights.config, text=dataclasses.replace(TEXT, vocab_size=49_408))
    shapes = jax.eval_shape(lambda: init_variables(CLIP(config), jax.random.key(0)))
    write_open_clip(source, Weights(config, random_like(shapes, dtype=np.float32), weights.preprocess))
    (tmp_path / "names.txt").write_text("cat\ndog\n\ncat\n")
    cli.main(["export", str(source), str(folder), "--layout=stablehlo", f"--classes={tmp_path / 'names.txt'}"])
    from clip_jax.interop.stablehlo import read_stablehlo

    exported = read_stablehlo(folder)
    assert exported.manifest["classes"] == ["cat", "dog", "cat"]
    assert exported.classify(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 3)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout=open_clip", "--prompts=photo"], "--prompts has no meaning without --classes"),
        (["--layout=stablehlo", "--classes={empty}"], "empty.txt holds nothing; there must be a text on each line"),
        (
            ["--layout=stablehlo", "--classes={names}", "--prompts=phot"],
            "--prompts: no template set 'phot'; did you mean",
        ),
    ],
)
def test_mistakes_of_an_export_are_one_line(arguments, message, tmp_path, capsys):
    write_open_clip(tmp_path, weights_of("vit"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    files = {name: tmp_path / f"{name}.txt" for name in ("empty", "names")}
    given = [argument.format(**files) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(tmp_path), str(tmp_path / "out"), *given])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_inspect_says_what_weights_are(tmp_path, capsys):
    write_open_clip(tmp_path, weights_of("resnet"))
    cli.main(["inspect", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "model: custom (resnet 8 x 1-2-1-1 at 32 px, text 64 x 1, embedding 24)" in shown
    assert "activation: quick_gelu" in shown
    assert "exp(logit_scale): 20.0000" in shown
    found = facts(weights_of("other MLPs"))["model"]
    assert found == "custom (vit 128 x 1 (MLP 630) at 32 px, text 64 x 1 (MLP 100), embedding 24)"


def test_config_to_hugging_face_is_clipconfigs(tmp_path):
    import_open_clip()
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig.from_dict(config_to_hugging_face(model_config("ViT-B/32"))).to_dict()
    default = transformers.CLIPConfig().to_dict()
    for section in ("text_config", "vision_config"):
        differing = {key for key in default[section] if config[section].get(key) != default[section][key]}
        assert differing <= {"pad_token_id"}
