"""The StableHLO export: one artifact equals the model at every batch size, runs without clip_jax, refuses damage."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import export
from tiny import TINY

from clip_jax.data.images import Preprocess
from clip_jax.errors import UserError
from clip_jax.interop import stablehlo
from clip_jax.interop.stablehlo import PLATFORMS, read_stablehlo, write_stablehlo
from clip_jax.interop.stablehlo_run import read_weights
from clip_jax.models.clip import CLIP, image_features, init_variables, text_features
from clip_jax.models.variants import ResNetConfig

VIT = TINY.model
RESNET = dataclasses.replace(VIT, vision=ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 1, 1, 1)))
MODELS = {
    "vit": VIT,
    "vit-bf16-gelu-remat": dataclasses.replace(VIT, dtype="bfloat16", activation="gelu", remat="full"),
    "vit-scan": dataclasses.replace(VIT, scan_layers=True),
    "resnet": RESNET,
    "resnet-bf16": dataclasses.replace(RESNET, dtype="bfloat16"),
}
PREPROCESS = Preprocess(size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
CLASSES = ("zero", "élan", "seven")
FILES = (
    "encode_image.jaxexport",
    "encode_text.jaxexport",
    "run.py",
    "stablehlo.json",
    "weights.safetensors",
    "zero_shot_head.jaxexport",
)
JAX_AND_ITS_REQUIREMENTS = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum")


def random_variables(model):
    """Variables of which none is what it starts as; variances are positive, the scale is 1/0.07."""

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        name = path[-1].key
        return jnp.asarray(2.66 if name == "logit_scale" else 0.5 + abs(values) if name == "var" else 0.4 * values)

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(config, batch):
    """Images of sixteen plain squares, and token ids."""
    rng = np.random.default_rng(batch)
    size, text = config.vision.image_size, config.text
    images = rng.integers(0, 256, (batch, 4, 4, 3), np.uint8).repeat(size // 4, axis=1).repeat(size // 4, axis=2)
    return images, rng.integers(0, text.vocab_size, (batch, text.context), np.int32)


def unit_rows(rows, width=VIT.embed_dim):
    weights = np.random.default_rng(rows).standard_normal((rows, width))
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def probabilities(features, weights, scale):
    """The zero-shot head in float64."""
    logits = np.exp(np.float64(scale)) * (np.asarray(features, np.float64) @ np.asarray(weights, np.float64).T)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """(model, variables, preprocess, folder) of each kind of model."""
    model = CLIP(MODELS[request.param])
    variables, folder = random_variables(model), tmp_path_factory.mktemp(request.param) / "export"
    preprocess = dataclasses.replace(PREPROCESS, size=model.config.vision.image_size)
    write_stablehlo(folder, model, variables, preprocess=preprocess)
    return model, variables, preprocess, folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = CLIP(VIT)
    write_stablehlo(folder, model, random_variables(model), classes=CLASSES, class_weights=unit_rows(3))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A ViT's export with classes, to be damaged."""
    return shutil.copytree(original, tmp_path / "export")


def test_one_artifact_equals_the_model_at_every_batch_size(exported):
    model, variables, preprocess, folder = exported
    read = read_stablehlo(folder)
    mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
    image_tower = jax.jit(lambda images: image_features(model, variables, images))
    text_tower = jax.jit(lambda tokens: text_features(model, variables, tokens))
    bound = 1e-6 if model.config.dtype == "float32" else 1e-2
    # Jitted on CPUs by jaxlib 0.11.2, this bfloat16 ResNet is NaN from 8 images on, exported or not (YNNPACK fusions).
    for batch in (1, 3) if model.config == MODELS["resnet-bf16"] else (1, 3, 8):
        images, tokens = inputs(model.config, batch)
        normalised = (images / np.float32(255) - mean) / std
        image, text = read.encode_image(images), read.encode_text(tokens)
        assert image.dtype == text.dtype == jnp.float32
        assert image.shape == text.shape == (batch, model.config.embed_dim)
        np.testing.assert_allclose(image, image_tower(jnp.asarray(normalised)), rtol=0, atol=bound)
        np.testing.assert_allclose(text, text_tower(jnp.asarray(tokens)), rtol=0, atol=bound)
        np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-6)
        if batch > 1:  # the inputs are told apart
            assert min(np.ptp(features, axis=0).max() for features in (image, text)) > 1e-2


def test_head_equals_its_definition_for_any_number_of_classes(exported):
    _, variables, _, folder = exported
    read = read_stablehlo(folder)
    for images, classes in ((1, 1), (5, 2), (2, 7)):
        features, weights = unit_rows(images), unit_rows(classes)
        found = read.zero_shot_head(features, weights)
        expected = probabilities(features, weights, variables["params"]["logit_scale"])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_classify_ranks_the_exported_classes(original):
    read = read_stablehlo(original)
    images, _ = inputs(VIT, 4)
    scale = read.weights["params/logit_scale"]
    expected = probabilities(read.encode_image(images), unit_rows(3), scale)
    np.testing.assert_allclose(read.classify(images), expected, rtol=0, atol=1e-6)
    assert read.manifest["classes"] == list(CLASSES)


