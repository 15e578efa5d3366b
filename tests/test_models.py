"""The models against the paper's counts, and by their properties."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP, count_parameters, forward, forward_train, init_variables, unit
from clip_jax.models.layers import Block, BlockInit
from clip_jax.models.variants import (
    PARAMETERS,
    VARIANTS,
    ModelConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
    model_config,
    variant_name,
)
from clip_jax.models.vit import drop_patches, patchify
from clip_jax.rules import leaf_paths

SMALL = ModelConfig(
    embed_dim=24,
    vision=ViTConfig(image_size=12, patch=4, width=32, heads=2, layers=2),
    text=TextConfig(width=16, heads=2, layers=2, context=10, vocab_size=64),
)
SOT, EOT = 62, 63


@pytest.fixture(scope="module")
def small():
    model = CLIP(SMALL)
    return model, initial(model)


def initial(model):
    return jax.jit(lambda: init_variables(model, jax.random.key(0)))()["params"]


def tokens_of(*lengths: int) -> jnp.ndarray:
    """Rows SOT, 1, 2, …, EOT with that many tokens between, then padding."""
    rows = np.zeros((len(lengths), SMALL.text.context), np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[: length + 2] = [SOT, *range(1, length + 1), EOT]
    return jnp.asarray(rows)


# BatchNorm's running means and variances.
BUFFERS = {"RN50": 53_248, "RN101": 105_472, "RN50x4": 109_760, "RN50x16": 193_920, "RN50x64": 410_624}
IMAGE_TOWERS = {
    "RN50": 38_316_896,
    "RN101": 56_259_936,
    "RN50x4": 87_137_080,
    "RN50x16": 167_328_912,
    "RN50x64": 420_380_352,
    "ViT-B/32": 87_849_216,
    "ViT-B/16": 86_192_640,
    "ViT-L/14": 303_966_208,
    "ViT-L/14@336": 304_293_888,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_and_buffer_counts_equal_the_papers(name):
    model = clip_jax.create_model(name)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    params = variables["params"]
    assert count_parameters(params) == PARAMETERS[name]
    assert count_parameters(params["image"]) == IMAGE_TOWERS[name]
    assert count_parameters(params["text"]) == PARAMETERS[name] - IMAGE_TOWERS[name] - 1
    assert count_parameters(variables["batch_stats"]) == BUFFERS.get(name, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_a_resnets_running_statistics_move_in_training_only():
    config = dataclasses.replace(SMALL, vision=ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 1, 1, 1)))
    model = CLIP(config)
    variables = jax.jit(lambda: init_variables(model, jax.random.key(0)))()
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    tokens = tokens_of(1, 2, 3, 4)
    trained, stats = jax.jit(lambda: forward_train(model, variables, images, tokens))()
    assert all((a != b).all() for a, b in zip(*map(jax.tree.leaves, (stats, variables["batch_stats"])), strict=True))
    evaluated = jax.jit(lambda: forward(model, variables, images, tokens))()
    assert (trained.image != evaluated.image).any()
    assert (trained.text == evaluated.text).all()
    moved = jax.jit(lambda: forward(model, variables | {"batch_stats": stats}, images, tokens))()
    assert (moved.image != evaluated.image).any()


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown model 'ViT-B/23'; did you mean 'ViT-B/32'\?.*RN50x64"):
        clip_jax.create_model("ViT-B/23")


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_names_round_trip(name):
    assert variant_name(model_config(name.lower().replace("/", "-"))) == name


def test_a_later_token_changes_no_earlier_state(small):
    """Causality by gradients: the state of token i depends on tokens up to i only."""
    model, params = small
    tokens = tokens_of(6)

    def states(positions):
        changed = params | {"text": params["text"] | {"positions": positions}}
        _, kept = model.apply({"params": changed}, tokens, method="encode_text", mutable=["intermediates"])
        return kept["intermediates"]["text"]["transformer"]["block_1"]["output"][0]

    jacobian = np.abs(jax.jit(jax.jacobian(states))(params["text"]["positions"])).sum(axis=(1, 3))
    later = np.triu(np.ones_like(jacobian), 1)
    assert (jacobian[later == 1] == 0).all()
    assert (jacobian[later == 0] > 0).all()


def test_tokens_after_eot_change_nothing(small):
    model, params = small
    tokens = tokens_of(3, 5)
    noisy = jnp.where(jnp.cumsum(tokens == EOT, axis=1) - (tokens == EOT) > 0, 7, tokens)
    assert (noisy != tokens).any()
    encode = jax.jit(lambda rows: model.apply({"params": params}, rows, method="encode_text"))
    assert jnp.array_equal(encode(tokens), encode(noisy))


def test_batch_rows_are_independent(small):
    model, params = small
    images = jax.random.normal(jax.random.key(1), (4, 12, 12, 3))
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode_image"))
    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_array_equal(encode(images)[order], encode(images[order]))


def test_output_is_unit_features_and_the_initial_temperature(small):
    model, params = small
    images = jax.random.normal(jax.random.key(1), (3, 12, 12, 3))
    output = model.apply({"params": params}, images, tokens_of(1, 2, 3))
    for features in (output.image, output.text):
        assert features.shape == (3, 24)
        np.testing.assert_allclose(jnp.linalg.norm(features, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(output.scale, 1 / 0.07, rtol=1e-6)
    raw = model.apply({"params": params}, images, method="encode_image")
    np.testing.assert_allclose(unit(raw), output.image, rtol=1e-6)


def test_named_intermediates(small):
    model, params = small
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    _, kept = model.apply({"params": params}, images, tokens_of(1, 2), mutable=["intermediates"])
    paths = leaf_paths(kept["intermediates"])
    towers = {"image": ("patches", "pooled"), "text": ("pooled",)}
    expected = {f"{tower}/{name}" for tower, names in towers.items() for name in names}
    expected |= {f"{tower}/transformer/block_{i}/output" for tower in towers for i in range(2)}
    assert set(paths) == expected
    assert kept["intermediates"]["image"]["pooled"].shape == (2, 32)


def test_bfloat16_keeps_f32_parameters_and_features(small):
    model = CLIP(dataclasses.replace(SMALL, dtype="bfloat16"))
    params = initial(model)
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    apply = jax.jit(lambda x: model.apply({"params": params}, x, tokens_of(1, 2), mutable=["intermediates"]))
    output, kept = apply(images)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in output} == {jnp.dtype("float32")}
    exact = forward(small[0], {"params": params}, images, tokens_of(1, 2))
    np.testing.assert_allclose(output.image, exact.image, atol=0.02)


@pytest.mark.parametrize("vision", [SMALL.vision, ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 1, 1, 1))])
def test_parameters_are_f32_where_jax_is_told_to_use_f64(vision):
    """With others, a run's own checkpoint would be called damaged there."""
    model = CLIP(dataclasses.replace(SMALL, vision=vision, logit_bias=True))
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}


