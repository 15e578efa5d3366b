"""BatchNorm against its definition: values, statistics, gradients, and what float32 leaves of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.models.batch_norm import BatchNorm, group_statistics


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def normalise(x, *, kept=None, train=True, group=0, scale=1.0, bias=0.0, mean=0.0, var=1.0, dtype=None):
    """Our BatchNorm with the same numbers in every channel: (result, running mean, running variance)."""
    channels = x.shape[-1]
    norm = BatchNorm(train=train, group=group, dtype=dtype or x.dtype)
    variables = {
        "params": {"scale": jnp.full(channels, scale), "bias": jnp.full(channels, bias)},
        "batch_stats": {"mean": jnp.full(channels, mean), "var": jnp.full(channels, var)},
    }
    result, updated = norm.apply(variables, x, kept, mutable=["batch_stats"])
    return result, updated["batch_stats"]["mean"], updated["batch_stats"]["var"]


@pytest.mark.parametrize("group", [0, 1, 3, 6])
def test_batch_norm_equals_its_definition(x64, group):
    """Each group by its own mean and biased variance; running statistics from the means over the groups."""
    x = 3 + 2 * np.random.default_rng(0).standard_normal((6, 4, 4, 5))
    result, mean, var = normalise(jnp.asarray(x), group=group, scale=1.5, bias=0.25, mean=7.0, var=4.0)
    parts = np.split(x, 6 // (group or 6))
    over = {"axis": (0, 1, 2)}
    expected = [1.5 * (part - part.mean(**over)) / np.sqrt(part.var(**over) + 1e-5) + 0.25 for part in parts]
    np.testing.assert_allclose(result, np.concatenate(expected), atol=1e-12)
    np.testing.assert_allclose(mean, 0.9 * 7 + 0.1 * np.mean([part.mean(**over) for part in parts], axis=0), rtol=1e-12)
    unbiased = np.mean([part.var(ddof=1, **over) for part in parts], axis=0)
    np.testing.assert_allclose(var, 0.9 * 4 + 0.1 * unbiased, rtol=1e-12)


@pytest.mark.parametrize("group", [0, 3, 6])
def test_batch_norm_of_kept_samples_is_that_of_the_batch_without_the_others(x64, group):
    """Whatever the others hold; the running statistics take each group's share."""
    x = 3 + 2 * np.random.default_rng(0).standard_normal((6, 4, 4, 5))
    kept = np.array([True, False, True, False, False, True])
    wild = np.where(kept[:, None, None, None], x, 1e30)
    result, mean, var = normalise(jnp.asarray(wild), kept=jnp.asarray(kept), group=group, scale=1.5, mean=7.0, var=4.0)
    parts = [part[keep] for part, keep in zip(*(np.split(each, 6 // (group or 6)) for each in (x, kept)), strict=True)]
    alone = [normalise(jnp.asarray(part), scale=1.5, mean=7.0, var=4.0) for part in parts]
    np.testing.assert_allclose(result[kept], np.concatenate([each[0] for each in alone]), atol=1e-12)
    assert (result[~kept] == 0).all()
    np.testing.assert_allclose(mean, np.mean([each[1] for each in alone], axis=0), rtol=1e-12)
    np.testing.assert_allclose(var, np.mean([each[2] for each in alone], axis=0), rtol=1e-12)
    every = normalise(jnp.asarray(x), kept=jnp.ones(6, bool), group=group)
    for ours, plain in zip(every, normalise(jnp.asarray(x), group=group), strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_a_group_without_two_values_leaves_its_share_of_the_running_statistics(x64):
    x = np.random.default_rng(0).standard_normal((6, 1, 1, 5))
    kept = np.array([True, True, False, False, False, True])

    def total(x):
        result, mean, var = normalise(x, kept=jnp.asarray(kept), group=2, mean=7.0, var=4.0)
        return (result[jnp.asarray(kept)] ** 3).sum(), (result, mean, var)

    gradient, (result, mean, var) = jax.grad(total, has_aux=True)(jnp.asarray(x))
    first = x[:2].reshape(2, 5)
    np.testing.assert_allclose(mean, (2 * 7 + 0.9 * 7 + 0.1 * first.mean(0)) / 3, rtol=1e-12)
    np.testing.assert_allclose(var, (2 * 4 + 0.9 * 4 + 0.1 * first.var(0, ddof=1)) / 3, rtol=1e-12)
    assert (result[2:] == 0).all()
    assert np.isfinite(gradient).all()
    assert (gradient[2:] == 0).all()


def test_batch_norm_evaluates_with_the_running_statistics(x64):
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 5))
    result, mean, var = normalise(jnp.asarray(x), train=False, scale=1.5, bias=0.25, mean=7.0, var=4.0)
    np.testing.assert_allclose(result, 1.5 * (x - 7) / np.sqrt(4 + 1e-5) + 0.25, rtol=1e-12)
    assert (mean == 7).all()
    assert (var == 4).all()


def test_batch_norm_is_exact_where_the_mean_is_large():
    """E[x²]-E[x]² in float32 errs by more than 1e-2 here."""
    x = (300 + np.random.default_rng(0).standard_normal((8, 6, 6, 4))).astype(np.float32)
    result, *_ = normalise(jnp.asarray(x))
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(result, exact, atol=2e-4)


@pytest.mark.parametrize("group", [-2, 4, 12])
def test_a_group_that_does_not_divide_the_batch_says_what_would(group):
    with pytest.raises(UserError, match=rf"^bn group is {group}, .* 6 samples; use 0 \(all of them\) or 1, 2, 3, 6\b"):
        normalise(jnp.ones((6, 2, 2, 1)), group=group)
    normalise(jnp.ones((6, 2, 2, 1)), group=group, train=False)


def test_one_value_a_channel_is_refused():
    with pytest.raises(UserError, match=r"^bn group 1 of a batch of 6 leaves one value a channel"):
        normalise(jnp.ones((6, 1, 1, 1)), group=1)


def by_definition(x, scale, bias, kept, group, relu):
    parts = []
    for part, keep in zip(jnp.split(x, len(x) // group), np.split(kept, len(x) // group), strict=True):
        mean, var = (getattr(part[keep], statistic)(axis=(0, 1, 2)) for statistic in ("mean", "var"))
        unit = jnp.where(keep[:, None, None, None], (part - mean) / jnp.sqrt(var + 1e-5), 0)
        parts.append(unit * scale + bias)
    return jnp.maximum(jnp.concatenate(parts), 0) if relu else jnp.concatenate(parts)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("group", [3, 6])
def test_its_gradients_are_the_definitions(x64, group, relu):
    """Of samples, gains and biases, where some samples are in no statistic."""
    x, weight = jax.random.normal(jax.random.key(0), (2, 6, 4, 3, 5))
    scale, bias = jax.random.normal(jax.random.key(1), (2, 5))
    kept = np.array([True, False, True, False, True, True])
    norm = BatchNorm(train=True, group=group, dtype=x.dtype, relu=relu)
    running = {"mean": jnp.zeros(5), "var": jnp.ones(5)}

    def ours(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": running}
        return norm.apply(variables, x, jnp.asarray(kept), mutable=["batch_stats"])[0]

    def theirs(x, scale, bias):
        return by_definition(x, scale, bias, kept, group, relu)

    found, expected = (jax.vjp(function, x, scale, bias) for function in (ours, theirs))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-13)
    for a, b in zip(found[1](weight), expected[1](weight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    ("mean", "outlier", "bound"),
    [(0, 0, 1e-6), (100, 0, 1e-6), (1e4, 0, 2e-5), (0, 1e4, 1e-3)],  # the last is the worst place for an outlier
)
def test_a_variance_of_one_reading_is_as_good_as_of_two(mean, outlier, bound):
    x = np.random.default_rng(0).standard_normal((8, 28, 28, 4))
    x[:, 14, 14] += outlier
    x = jnp.asarray(x + mean, jnp.float32)
    exact = np.float64(x).var(axis=(0, 1, 2))
    errors = {
        "one reading": group_statistics(x, jnp.ones(8, bool), 8)[1][0],
        "two": x.var(axis=(0, 1, 2)),
        "E[x²]-E[x]²": jnp.square(x).mean(axis=(0, 1, 2)) - jnp.square(x.mean(axis=(0, 1, 2))),
    }
    errors = {name: float(np.max(np.abs(found - exact) / exact)) for name, found in errors.items()}
    print(f"mean {mean}, outlier {outlier}:", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert errors["one reading"] < bound