def test_without_classes_classify_says_what_to_do(exported):
    *_, folder = exported
    with pytest.raises(ValueError, match="exported without classes"):
        read_stablehlo(folder).classify(inputs(MODELS["vit"], 1)[0])


def test_runs_where_nothing_but_jax_and_flatbuffers_is_installed(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "elsewhere")
    images, _ = inputs(VIT, 3)
    np.save(tmp_path / "images.npy", images)
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in (*JAX_AND_ITS_REQUIREMENTS, "flatbuffers"):
        (packages / name).symlink_to(Path(find_spec(name).origin).parent)
    done = subprocess.run(
        [sys.executable, "-S", "-W", "error", folder / "run.py", "images.npy"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(packages), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = np.array([[float(value) for value in line.split()] for line in done.stdout.splitlines()])
    np.testing.assert_allclose(printed, read_stablehlo(folder).classify(images), rtol=0, atol=1e-6)


def test_weights_are_written_once_and_every_one_is_used(exported):
    _, variables, _, folder = exported
    weights = safetensors.numpy.load_file(folder / "weights.safetensors")
    manifest = json.loads((folder / "stablehlo.json").read_text())
    taken = [set(program["weights"]) for program in manifest["programs"].values()]
    assert set.union(*taken) == set(weights)
    assert set.intersection(*taken) == {"params/logit_scale"}
    values = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert sum(array.size for array in weights.values()) == values
    by_runner = read_weights(folder / "weights.safetensors")  # which does without the safetensors library
    assert set(by_runner) == set(weights)
    for name, array in by_runner.items():
        np.testing.assert_array_equal(array, weights[name], strict=True)


def test_programs_hold_no_weights(tmp_path):
    """Four times as wide, twelve times as many weights: the weights' file grows, and nothing else."""
    sizes = []
    for name, width in (("narrow", 32), ("wide", 128)):
        tower = {"width": width, "heads": 2}
        config = dataclasses.replace(
            VIT, vision=dataclasses.replace(VIT.vision, **tower), text=dataclasses.replace(VIT.text, **tower)
        )
        variables = random_variables(CLIP(config))
        write_stablehlo(tmp_path / name, CLIP(config), variables)
        weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(variables))
        total = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        sizes.append((weights, total - weights))
    (narrow, narrow_rest), (wide, wide_rest) = sizes
    assert wide > 8 * narrow
    assert abs(wide_rest - narrow_rest) < 2_000
    assert wide_rest < 120_000


def test_every_program_is_lowered_for_every_platform_with_no_foreign_code(exported):
    *_, folder = exported
    for program in read_stablehlo(folder).programs.values():
        assert program.platforms == ("cpu", "cuda", "tpu")
        assert program.nr_devices == 1
        calls = set(re.findall(r"custom_call @(\w+)", program.mlir_module()))
        assert calls <= {"shape_assertion"}
        assert not program.has_vjp()


def test_a_tpu_export_is_refused_here_by_platform(tmp_path):
    model = CLIP(VIT)
    write_stablehlo(tmp_path, model, random_variables(model), platforms=("tpu", "cuda"))
    with pytest.raises(UserError, match=r"encode_image\.jaxexport was exported for tpu, cuda; JAX runs on cpu here"):
        read_stablehlo(tmp_path)


def test_programs_hold_no_path_of_the_machine_that_wrote_them(exported):
    *_, folder = exported
    for path in folder.glob("*.jaxexport"):
        assert b".py" not in path.read_bytes()
    assert jax.config.jax_traceback_in_locations_limit > 0  # as it was


def test_two_exports_are_equal_in_every_byte(original, tmp_path):
    model = CLIP(VIT)
    write_stablehlo(tmp_path, model, random_variables(model), classes=CLASSES, class_weights=unit_rows(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == list(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (original / name).read_bytes(), name


def test_whoever_may_read_one_file_may_read_all(original):
    assert len({path.stat().st_mode for path in original.iterdir()}) == 1


def test_manifest_says_what_goes_in_and_out(original):
    manifest = json.loads((original / "stablehlo.json").read_text(encoding="utf-8"))
    inputs_of = {name: program["inputs"] for name, program in manifest["programs"].items()}
    assert inputs_of == {
        "encode_image": {"images": {"dtype": "uint8", "shape": ["b", 16, 16, 3]}},
        "encode_text": {"tokens": {"dtype": "int32", "shape": ["b", 12]}},
        "zero_shot_head": {
            "features": {"dtype": "float32", "shape": ["b", 16]},
            "class_weights": {"dtype": "float32", "shape": ["c", 16]},
        },
    }
    outputs = {name: program["output"] for name, program in manifest["programs"].items()}
    features = {"dtype": "float32", "shape": ["b", 16]}
    assert outputs == {
        "encode_image": features,
        "encode_text": features,
        "zero_shot_head": {"dtype": "float32", "shape": ["b", "c"]},
    }
    assert manifest["image"] == Preprocess(size=16).to_dict()
    assert manifest["text"] == {"context": 12, "vocab_size": 128, "tokenizer": "clip"}
    assert (manifest["activation"], manifest["dtype"], manifest["model"]) == ("quick_gelu", "float32", "custom")
    assert manifest["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("method", "shape", "dtype"),
    [
        ("encode_image", (2, 16, 16, 3), np.float32),  # normalised already
        ("encode_image", (2, 8, 8, 3), np.uint8),
        ("encode_text", (2, 5), np.int32),
    ],
)
def test_wrong_inputs_are_refused(original, method, shape, dtype):
    with pytest.raises(ValueError, match="(Dtype|Shape) mismatch"):
        getattr(read_stablehlo(original), method)(np.zeros(shape, dtype))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)} is missing"):
        read_stablehlo(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name != "stablehlo.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_file_is_named(folder, name, damage):
    content = bytearray((folder / name).read_bytes())
    if damage == "cut":
        del content[-1]
    else:
        content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is damaged: its sha256"):
        read_stablehlo(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"zero"', '"nine"', "is not what was written"),
        ('"sha256"', '"sha"', "is not what was written"),
        ('"format_version": 1', '"format_version": 2', "has format version 2, and this clip_jax reads 1"),
        ("clip_jax StableHLO", "something else", "does not describe a clip_jax StableHLO export"),
        ("{", "[", "is damaged: "),
    ],
)
def test_a_changed_manifest_is_refused(folder, old, new, message):
    path = folder / "stablehlo.json"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=rf"stablehlo\.json {message}"):
        read_stablehlo(folder)


def reseal(folder):
    """Makes the checksums right again."""
    path = folder / "stablehlo.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["sha256"]
    manifest["files"] = {name: stablehlo.file_sha256(folder / name) for name in manifest["files"]}
    path.write_text(json.dumps(manifest | {"sha256": stablehlo._manifest_sha256(manifest)}), encoding="utf-8")


def test_programs_that_this_jax_cannot_read_are_refused_with_both_versions(folder):
    """Flatbuffers that are none, and a module that is no StableHLO, are what another version may look like."""
    path = folder / "encode_text.jaxexport"
    program = export.deserialize(bytearray(path.read_bytes()))
    unreadable = dataclasses.replace(program, mlir_module_serialized=b"MLIR of the future")
    for content in (b"a format of the future" * 9, unreadable.serialize()):
        path.write_bytes(content)
        reseal(folder)
        here = re.escape(jax.__version__)
        with pytest.raises(
            UserError, match=rf"^jax {here} cannot read \S*encode_text\.jaxexport, written by jax {here} \([^\n]+\)"
        ):
            read_stablehlo(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platforms": ("gpu",)}, "unknown platform 'gpu'; did you mean 'cuda'"),
        ({"platforms": ("tpuu",)}, "unknown platform 'tpuu'; did you mean 'tpu'"),
        ({"platforms": ()}, "no platform"),
        ({"preprocess": Preprocess(size=224)}, "images of 224 pixels; the model reads 16"),
        ({"classes": CLASSES}, "belong together"),
        ({"class_weights": unit_rows(3)}, "belong together"),
        ({"classes": (), "class_weights": unit_rows(0)}, "0 classes"),
        ({"classes": CLASSES, "class_weights": unit_rows(3).T}, r"shape \(16, 3\); .* need \(3, 16\)"),
        ({"classes": CLASSES, "class_weights": 2 * unit_rows(3)}, "unit length; they are 2 to 2"),
    ],
)
def test_contradictions_are_refused_and_nothing_is_written(tmp_path, changes, message):
    model = CLIP(VIT)
    with pytest.raises(UserError, match=message):
        write_stablehlo(tmp_path / "export", model, random_variables(model), **changes)
    assert not (tmp_path / "export").exists()


def test_float64_is_refused(tmp_path):
    model = CLIP(dataclasses.replace(VIT, dtype="float64"))
    with pytest.raises(UserError, match="float64 serves proofs"):
        write_stablehlo(tmp_path, model, {})


def test_every_platform_can_be_exported_from_here(tmp_path):
    model = CLIP(VIT)
    write_stablehlo(tmp_path, model, random_variables(model), platforms=PLATFORMS)
    assert read_stablehlo(tmp_path).programs["encode_text"].platforms == PLATFORMS