def test_patches_are_row_major():
    image = jnp.arange(4 * 4 * 3, dtype=jnp.float32).reshape(1, 4, 4, 3)
    patches = patchify(image, patch=2)
    assert patches.shape == (1, 4, 12)
    np.testing.assert_array_equal(patches[0, 1], image[0, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(patches[0, 2], image[0, 2:, :2].reshape(-1))


def test_patch_embedding_is_the_convolution():
    """Stride = kernel: the dense layer on patches and the convolution are one sum."""
    image = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    kernel = jax.random.normal(jax.random.key(1), (4, 4, 3, 8))
    convolved = jax.lax.conv_general_dilated(
        image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    dense = jnp.matmul(patchify(image, patch=4), kernel.reshape(-1, 8), precision="highest")
    np.testing.assert_allclose(dense, convolved.reshape(2, 9, 8), atol=1e-5)


def test_the_configs_activation_reaches_both_towers(small):
    model, params = small
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    ours = forward(model, {"params": params}, images, tokens_of(1, 2))
    other = forward(CLIP(dataclasses.replace(SMALL, activation="gelu")), {"params": params}, images, tokens_of(1, 2))
    for a, b in zip(ours[:2], other[:2], strict=True):
        assert 1e-5 < np.abs(a - b).max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "wrapped"),
    [
        # `full`: in the replay of the whole, and backward
        (dataclasses.replace(SMALL.vision, layers=3), {"dots": 6, "block": 6, "full": 2 + 2 * 6}),
        (ResNetConfig(32, 8, 4, (1, 3, 1, 1)), {"dots": 9, "block": 9, "full": 5 + 2 * 9}),
    ],
    ids=["vit", "resnet"],
)
@pytest.mark.parametrize("scan", [pytest.param(False, id="unrolled"), pytest.param(True, id="scan")])
def test_memory_levers_reach_both_towers_and_change_no_name_and_no_value(vision, wrapped, scan):
    """Every transformer block and bottleneck is recomputed, with `full` every transformer and stage too."""
    config = dataclasses.replace(SMALL, vision=vision, text=dataclasses.replace(SMALL.text, layers=3))
    plain = CLIP(config)
    models = {
        remat: CLIP(dataclasses.replace(config, remat=remat, scan_layers=scan))
        for remat in (("none", "full") if scan else wrapped)
    }
    inits = [jax.jit(lambda m=m: init_variables(m, jax.random.key(0)))() for m in (plain, models["full"])]
    assert jax.tree.structure(inits[0]) == jax.tree.structure(inits[1])
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, inits), strict=True))
    variables = inits[0]
    images = jax.random.normal(jax.random.key(1), (4, vision.image_size, vision.image_size, 3))

    def loss(params, model):
        output, stats = forward_train(model, variables | {"params": params}, images, tokens_of(1, 2, 3, 4))
        return (output.image * output.text).sum(), stats

    gradients_of = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    expected = gradients_of(variables["params"], plain)
    for remat, model in models.items():
        jaxpr = str(jax.make_jaxpr(jax.grad(loss, has_aux=True), static_argnums=1)(variables["params"], model))
        if not scan:
            assert jaxpr.count("= remat2[") + jaxpr.count("= checkpoint[") == wrapped[remat]
        assert (" scan[" in jaxpr) == scan
        found = gradients_of(variables["params"], model)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_each_policy_keeps_less_for_the_backward_pass(scan):
    model = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, layers=4), scan_layers=scan)
    params = jax.eval_shape(lambda: init_variables(CLIP(model), jax.random.key(0)))["params"]
    images = jnp.ones((4, model.vision.image_size, model.vision.image_size, 3))
    kept = {}
    for remat in ("none", "dots", "block", "full"):
        tower = CLIP(dataclasses.replace(model, remat=remat))

        def pull(params, tower=tower):
            return jax.vjp(
                lambda p: forward_train(tower, {"params": p}, images, tokens_of(1, 2, 3, 4))[0].image, params
            )

        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p: pull(p)[1], params)))
    print(kept)
    assert kept["none"] > kept["dots"] > kept["block"] > kept["full"]


