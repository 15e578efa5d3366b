"""Rules, decay mask, schedule, clamp, clipping, freezing, multipliers and averages."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import by_path

from clip_jax.config import OptimConfig
from clip_jax.errors import ConfigError
from clip_jax.models.clip import create_model, init_variables
from clip_jax.rules import apply_rules, leaf_paths
from clip_jax.training.optim import (
    DECAY_RULES,
    clamp_scale,
    decay_mask,
    learning_rate,
    make_optimizer,
    moving_average,
    multipliers,
)


def params_of(name):
    return jax.eval_shape(lambda: init_variables(create_model(name), jax.random.key(0)))["params"]


def test_first_matching_rule_wins():
    tree = {"a": {"bias": 1, "kernel": 2}, "b": 3}
    rules = ((r"bias$", "x"), (r"^a/", "y"), (r"", "z"))
    assert apply_rules(rules, tree) == {"a": {"bias": "x", "kernel": "y"}, "b": "z"}


def test_uncovered_leaves_and_idle_rules_are_refused():
    with pytest.raises(ValueError, match=r"no rule matches b/new"):
        apply_rules(((r"^a$", 1),), {"a": 0, "b": {"new": 0}})
    with pytest.raises(ValueError, match=r"no parameter takes the rules stale"):
        apply_rules(((r"a", 1), (r"stale", 2)), {"a": 0})


@pytest.mark.parametrize("scheme", DECAY_RULES)
@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_decay_spares_gains_biases_and_the_temperature(name, scheme):
    params = params_of(name)
    mask = decay_mask(OptimConfig(decay_mask=scheme), params)
    decayed = {path for path, on in zip(leaf_paths(mask), jax.tree.leaves(mask), strict=True) if on}
    expected = {path for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True) if leaf.ndim >= 2}
    if scheme == "open_clip":
        expected -= {"image/positions", "text/positions"}  # the attention pool's stay
    if scheme == "paper" and name == "ViT-B/32":
        expected |= {"image/class_token"}  # a vector, and yet no gain or bias
    assert decayed == expected


@pytest.mark.parametrize("scheme", DECAY_RULES)
def test_every_decay_rule_is_some_models(scheme):
    apply_rules(DECAY_RULES[scheme], {"vit": params_of("ViT-B/32"), "rn": params_of("RN50")})


def test_schedule():
    rate = learning_rate(OptimConfig(lr=2.0, warmup_steps=10), steps=110)
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(1.0)
    assert float(rate(10)) == pytest.approx(2.0)
    assert float(rate(60)) == pytest.approx(1.0)
    assert float(rate(110)) == pytest.approx(0, abs=1e-7)
    assert float(learning_rate(OptimConfig(lr=2.0, warmup_steps=0), steps=10)(0)) == 2.0


def rates(steps, **changes):
    rate = learning_rate(OptimConfig(lr=2.0, warmup_steps=10, **changes), steps=steps)
    return np.array([float(rate(step)) for step in range(steps)])


@pytest.mark.parametrize("cooldown", [0, 30])
def test_a_constant_rate_cools_down_as_in_open_clip(cooldown):
    schedulers = pytest.importorskip("open_clip_train.scheduler")
    optimizer = SimpleNamespace(param_groups=[{}])
    theirs = schedulers.const_lr_cooldown(optimizer, 2.0, 10, 110, cooldown, cooldown_end_lr=0.5)
    found = rates(110, schedule="constant", cooldown_steps=cooldown, end_lr=0.5 if cooldown else 0.0)
    np.testing.assert_allclose(found[10:], [theirs(step) for step in range(10, 110)], rtol=1e-6)
    np.testing.assert_allclose(found[:10], 0.2 * np.arange(10), rtol=1e-6)  # theirs is a step ahead


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_what_is_before_the_cooldown_does_not_depend_on_the_length(schedule):
    short, long = (rates(steps, schedule=schedule, cooldown_steps=20) for steps in (80, 160))
    np.testing.assert_array_equal(short[:61], long[:61])
    assert np.all(np.diff(short[60:]) < 0)
    assert short[-1] == pytest.approx(short[60] / 20)
    assert long[40] == (2.0 if schedule == "constant" else pytest.approx(2.0 * (10 / 40) ** 0.5))


def test_a_cosine_ends_where_it_is_told():
    rate = learning_rate(OptimConfig(lr=2.0, warmup_steps=10, end_lr=0.5), steps=110)
    assert [float(rate(step)) for step in (10, 60, 110)] == pytest.approx([2.0, 1.25, 0.5])


def test_adamw_is_the_papers():
    """Two steps against AdamW written out: decoupled decay, bias correction, epsilon outside the root."""
    config = OptimConfig(lr=0.1, warmup_steps=0, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2)
    params = {"x": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}, "logit_scale": jnp.array(2.0)}
    params |= {"x": params["x"] | {"positions": jnp.array([0.3])}}
    params["y"] = {"embedding": jnp.array([0.1])}
    optimizer = make_optimizer(config, steps=100)
    state, rate = optimizer.init(params), learning_rate(config, steps=100)
    leaves = zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
    expected = {path: np.asarray(leaf, np.float64) for path, leaf in leaves}
    first = {path: np.zeros_like(leaf) for path, leaf in expected.items()}
    second = {path: np.zeros_like(leaf) for path, leaf in expected.items()}
    for step in range(2):
        grads = jax.tree.map(lambda leaf, t=step: leaf * (0.3 + t), params)
        for path, grad in zip(leaf_paths(grads), jax.tree.leaves(grads), strict=True):
            grad = np.asarray(grad, np.float64)
            first[path] = 0.8 * first[path] + 0.2 * grad
            second[path] = 0.9 * second[path] + 0.1 * grad**2
            moved = first[path] / (1 - 0.8 ** (step + 1)) / (np.sqrt(second[path] / (1 - 0.9 ** (step + 1))) + 1e-3)
            decay = 0.0 if path.endswith(("bias", "logit_scale")) else 0.2 * expected[path]
            expected[path] = expected[path] - float(rate(step)) * (moved + decay)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-6, err_msg=path)


def test_clamp_limits_only_the_top_of_what_is_trained():
    frozen = ("^logit_scale$",)
    for start, freeze, end in [(1.0, (), 1.0), (-3.0, (), -3.0), (7.0, (), np.log(100.0)), (7.0, frozen, 7.0)]:
        config = OptimConfig(max_scale=100.0, freeze=freeze)
        clamped = clamp_scale(config, {"logit_scale": jnp.float32(start), "other": jnp.float32(99)})
        assert float(clamped["logit_scale"]) == pytest.approx(end)
        assert float(clamped["other"]) == 99


SMALL = {
    "image": {"proj": {"kernel": jnp.array([[3.0, 4.0]])}, "ln": {"scale": jnp.array([1.0])}},
    "text": {"proj": {"kernel": jnp.array([[12.0, 0.5]])}},
    "logit_scale": jnp.array(2.0),
}


def updates_of(config, params=SMALL, grads=SMALL):
    optimizer = make_optimizer(config, steps=100)
    state = optimizer.init(params)
    return optimizer.update(grads, state, params)


def base(**changes):
    return OptimConfig(lr=0.1, warmup_steps=0, eps=1e-3, **changes)


def test_gradients_are_clipped_by_the_norm_of_all():
    """A gradient over the limit acts as the same one scaled down to it; one below it as it is."""
    norm = float(optax.tree.norm(SMALL))
    clipped, _ = updates_of(base(clip_norm=0.01))
    scaled, _ = updates_of(base(), grads=jax.tree.map(lambda g: g * 0.01 / norm, SMALL))
    plain, _ = updates_of(base())
    for a, b, c in zip(*map(jax.tree.leaves, (clipped, scaled, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
        assert (a != c).all()
    free, _ = updates_of(base(clip_norm=2 * norm))
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (free, plain)), strict=True))


def test_frozen_parameters_have_no_update_no_decay_and_no_state():
    updates, state = updates_of(base(freeze=("^image/", "logit_scale$")))
    plain, _ = updates_of(base())
    assert (updates["image"]["proj"]["kernel"] == 0).all()
    assert (updates["image"]["ln"]["scale"] == 0).all()
    assert updates["logit_scale"] == 0
    np.testing.assert_allclose(updates["text"]["proj"]["kernel"], plain["text"]["proj"]["kernel"], rtol=1e-6)
    moments = [path for path in leaf_paths(state) if "/mu/" in path or "/nu/" in path]
    assert len(moments) == 2
    assert all("text/proj/kernel" in path for path in moments)


def test_multipliers_scale_the_update_and_the_first_regex_wins():
    rules = ("^image/ln=0", "^image/=0.5", "scale=3")
    (updates, _), (plain, _) = updates_of(base(lr_multipliers=rules)), updates_of(base())
    assert multipliers(base(lr_multipliers=rules), SMALL) == {
        "image": {"proj": {"kernel": 0.5}, "ln": {"scale": 0.0}},
        "text": {"proj": {"kernel": 1.0}},
        "logit_scale": 3.0,
    }
    np.testing.assert_allclose(updates["image"]["proj"]["kernel"], 0.5 * plain["image"]["proj"]["kernel"])
    assert (updates["image"]["ln"]["scale"] == 0).all()
    np.testing.assert_allclose(updates["logit_scale"], 3 * plain["logit_scale"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("^image/", "^txt/")}, r"config.optim.freeze: '\^txt/' is found in no parameter's path"),
        (
            {"lr_multipliers": ("imag=1", "text/pro/=2")},
            r"'text/pro/' is found .*; did you mean 'text/proj/kernel'",
        ),
        (
            {"lr_multipliers": ("^image/=0.1", "^image/ln/=2")},
            r"lr_multipliers: '\^image/ln/=2' is never used, since .* an earlier one",
        ),
        ({"freeze": ("image", "e")}, r"freeze is \('image', 'e'\), which leaves nothing that is trained"),
    ],
)
def test_regexes_that_match_nothing_or_freeze_all_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(base(**changes), steps=9).init(SMALL)


def test_the_first_moment_can_be_bf16():
    """It halves its bytes, and the update of a first step differs by its rounding."""
    (narrow, state), (wide, _) = updates_of(base(mu_dtype="bfloat16")), updates_of(base())
    named = by_path(state)
    dtypes = {part: {leaf.dtype.name for path, leaf in named.items() if f"/{part}/" in path} for part in ("mu", "nu")}
    assert dtypes == {"mu": {"bfloat16"}, "nu": {"float32"}}
    for a, b in zip(*map(jax.tree.leaves, (narrow, wide)), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2**-7)


def test_the_moving_average():
    average = moving_average({"x": jnp.array([1.0, 2.0])}, {"x": jnp.array([3.0, 2.0])}, decay=0.75)
    np.testing.assert_allclose(average["x"], [1.5, 2.0])


def test_an_average_is_no_smaller_than_what_is_averaged():
    """In float32, 0.9999 and 1 - 0.9999 do not sum to 1: as factors, they made it 1.7e-4 smaller."""
    mean, decay = jnp.array([1.0, -0.3, 4.6]), 0.9999

    def one_step(step, average):
        return moving_average(average, mean * (1 + 0.3 * jnp.sin(step)), decay=decay)

    found = jax.jit(lambda average: jax.lax.fori_loop(0, 50_000, one_step, average))(mean)
    np.testing.assert_allclose(found, mean, rtol=4e-5)
