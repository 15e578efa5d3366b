"""Starting from trained weights: what is taken, resized, left, unused is exact and said; what does not fit is named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_like
from tiny import TINY

from clip_jax.config import MeshConfig, OptimConfig, from_config_dict, to_config_dict
from clip_jax.data.images import Preprocess
from clip_jax.errors import ConfigError, UserError
from clip_jax.interop.initial import read_initial
from clip_jax.interop.names import leaves_by_path
from clip_jax.interop.open_clip import write_open_clip
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.resolution import resize_positions
from clip_jax.models.variants import ModelConfig, ResNetConfig
from clip_jax.partition import make_mesh
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import create_state, start_from

MODEL = TINY.model
RESNET = ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 1, 1, 1))


def shapes_of(model: ModelConfig):
    return jax.eval_shape(lambda: init_variables(CLIP(model), jax.random.key(0)))


def changed(model: ModelConfig = MODEL, *, vision=None, text=None, **values) -> ModelConfig:
    towers = {
        "vision": dataclasses.replace(model.vision, **(vision or {})),
        "text": dataclasses.replace(model.text, **(text or {})),
    }
    return dataclasses.replace(model, **towers, **values)


@pytest.fixture
def written(tmp_path):
    """Writes random weights of a model; returns them by path, and the folder."""

    def write(model: ModelConfig = MODEL, **statistics):
        pixels = Preprocess(model.vision.image_size, **statistics)
        variables = random_like(shapes_of(model), dtype=np.float32)
        folder = tmp_path / "trained"
        folder.mkdir()
        write_open_clip(folder, Weights(model, variables, pixels))
        return leaves_by_path(variables), str(folder)

    return write


def read(folder: str, model: ModelConfig = MODEL, **options):
    config = dataclasses.replace(TINY, model=model, init_from=folder, **options)
    return read_initial(from_config_dict(to_config_dict(config)), shapes_of(model))


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)


def test_whole_weights_are_taken_whole(written):
    weights, folder = written()
    initial = read(folder)
    assert_equal(initial.arrays, weights)
    assert (initial.resized, initial.left, initial.unused) == ({}, {}, {})
    total = sum(array.size for array in weights.values())
    assert initial.report()[0] == f"starting from {folder}"
    assert initial.report()[1].startswith(f"  taken: {len(weights)} arrays of {total:,} numbers (image/class_token, ")
    assert len(initial.report()) == 2


def test_weights_of_other_pixels_are_taken_by_a_run_of_such(written):
    weights, folder = written(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(UserError, match=r"with other pixels .* set config.data.mean and config.data.std"):
        read(folder)
    assert read(folder, init_part="text").left
    data = dataclasses.replace(TINY.data, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert_equal(read(folder, data=data).arrays, weights)


@pytest.mark.parametrize("part", ["image", "text"])
def test_one_tower_is_taken_into_a_model_whose_other_tower_differs(written, part):
    weights, folder = written()
    other = changed(text={"layers": 2, "heads": 4}) if part == "image" else changed(vision={"patch": 4, "heads": 4})
    initial = read(folder, other, init_part=part)
    assert_equal(initial.arrays, {path: array for path, array in weights.items() if path.startswith(part)})
    everything = leaves_by_path(shapes_of(other))
    assert set(initial.left) == {path for path in everything if not path.startswith(part)}
    assert set(initial.unused) == {path for path in weights if not path.startswith(part)}
    left, unused = initial.report()[2:]
    assert left.startswith(
        f"  left as initialised: {len(initial.left)} arrays of {sum(initial.left.values()):,} numbers ("
    )
    assert unused.startswith(f"  not used: {len(initial.unused)} arrays of ")


def test_a_resnets_running_statistics_belong_to_its_tower(written):
    weights, folder = written(dataclasses.replace(MODEL, vision=RESNET))
    initial = read(folder, changed(dataclasses.replace(MODEL, vision=RESNET), text={"layers": 2}), init_part="image")
    assert "image/stem_bn_1/mean" in initial.arrays
    assert_equal(initial.arrays, {path: array for path, array in weights.items() if path.startswith("image")})


def test_what_is_resized_is_said(written):
    weights, folder = written()
    initial = read(folder, changed(vision={"image_size": 32}))
    expected = np.asarray(resize_positions(jnp.asarray(weights["image/positions"]), tokens=17))
    assert_equal(initial.arrays, weights | {"image/positions": expected})
    assert initial.resized == {"image/positions": (5, 32)}
    assert "  of these resized: image/positions [5, 32] -> [17, 32]" in initial.report()


def test_renamed_blocks_make_a_shallower_model(written):
    weights, folder = written(changed(text={"layers": 3}))
    rules = ("^text/transformer/block_2/=>text/transformer/block_1/", r"(block)_1/=>\1_9/")
    initial = read(folder, changed(text={"layers": 2}), init_rename=rules)
    for path, array in initial.arrays.items():
        np.testing.assert_array_equal(
            array, weights[path.replace("text/transformer/block_1/", "text/transformer/block_2/")]
        )
    assert set(initial.unused) == {path for path in weights if path.startswith("text/transformer/block_1/")}
    assert initial.left == {}


def test_what_is_skipped_stays_as_initialised(written):
    weights, folder = written()
    smaller = changed(embed_dim=8, logit_bias=True)
    run = {"loss": dataclasses.replace(TINY.loss, kind="sigmoid"), "init_skip": ("/projection/", "^logit_")}
    initial = read(folder, smaller, **run)
    assert set(initial.left) == {"image/projection/kernel", "text/projection/kernel", "logit_scale", "logit_bias"}
    assert set(initial.arrays) == set(weights) - set(initial.left)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (changed(embed_dim=8), {}, r"holds another model .*embed_dim 16 -> 8"),
        (changed(embed_dim=8), {"init_part": "image"}, r"image/projection/kernel \(\[32, 16\] there, \[32, 8\] here"),
        (changed(text={"layers": 2}), {"init_part": "text"}, r"it lacks text/transformer/block_1/att.* and 6 more"),
        (changed(text={"heads": 4}), {"init_part": "text"}, r"trained as another model: text.heads 2 -> 4 \(there"),
        (changed(activation="gelu"), {"init_part": "image"}, r"activation 'quick_gelu' -> 'gelu'"),
        (MODEL, {"init_part": "image", "init_skip": ("^imag/",)}, r"init_skip: '\^imag/' is found in no parameter"),
        (MODEL, {"init_rename": ("^vision/=>image/",)}, r"init_rename: '\^vision/' is found in no parameter's path"),
        (MODEL, {"init_rename": ("^image/ln_p.*/=>image/x/",)}, r"the same name, image/x/(scale|bias)"),
        (MODEL, {"init_rename": (r"^image/=>\2",)}, r"cannot replace '\^image/': invalid group reference"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(written, model, options, message):
    _, folder = written()
    with pytest.raises(UserError, match=message):
        read(folder, model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_part": "image"}, "config.init_from names no weights"),
        ({"init_skip": ("^logit",)}, "config.init_from names no weights"),
        ({"init_from": "x", "init_skip": ("(",)}, r"config.init_skip holds '\(', which is not a regular expression"),
        ({"init_from": "x", "init_rename": ("a=b",)}, r"config.init_rename holds 'a=b'; it must be regex=>replacement"),
    ],
)
def test_contradictions(options, message):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(to_config_dict(dataclasses.replace(TINY, **options)))


def test_a_state_starts_with_a_tower_and_keeps_the_rest(written):
    """On a mesh that splits parameters, with an average, which starts from the same weights."""
    weights, folder = written()
    initial = read(folder, init_part="image")
    mesh, optimizer = make_mesh(MeshConfig(fsdp=2)), make_optimizer(OptimConfig(ema_decay=0.9), steps=10_000)
    fresh = create_state(CLIP(MODEL), optimizer, mesh=mesh, seed=5, ema=True)
    started = start_from(fresh, initial.arrays)
    before, after = leaves_by_path(fresh.variables), leaves_by_path(started.variables)
    assert_equal(after, {path: weights[path] if path.startswith("image/") else leaf for path, leaf in before.items()})
    assert_equal(leaves_by_path({"params": started.ema}), after)
    assert all(after[path].sharding == leaf.sharding for path, leaf in before.items())