def test_dots_recomputes_no_product_and_no_convolution():
    """But attention's two in every block."""
    vision = ResNetConfig(32, 8, 4, (1, 1, 1, 1))
    images = jnp.ones((4, 32, 32, 3))
    counts = {}
    for remat in ("none", "dots", "block"):
        model = CLIP(dataclasses.replace(SMALL, vision=vision, remat=remat))
        variables = jax.eval_shape(lambda model=model: init_variables(model, jax.random.key(0)))

        def loss(params, stats, model=model):
            output, _ = forward_train(model, {"params": params, "batch_stats": stats}, images, tokens_of(1, 2, 3, 4))
            return (output.image * output.text).sum()

        text = str(jax.make_jaxpr(jax.grad(loss))(variables["params"], variables["batch_stats"]))
        counts[remat] = text.count("conv_general_dilated["), text.count("dot_general[")
    assert counts["dots"] == (counts["none"][0], counts["none"][1] + 2 * SMALL.text.layers)
    assert counts["block"][0] == counts["none"][0] + len(vision.layers)
    assert counts["block"][1] > counts["dots"][1]


@pytest.mark.parametrize(("platform", "walls"), [("cpu", 0), ("cuda", 2), ("tpu", 0)])
def test_no_product_adds_to_the_stream_on_gpus(platform, walls):
    block = Block(SMALL.text, False, BlockInit.scaled(SMALL.text), SMALL)
    x = jnp.ones((2, 3, 16))
    variables = block.init(jax.random.key(0), x)
    text = jax.jit(block.apply).trace(variables, x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.optimization_barrier") == walls


def test_patch_dropout_keeps_a_subset_of_every_image():
    patches = jnp.arange(2 * 10 * 3, dtype=jnp.float32).reshape(2, 10, 3)
    keys = jax.random.split(jax.random.key(0), 2)
    found = drop_patches(patches, keys, share=0.55)
    assert found.shape == (2, 4, 3)
    for image, kept in zip(patches, found, strict=True):
        rows = [int(np.flatnonzero((image == row).all(1))[0]) for row in kept]
        assert rows == sorted(set(rows))
    again = drop_patches(patches[1:], keys[1:], share=0.55)
    np.testing.assert_array_equal(found[1:], again)  # an image's patches do not depend on its batch
    other = drop_patches(patches, jax.random.split(jax.random.key(1), 2), share=0.55)
    assert (other != found).any()
    assert drop_patches(patches, keys, share=0.99).shape == (2, 1, 3)


def test_patch_dropout_is_for_training():
    """Evaluation sees all patches; so does training without keys, and a share of 0."""
    plain = CLIP(SMALL)
    dropping = CLIP(dataclasses.replace(SMALL, patch_dropout=0.5))
    variables = init_variables(plain, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, SMALL.vision.image_size, SMALL.vision.image_size, 3))
    keys, tokens = jax.random.split(jax.random.key(2), 2), tokens_of(1, 2)
    whole = forward(plain, variables, images, tokens).image
    np.testing.assert_array_equal(forward(dropping, variables, images, tokens).image, whole)
    assert (forward_train(dropping, variables, images, tokens, keys=keys)[0].image != whole).any()
    np.testing.assert_array_equal(forward_train(plain, variables, images, tokens, keys=keys)[0].image, whole)
    frozen, _ = forward_train(dropping, variables, images, tokens, keys=keys, train_image=False)
    np.testing.assert_array_equal(frozen.image, whole)


