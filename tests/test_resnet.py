"""The ResNet image tower: on every mesh, and its properties."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ModifyScopeVariableError
from jax.sharding import NamedSharding
from random_weights import random_like

from clip_jax.config import MeshConfig
from clip_jax.models.clip import count_parameters
from clip_jax.models.resnet import ModifiedResNet, average_pool
from clip_jax.models.variants import VARIANTS, ModelConfig, ResNetConfig, TextConfig
from clip_jax.partition import ROWS, make_mesh
from clip_jax.rules import leaf_paths

SMALL = ResNetConfig(image_size=64, width=16, heads=8, layers=(1, 2, 1, 1))
TINY = ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 1, 1, 1))  # where several programs are compiled
TEXT, EMBED = TextConfig(width=32, heads=2, layers=1), 24
KEY_BIAS = "attention_pool/key/bias"

# These programs take longer to compile than to run; the sums are the same.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# open_clip's profile: parameters of the image tower, and running means and variances
COUNTS = {
    "RN50": (38_316_896, 53_248),
    "RN101": (56_259_936, 105_472),
    "RN50x4": (87_137_080, 109_760),
    "RN50x16": (167_328_912, 193_920),
    "RN50x64": (420_380_352, 410_624),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def tower(config=SMALL, dtype="float32", embed_dim=EMBED, **options):
    return ModifiedResNet(ModelConfig(embed_dim, config, TEXT, dtype=dtype, **options))


def image_shape(config, batch=1):
    return (batch, config.image_size, config.image_size, 3)


@pytest.fixture(scope="module")
def small():
    return random_variables(dtype=np.float32)


@functools.cache
def initial(config):
    return jit(tower(config).init)(jax.random.key(0), jnp.zeros(image_shape(config)))


@functools.cache
def shapes(config=SMALL, embed_dim=EMBED):
    images = jax.ShapeDtypeStruct(image_shape(config), jnp.float32)
    return jax.eval_shape(tower(config, embed_dim=embed_dim).init, jax.random.key(0), images)


def random_variables(config=SMALL, *, dtype=np.float64, seed=0):
    return random_like(shapes(config), dtype=dtype, seed=seed)


def random_images(config=SMALL, batch=4, *, dtype=np.float64, seed=1):
    return np.random.default_rng(seed).standard_normal(image_shape(config, batch)).astype(dtype)


def assert_leaves_close(ours, theirs, bound, *, skip=()):
    """Bounds the largest error of every leaf, relative to the leaf's largest value, and returns the worst.

    A key bias is to be skipped: it adds one number to all of a query's logits, so its gradient is 0, and what is
    there is rounding.
    """
    worst = 0.0
    for path, a, b in zip(leaf_paths(ours), jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if path not in skip:
            assert a.shape == b.shape, path
            error = np.abs(a - b).max() / np.abs(b).max()
            assert error <= bound, path
            worst = max(worst, error)
    return worst


def train_step(model, variables, images, cotangent):
    """(features, running statistics, gradients of the parameters) of one training forward and backward."""

    def run(params):
        features, updated = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]}, images, train=True, mutable=["batch_stats"]
        )
        return (features * cotangent).sum(), (features, updated["batch_stats"])

    grads, (features, statistics) = jax.grad(run, has_aux=True)(variables["params"])
    return features, statistics, grads


@pytest.mark.parametrize("name", COUNTS)
def test_counts_equal_the_released_models(name):
    embed_dim, config, _ = VARIANTS[name]
    variables = shapes(config, embed_dim)
    assert (count_parameters(variables["params"]), count_parameters(variables["batch_stats"])) == COUNTS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_parameter_names():
    """The names that checkpoints and weight tables depend on."""
    norm = ("bias", "scale")
    conv = ("kernel",)
    block = {"conv_1": conv, "bn_1": norm, "conv_2": conv, "bn_2": norm, "conv_3": conv, "bn_3": norm}
    shortcut = {"shortcut_conv": conv, "shortcut_bn": norm}
    stem = {f"stem_{kind}_{i}": leaves for i in (1, 2, 3) for kind, leaves in (("conv", conv), ("bn", norm))}
    stages = {
        f"stage_{stage}/block_{i}/{layer}": leaves
        for stage, blocks in enumerate(SMALL.layers, 1)
        for i in range(blocks)
        for layer, leaves in (block | (shortcut if i == 0 else {})).items()
    }
    pool = {f"attention_pool/{name}": ("bias", "kernel") for name in ("query", "key", "value", "out")}
    expected = {f"{layer}/{leaf}" for layer, leaves in (stem | stages | pool).items() for leaf in leaves}
    assert set(leaf_paths(shapes()["params"])) == expected | {"attention_pool/positions"}
    norms = {layer for layer, leaves in (stem | stages).items() if leaves == norm}
    assert set(leaf_paths(shapes()["batch_stats"])) == {
        f"{layer}/{leaf}" for layer in norms for leaf in ("mean", "var")
    }


def test_training_must_take_the_new_statistics(small):
    with pytest.raises(ModifyScopeVariableError):
        tower().apply(small, jnp.ones(image_shape(SMALL, 2)), train=True)


def test_initialisation_leaves_the_running_statistics_at_their_start():
    images = jnp.ones(image_shape(TINY, 2))
    variables = jit(lambda x: tower(TINY).init(jax.random.key(0), x, train=True))(images)
    for path, leaf in zip(leaf_paths(variables["batch_stats"]), jax.tree.leaves(variables["batch_stats"]), strict=True):
        assert (leaf == path.endswith("var")).all(), path


def test_groups_are_as_if_each_were_a_batch(x64):
    """What lets micro-batches that hold whole groups give the gradients of the whole batch."""
    variables, images = random_variables(TINY), random_images(TINY, 8)
    cotangent = np.random.default_rng(2).standard_normal((8, EMBED))
    grouped = jit(functools.partial(train_step, tower(TINY, "float64", bn_group=4)))
    alone = jit(functools.partial(train_step, tower(TINY, "float64")))
    whole = grouped(variables, images, cotangent)
    parts = [alone(variables, images[rows], cotangent[rows]) for rows in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(whole[0], np.concatenate([part[0] for part in parts]), rtol=1e-10)
    assert_leaves_close(whole[1], jax.tree.map(lambda a, b: (a + b) / 2, parts[0][1], parts[1][1]), 1e-12)
    assert_leaves_close(whole[2], jax.tree.map(lambda a, b: a + b, parts[0][2], parts[1][2]), 1e-11, skip=(KEY_BIAS,))


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 4])
def test_every_mesh_gives_one_training_step(x64, group):
    variables, images = random_variables(TINY), random_images(TINY, 32)
    cotangent = np.random.default_rng(2).standard_normal((32, EMBED))
    step = jit(functools.partial(train_step, tower(TINY, "float64", bn_group=group)))
    alone = step(variables, images, cotangent)
    for data, fsdp in ((2, 1), (2, 2), (4, 2)):
        mesh = make_mesh(MeshConfig(data, fsdp), devices=jax.devices()[: data * fsdp])
        rows = NamedSharding(mesh, ROWS)
        sharded = step(variables, *jax.device_put((images, cotangent), rows))
        assert len(sharded[0].sharding.device_set) == data * fsdp
        assert_leaves_close(sharded, alone, 1e-12, skip=(f"2/{KEY_BIAS}",))


def test_rematerialisation_changes_no_name_and_no_value(x64):
    variables, images = random_variables(TINY), random_images(TINY, 4)
    cotangent = np.random.default_rng(2).standard_normal((4, EMBED))
    plain, remat = (tower(TINY, "float64", remat=remat) for remat in ("none", "block"))
    steps = [functools.partial(train_step, model) for model in (plain, remat)]
    counts = [str(jax.make_jaxpr(step)(variables, images, cotangent)).count("remat") for step in steps]
    assert counts[0] == 0
    assert counts[1] >= 4
    results = [jit(step)(variables, images, cotangent) for step in steps]
    assert_leaves_close(*results, 1e-12, skip=(f"2/{KEY_BIAS}",))
    inits = [jit(model.init)(jax.random.key(0), images) for model in (plain, remat)]
    assert leaf_paths(inits[0]) == leaf_paths(inits[1])
    for a, b in zip(*map(jax.tree.leaves, inits), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("remat", ["none", "block", "full"])
def test_named_intermediates(small, remat):
    images = random_images(batch=2, dtype=np.float32)
    _, kept = jit(lambda x: tower(remat=remat).apply(small, x, mutable=["intermediates"]))(images)
    stages = {f"stage_{i}": {"output": (2, 32 >> i, 32 >> i, 32 << i)} for i in (1, 2, 3, 4)}
    assert jax.tree.map(jnp.shape, kept["intermediates"]) == {"stem": (2, 16, 16, 16)} | stages
    for leaf in jax.tree.leaves(kept["intermediates"]):
        assert (leaf >= 0).all()  # all are behind a ReLU


def test_bfloat16_keeps_f32_variables():
    variables, images = random_variables(TINY, dtype=np.float32), random_images(TINY, 4, dtype=np.float32)
    model = tower(TINY, "bfloat16")
    evaluate = jit(lambda v, x: model.apply(v, x, mutable=["batch_stats", "intermediates"]))
    features, kept = evaluate(variables, images)
    assert features.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(kept["intermediates"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(kept["batch_stats"])} == {jnp.dtype("float32")}
    exact = np.asarray(jit(tower(TINY).apply)(variables, images))
    assert np.abs(features - exact).max() <= 0.05 * np.abs(exact).max()
    step = jit(functools.partial(train_step, model))
    _, statistics, grads = step(variables, images, np.ones((4, EMBED), np.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves((statistics, grads))} == {jnp.dtype("float32")}
    train = functools.partial(model.apply, train=True, mutable=["batch_stats", "intermediates"])
    _, kept = jax.eval_shape(train, variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept["intermediates"])} == {jnp.dtype("bfloat16")}


def test_average_pool():
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
    pooled = average_pool(jnp.asarray(x), 2)
    assert pooled.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(pooled[:, 1, 2], x[:, 2:4, 4:6].mean((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(average_pool(jnp.asarray(x), 1), x)


def test_a_block_starts_as_its_shortcut():
    """The last BatchNorm of each bottleneck starts at 0: a block without a shortcut convolution changes nothing."""
    params = initial(SMALL)["params"]
    rest = {path for path in leaf_paths(params) if path.endswith("scale")}
    zero = {f"stage_{stage}/block_{i}/bn_3/scale" for stage, n in enumerate(SMALL.layers, 1) for i in range(n)}
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        if path in rest:
            assert (leaf == (path not in zero)).all(), path
    assert zero < rest


def test_initial_values_of_every_tensor():
    """Uniform on ±fan_in^-.5 for convolutions and the pool's biases, normal for the rest of the pool."""
    pool_std = (32 * SMALL.width) ** -0.5
    params = initial(SMALL)["params"]
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        slack = 5 / math.sqrt(2 * leaf.size)  # five standard errors of a standard deviation
        largest = float(np.abs(leaf).max())
        if path.startswith("attention_pool") and not path.endswith("bias"):
            assert float(leaf.std()) == pytest.approx(pool_std, rel=slack), path
            assert largest > 2.5 * pool_std, path
        elif path.startswith("attention_pool") or path.endswith("kernel"):
            bound = pool_std if path.endswith("bias") else math.prod(leaf.shape[:-1]) ** -0.5
            assert float(leaf.std()) == pytest.approx(bound / math.sqrt(3), rel=slack), path
            assert largest <= bound, path
        elif path.endswith("bias"):
            assert (leaf == 0).all(), path
