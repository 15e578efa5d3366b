"""Zero-shot classification against its definition, on made-up embeddings; templates and class names from everywhere."""

import math

import numpy as np
import pytest

from clip_jax.errors import ConfigError, UserError
from clip_jax.evals.prompts import TEMPLATES, templates
from clip_jax.evals.zero_shot import ZeroShotResult, class_weights, classify, wilson_interval

CLASSES = ("cat", "dog", "owl", "ant", "bee", "cow")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def fake_embed(texts):
    """A fixed random unit vector for every text."""
    return unit(np.stack([np.random.default_rng(list(text.encode())).standard_normal(16) for text in texts]))


def test_class_weight_is_the_normalised_mean_over_templates():
    prompts = ("a {}.", "the {}", "{}!")
    weights = class_weights(fake_embed, CLASSES, prompts)
    for name, weight in zip(CLASSES, weights, strict=True):
        mean = np.mean([fake_embed([template.format(name)])[0] for template in prompts], axis=0)
        np.testing.assert_allclose(weight, mean / np.linalg.norm(mean), rtol=1e-12)


def test_classify_against_a_loop():
    rng = np.random.default_rng(0)
    features, labels = unit(rng.standard_normal((200, 16))), rng.integers(0, 6, 200)
    weights = class_weights(fake_embed, CLASSES, ("{}",))
    result = classify(features, labels, weights, prompts="p", classes=CLASSES)
    confusion, in_five = np.zeros((6, 6), int), 0
    for feature, label in zip(features, labels, strict=True):
        scores = [float(feature @ weight) for weight in weights]
        confusion[label, int(np.argmax(scores))] += 1
        in_five += label in sorted(range(6), key=lambda i: -scores[i])[:5]
    np.testing.assert_array_equal(result.confusion, confusion)
    assert result.top5 == in_five / 200
    assert result.top1 == np.trace(confusion) / 200
    assert result.images == 200
    assert result.top5_interval == wilson_interval(in_five / 200, 200)


def test_of_classes_that_are_equally_near_the_first_comes_first():
    result = classify(np.ones((4, 1)), np.array([0, 0, 4, 5]), np.ones((6, 1)), prompts="p", classes=CLASSES)
    assert (result.top1, result.top5) == (2 / 4, 3 / 4)  # the last one is not among the five
    assert not result.found.any()


@pytest.mark.parametrize(("labels", "wrong"), [((0, 1, 6), 6), ((0, -1, 5), -1)])
def test_a_label_that_is_no_classs_is_named(labels, wrong):
    weights = class_weights(fake_embed, CLASSES, ("{}",))
    with pytest.raises(UserError, match=f"the dataset has the label {wrong}, and 6 classes are named"):
        classify(np.zeros((3, 16)), np.array(labels), weights, prompts="p", classes=CLASSES)


def test_means_and_mistakes():
    confusion = np.array([[8, 2, 0], [0, 0, 0], [1, 0, 1]])
    result = ZeroShotResult("p", ("a", "b", "c"), confusion, math.nan, np.zeros(12, bool), np.zeros(12, int))
    assert result.top1 == 9 / 12
    assert result.mean_per_class == pytest.approx((0.8 + 0.5) / 2)  # class b has no images
    assert result.confusions() == [("a", "b", 2), ("c", "a", 1)]


def test_the_interval_of_a_mean_over_classes():
    """Two classes of which 50 of 100 are right each: their mean's standard deviation is √(1/4 / 100 / 2)."""
    result = ZeroShotResult("p", ("a", "b"), np.full((2, 2), 50), math.nan, np.zeros(200, bool), np.zeros(200, int))
    half = 1.96 * math.sqrt(1 / 800)
    assert result.mean_per_class_interval == pytest.approx((0.5 - half, 0.5 + half), abs=0.005)


def test_fewer_than_five_classes_have_no_top5():
    weights = np.eye(3)
    result = classify(np.eye(3), np.arange(3), weights, prompts="p", classes=("a", "b", "c"))
    assert math.isnan(result.top5)
    assert result.top1 == 1


def test_wilson_interval():
    assert wilson_interval(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    low, high = wilson_interval(0.95, 300)
    assert (low, high) == (pytest.approx(0.9192, abs=1e-4), pytest.approx(0.9694, abs=1e-4))


def test_prompt_sets():
    assert all("{}" in template for row in TEMPLATES.values() for template in row)
    with pytest.raises(ConfigError, match=r"no template set 'digit'; did you mean 'digits'\? \(sets: photo, digits,"):
        templates("digit")
