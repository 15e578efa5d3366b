"""A pair of weight 0 is as if it were not in the batch: loss, gradients and running statistics, in float64."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
from gradients import NEGLIGIBLE, batch_of, gradients
from test_gradient_cache import RESNET, SIGMOID, VIT, x64

from clip_jax.config import MeshConfig
from clip_jax.rules import leaf_paths

__all__ = ["x64"]

EIGHT = MeshConfig(2, 2, dcn_data=2)


def with_model(run, **changes):
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


# Random patches go by a pair's place in the batch, so they would be others without it.
RUNS = {
    "vit": with_model(VIT, patch_dropout=0.0),
    "vit, sigmoid": with_model(SIGMOID, patch_dropout=0.0),
    "resnet": with_model(RESNET, bn_group=0),
    "resnet, groups of 4": with_model(RESNET, bn_group=4),
}
WAYS = {
    "1 device": (1, {}),
    "8 devices": (8, {"mesh": EIGHT}),
    "micro-batches": (1, {"micro_batch": 16}),
    "8 devices, micro-batches": (8, {"mesh": EIGHT, "micro_batch": 32}),
}
FAST = {("vit", "8 devices")}
CASES = [
    pytest.param(run, way, id=f"{run}, {way}", marks=[] if (run, way) in FAST else pytest.mark.slow)
    for run in RUNS
    for way in WAYS
    if (run, "micro" in way) != ("resnet", True)  # statistics of the whole batch: refused
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_batch_with_pairs_of_weight_0_is_the_batch_without_them(x64, name, way):
    """One of every four pairs, which hold black images, no text, or anything; the others have several weights."""
    run, (devices, changes) = RUNS[name], WAYS[way]
    batch = batch_of(run)
    weights = np.array([0.5, 1, 1.5, 2], np.float32)  # whose sum is exact in float32, in any order
    batch["weight"] = np.random.default_rng(0).choice(weights, run.batch)
    left_out = np.arange(run.batch) % 4 == np.arange(run.batch) // 4 % 4  # one of each group, at all of its places
    batch["weight"][left_out] = 0
    batch["image"][left_out & (np.arange(run.batch) < 32)] = 0
    batch["tokens"][left_out] = 0
    without = {key: rows[~left_out] for key, rows in batch.items()}
    smaller = dataclasses.replace(run, batch=int(np.sum(~left_out)))
    if run.model.bn_group:
        smaller = with_model(smaller, bn_group=3)
    expected = gradients(smaller, 1, without)
    found = gradients(dataclasses.replace(run, **changes), devices, batch)
    assert_same_step(found, expected)


@pytest.mark.slow
def test_a_group_of_pairs_of_weight_0_changes_nothing_but_its_share_of_the_running_statistics(x64):
    run = RUNS["resnet, groups of 4"]
    batch = batch_of(run)
    batch["weight"][:] = 1
    batch["weight"][8:12] = 0
    batch["image"][8:12] = 0
    without = {key: np.delete(rows, range(8, 12), axis=0) for key, rows in batch.items()}
    expected = copy.deepcopy(gradients(dataclasses.replace(run, batch=60), 1, without))
    for path, leaf in zip(leaf_paths(expected[2]), jax.tree.leaves(expected[2]), strict=True):
        leaf[:] = (15 * leaf + (1 if path.endswith("var") else 0)) / 16  # variances begin at 1, means at 0
    assert_same_step(gradients(run, 1, batch), expected)


def assert_same_step(found, expected):
    errors = {
        path: float(np.abs(found[1][path] - leaf).max() / np.abs(leaf).max())
        for path, leaf in expected[1].items()
        if not path.endswith(NEGLIGIBLE)
    }
    print(f"largest relative difference of a gradient {max(errors.values()):.1e}, of the loss", end=" ")
    print(f"{abs(found[0]['loss'] / expected[0]['loss'] - 1):.1e}")
    assert max(errors.values()) <= 1e-10, max(errors, key=errors.__getitem__)
    for key, value in expected[0].items():
        assert found[0][key] == pytest.approx(value, rel=1e-10), key
    for a, b in zip(*(jax.tree.leaves(each[2:]) for each in (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