def expected_stds(config: ModelConfig) -> dict[str, float]:
    """Standard deviation of every tensor that does not start constant, from the definition of the two schemes."""

    def uniform(bound):
        return bound / math.sqrt(3)

    def blocks(tower, sizes, mlp, scaled):
        width = sizes.width
        into = width**-0.5 * (2 * sizes.layers) ** -0.5
        for i in range(sizes.layers):
            at = f"{tower}/transformer/block_{i}"
            yield f"{at}/attention/qkv/kernel", width**-0.5 if scaled else uniform(math.sqrt(6 / (4 * width)))
            yield f"{at}/attention/out/kernel", into if scaled else uniform(width**-0.5)
            yield f"{at}/mlp/in/kernel", (2 * width) ** -0.5 if scaled else uniform(width**-0.5)
            yield f"{at}/mlp/out/kernel", into if scaled else uniform(mlp**-0.5)
            yield f"{at}/mlp/in/bias", uniform(width**-0.5)
            yield f"{at}/mlp/out/bias", uniform(mlp**-0.5)

    vision, text = config.vision, config.text
    return dict(
        [
            ("image/patch_embedding/kernel", uniform((3 * vision.patch**2) ** -0.5)),
            ("image/class_token", vision.width**-0.5),
            ("image/positions", vision.width**-0.5),
            ("image/projection/kernel", vision.width**-0.5),
            ("text/token_embedding/embedding", 0.02),
            ("text/positions", 0.01),
            ("text/projection/kernel", text.width**-0.5),
            *blocks("image", vision, 4 * vision.width, config.init == "scaled"),
            *blocks("text", text, text.mlp_width, True),
        ]
    )


@pytest.mark.parametrize("scheme", ["released", "scaled"])
def test_initial_standard_deviation_of_every_tensor(scheme):
    config = ModelConfig(
        embed_dim=96,
        vision=ViTConfig(image_size=48, patch=8, width=256, heads=4, layers=3),
        text=TextConfig(width=192, heads=3, layers=2, vocab_size=500, mlp_width=300),
        init=scheme,
    )
    params = initial(CLIP(config))
    stds = expected_stds(config)
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        if path in stds:
            slack = 5 / math.sqrt(2 * leaf.size)  # five standard errors of a standard deviation
            assert float(leaf.std()) == pytest.approx(stds.pop(path), rel=slack), path
        elif path == "logit_scale":
            assert float(leaf) == pytest.approx(math.log(1 / 0.07))
        else:
            assert (leaf == (1 if path.endswith("scale") else 0)).all(), path
    assert not stds
