"""The contrastive loss against a NumPy reference in float64, and by its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from clip_jax.config import MeshConfig
from clip_jax.losses import softmax_loss
from clip_jax.partition import ROWS, make_mesh


def numpy_loss(image, text, scale, weight):
    """The definition: mean of row and column cross-entropy over the pairs that count."""
    kept = weight > 0
    logits = scale * image[kept] @ text[kept].T
    positive = np.diag(logits)
    rows = np.log(np.exp(logits - logits.max()).sum(1)) + logits.max() - positive
    columns = np.log(np.exp(logits - logits.max()).sum(0)) + logits.max() - positive
    return ((rows + columns) / 2 * weight[kept]).sum() / weight[kept].sum()


def pairs(rows=24, width=12, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    image, text = (unit(rng.standard_normal((rows, width))) for _ in range(2))
    return image.astype(dtype), text.astype(dtype)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_value_and_gradients_equal_numpy_in_f64(x64, scale, share):
    image, text = pairs()
    weight = (np.random.default_rng(1).random(len(image)) < share).astype(np.float64)
    value, grads = jax.value_and_grad(lambda *x: softmax_loss(*x, jnp.asarray(weight)).loss, argnums=(0, 1, 2))(
        jnp.asarray(image), jnp.asarray(text), jnp.asarray(scale)
    )
    assert float(value) == pytest.approx(numpy_loss(image, text, scale, weight), rel=1e-12)

    def numeric(i, index):
        """Central difference of the NumPy reference in one entry of argument i."""
        values = []
        for step in (1e-6, -1e-6):
            arguments = [image.copy(), text.copy(), np.asarray(scale)]
            arguments[i][index] += step
            values.append(numpy_loss(*arguments, weight))
        return (values[0] - values[1]) / 2e-6

    for i in (0, 1):
        for index in [(0, 0), (3, 5), (23, 11)]:
            assert float(grads[i][index]) == pytest.approx(numeric(i, index), abs=1e-7 * scale)
    assert float(grads[2]) == pytest.approx(numeric(2, ()), abs=1e-7)


def test_weight_zero_is_as_if_the_pair_were_not_there(x64):
    image, text = pairs()
    weight = np.ones(len(image))
    weight[[2, 7, 23]] = 0
    kept = weight > 0

    def loss(image, text, weight):
        return softmax_loss(image, text, jnp.asarray(50.0), jnp.asarray(weight))

    whole = loss(jnp.asarray(image), jnp.asarray(text), weight)
    part = loss(jnp.asarray(image[kept]), jnp.asarray(text[kept]), weight[kept])
    for a, b in zip(whole, part, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-13)
    gradient = jax.grad(lambda x: loss(x, jnp.asarray(text), weight).loss)(jnp.asarray(image))
    assert (np.asarray(gradient)[~kept] == 0).all()
    assert (np.abs(np.asarray(gradient)[kept]).max(1) > 0).all()


def test_no_pair_counts():
    image, text = map(jnp.asarray, pairs(dtype=np.float32))
    value, gradient = jax.value_and_grad(lambda x: softmax_loss(x, text, jnp.float32(9), jnp.zeros(24)).loss)(image)
    assert float(value) == 0
    assert (gradient == 0).all()


def test_chance_and_perfect_pairs():
    rows = 16
    same = jnp.ones((rows, 4)) / 2
    assert float(softmax_loss(same, same, jnp.float32(100), jnp.ones(rows)).loss) == pytest.approx(np.log(rows))
    perfect = softmax_loss(jnp.eye(rows), jnp.eye(rows), jnp.float32(100), jnp.ones(rows))
    assert float(perfect.loss) == pytest.approx(0, abs=1e-6)
    assert float(perfect.image_accuracy) == float(perfect.text_accuracy) == 1


def test_accuracies_count_who_finds_its_partner(x64):
    """Noisy copies: each side finds its partner sometimes, and not equally often."""
    image, noise = pairs(64)
    text = unit(image + 0.9 * np.sort(noise, axis=0))
    weight = (np.random.default_rng(3).random(64) < 0.8).astype(np.float64)
    output = softmax_loss(jnp.asarray(image), jnp.asarray(text), jnp.asarray(9.0), jnp.asarray(weight))
    kept = np.flatnonzero(weight)
    similarity = image[kept] @ text[kept].T
    by_image = np.mean(similarity.argmax(1) == np.arange(len(kept)))
    by_text = np.mean(similarity.argmax(0) == np.arange(len(kept)))
    assert 0 < by_image < 1
    assert by_image != by_text
    assert (float(output.image_accuracy), float(output.text_accuracy)) == pytest.approx((by_image, by_text))


def test_symmetry_and_permutation(x64):
    image, text = map(jnp.asarray, pairs())
    weight = jnp.asarray(np.random.default_rng(1).integers(0, 2, 24), jnp.float64)
    scale = jnp.asarray(30.0)
    one = softmax_loss(image, text, scale, weight)
    swapped = softmax_loss(text, image, scale, weight)
    assert float(one.loss) == pytest.approx(float(swapped.loss), rel=1e-13)
    assert float(one.image_accuracy) == float(swapped.text_accuracy)
    order = np.random.default_rng(2).permutation(24)
    permuted = softmax_loss(image[order], text[order], scale, weight[order])
    assert float(one.loss) == pytest.approx(float(permuted.loss), rel=1e-13)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2), (1, 8), (2, 1)])
def test_every_mesh_gives_one_loss(x64, data, fsdp):
    """The logits' rows are sharded over the mesh; value and gradients are those of one device."""
    image, text = map(jnp.asarray, pairs(32))
    weight = jnp.asarray(np.random.default_rng(1).integers(0, 2, 32), jnp.float64)
    mesh = make_mesh(MeshConfig(data, fsdp), devices=jax.devices()[: data * fsdp])
    rows = NamedSharding(mesh, ROWS)

    def gradients(sharding, image, text):
        return jax.value_and_grad(
            lambda *x: softmax_loss(*x, weight, logits_sharding=sharding).loss, argnums=(0, 1, 2)
        )(image, text, jnp.asarray(100.0))

    alone = jax.jit(lambda *x: gradients(None, *x))(image, text)
    placed = jax.device_put((image, text), rows)
    sharded = jax.jit(lambda *x: gradients(rows, *x))(*placed)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_the_similarity_matrix_is_sharded():
    """No device holds more than its rows of the [b, b] logits."""
    mesh = make_mesh(MeshConfig())
    rows = NamedSharding(mesh, ROWS)
    image = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=rows)
    weight = jax.ShapeDtypeStruct((512,), jnp.float32, sharding=rows)

    def gradients(image, text, weight):
        return jax.grad(lambda a, b: softmax_loss(a, b, jnp.float32(9), weight, logits_sharding=rows).loss, (0, 1))(
            image, text
        )

    compiled = jax.jit(gradients).lower(image, image, weight).compile()
    assert "f32[512,512]" not in compiled.as_text()
    assert "f32[64,512]" in compiled.as_text()


def test_f32_error_is_within_the_bound(x64):
    """Largest gradient error over largest value, against float64: at most 2e-5."""
    image, text = pairs(256, 64)

    def gradients(dtype):
        arguments = jnp.asarray(image, dtype), jnp.asarray(text, dtype), jnp.asarray(100, dtype)
        return jax.grad(lambda *x: softmax_loss(*x, jnp.ones(256, dtype)).loss, argnums=(0, 1, 2))(*arguments)

    for narrow, wide in zip(gradients(jnp.float32), gradients(jnp.float64), strict=True):
        assert narrow.dtype == jnp.float32
        assert float(jnp.abs(narrow - wide).max() / jnp.abs(wide).max()) < 2e-5
