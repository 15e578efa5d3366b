"""Gradients in micro-batches: those of the whole batch, in the memory of a micro-batch."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from gradients import batch_of, gradients, largest_difference
from tiny import TINY

from benchmarks.gradient_cache import compiled_step
from clip_jax.config import LossConfig, MeshConfig
from clip_jax.errors import ConfigError
from clip_jax.models.variants import ResNetConfig
from clip_jax.partition import make_mesh
from clip_jax.training.gradient_cache import check_micro_batch

VIT = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, dtype="float64", patch_dropout=0.5), batch=64)
SMALL_RESNET = ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 1, 1, 1))
RESNET = dataclasses.replace(
    VIT, model=dataclasses.replace(VIT.model, patch_dropout=0.0, bn_group=2, vision=SMALL_RESNET)
)
SIGMOID = dataclasses.replace(
    VIT, model=dataclasses.replace(VIT.model, logit_bias=True), loss=LossConfig(kind="sigmoid", form="ring")
)
RUNS = {"vit, patch dropout": VIT, "resnet, bn_group 2": RESNET, "vit, sigmoid": SIGMOID}


def test_a_nan_is_the_largest_difference():
    one = {"a": np.ones(2), "b": np.array([1.0, np.nan]), "c": np.array([1.0, 3.0])}
    largest, where = largest_difference(one, {name: np.ones(2) for name in one})
    assert math.isnan(largest)
    assert where == "b"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        pytest.param(1, MeshConfig(), id="1"),
        pytest.param(8, MeshConfig(2, 2, dcn_data=2), id="8", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "resnet" in name else []) for name in RUNS]
)
def test_gradients_are_those_of_the_whole_batch(x64, name, devices, mesh):
    """In float64, over 4 micro-batches, on one device and on eight; random patches are the same ones."""
    run = RUNS[name]
    batch = batch_of(run)
    metrics, expected, statistics = gradients(run, 1, batch)
    micro = dataclasses.replace(run, micro_batch=16, mesh=mesh)
    found_metrics, found, found_statistics = gradients(micro, devices, batch)
    error, where = largest_difference(found, expected)
    print(f"{name}, {devices} device(s): largest relative difference of a gradient {error:.1e}")
    assert error <= 1e-10, where
    assert all(np.abs(leaf).max() > 0 for leaf in expected.values())
    for key, value in metrics.items():
        assert found_metrics[key] == pytest.approx(value, rel=1e-12), key
    for a, b in zip(jax.tree.leaves(found_statistics), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def compiled(batch, *, micro_batch=0, devices=1):
    run = dataclasses.replace(TINY, batch=batch, micro_batch=micro_batch, samples=10 * batch)
    return compiled_step(run, devices=devices)


def test_samples_keep_their_device():
    """Cutting into micro-batches moves nothing between the devices."""
    text = compiled(512, micro_batch=64, devices=8).as_text()
    assert " while(" in text
    assert " all-to-all(" not in text
    assert " collective-permute(" not in text


@pytest.mark.slow
def test_the_memory_is_a_micro_batchs():
    """32,768 pairs through a tiny tower on one device, by XLA's account: 1.1 x the micro-batch's, and 0.5 GB."""
    steps = compiled(32_768, micro_batch=256), compiled(256), compiled(32_768)
    sizes = [
        step.memory_analysis().temp_size_in_bytes + step.memory_analysis().argument_size_in_bytes for step in steps
    ]
    print("MiB of 32,768 in micro-batches, of a micro-batch, of 32,768 at once:", [f"{s / 2**20:,.1f}" for s in sizes])
    assert sizes[0] <= 1.1 * sizes[1] + 0.5e9
    assert sizes[2] > 2 * sizes[0]


def test_micro_batches_that_do_not_fit_say_what_would():
    mesh = make_mesh(MeshConfig())
    check_micro_batch(dataclasses.replace(TINY, batch=64, micro_batch=16), mesh)
    with pytest.raises(ConfigError, match=r"config.micro_batch is 4, not divisible by the mesh's 8 devices; use 8"):
        check_micro_batch(dataclasses.replace(TINY, batch=64, micro_batch=4), mesh)
    with pytest.raises(ConfigError, match=r"config.micro_batch is 12, not .*; use 8 or 24$"):  # 16 does not divide 72
        check_micro_batch(dataclasses.replace(TINY, batch=72, micro_batch=12), mesh)
    torn = dataclasses.replace(RESNET, micro_batch=8)
    with pytest.raises(ConfigError, match=r"bn_group is 2, and a device has 1 samples .* must divide them"):
        check_micro_batch(torn, mesh)
    check_micro_batch(torn, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
