"""The contrastive losses in all their forms, against a NumPy reference in float64, open_clip's, and by properties."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations
from references import import_open_clip

from benchmarks.loss_memory import MIB, contenders, measure
from clip_jax.config import LossConfig, MeshConfig
from clip_jax.models.clip import CLIPOutput
from clip_jax.partition import make_mesh, row_sharding
from clip_jax.training.losses import chance_loss
from clip_jax.training.step import contrastive_loss

KINDS = ("softmax", "sigmoid")
FORMS = ("reference", "chunked", "ring")
LOSSES = list(itertools.product(KINDS, FORMS))
MESHES = [(1, 1), (2, 1), (2, 4), (8, 1)]
MORE_MESHES = [(1, 2), (4, 1), (2, 2), (1, 4), (4, 2), (1, 8)]
GRADIENTS = ("image", "text", "scale", "bias")


def definition(kind, image, text, scale, bias, weight):
    """Returns loss and gradients in NumPy, from the definitions and by hand."""
    kept = weight > 0
    share = weight[kept] / max(weight.sum(), 1e-300)
    x, y = image[kept], text[kept]
    own = np.eye(len(share), dtype=bool)
    if kind == "softmax":
        logits = scale * x @ y.T
        rows, columns = (np.exp(logits - logits.max(a, keepdims=True)) for a in (1, 0))
        top = logits.max(1) + logits.max(0)
        sides = np.log(rows.sum(1)) + np.log(columns.sum(0)) + top
        loss = (share * (sides / 2 - logits[own])).sum()
        rows, columns = rows / rows.sum(1, keepdims=True), columns / columns.sum(0)
        g = (share[:, None] * rows + share * columns) / 2 - np.diag(share)
    else:
        logits = scale * x @ y.T + bias
        sign, both = np.where(own, 1, -1), (share[:, None] + share) / 2
        loss = (both * np.logaddexp(0, -sign * logits)).sum()
        g = -both * sign / (1 + np.exp(sign * logits))
    gradients = [
        np.zeros_like(image),
        np.zeros_like(text),
        (g * (x @ y.T)).sum(),
        g.sum() if kind == "sigmoid" else 0.0,
    ]
    gradients[0][kept], gradients[1][kept] = scale * g @ y, scale * g.T @ x
    return loss, gradients


def pairs(rows=24, width=12, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    image, text = (unit(rng.standard_normal((rows, width))) for _ in range(2))
    return image.astype(dtype), text.astype(dtype)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def some(rows, share=0.6, seed=1):
    """Random 0/1 weights."""
    return (np.random.default_rng(seed).random(rows) < share).astype(np.float64)


@functools.cache
def compiled(config, mesh=None):
    """Returns the jitted ((loss, LossOutput), gradients) of (CLIPOutput, weight)."""

    def loss(output, weight):
        found = contrastive_loss(config, output, weight, mesh=mesh)
        return found.loss, found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def evaluate(config, image, text, scale, bias, weight, *, mesh=None):
    """Returns (LossOutput, gradients by GRADIENTS) in the features' dtype."""
    rows = [jnp.asarray(each, image.dtype) for each in (image, text, weight)]
    if mesh is not None:
        rows = jax.device_put(rows, row_sharding(mesh))
    scalars = jnp.asarray(scale, image.dtype), jnp.asarray(bias, image.dtype)
    (_, output), gradients = compiled(config, mesh)(CLIPOutput(*rows[:2], *scalars), rows[2])
    return output, gradients


def relative(found, expected):
    """Largest difference over largest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300))


def assert_equal_to_definition(config, arguments, *, mesh=None, bound=1e-10):
    loss, gradients = definition(config.kind, *arguments)
    output, found = evaluate(config, *arguments, mesh=mesh)
    assert abs(float(output.loss) - loss) <= bound * max(1, abs(loss))
    for name, a, b in zip(GRADIENTS, found, gradients, strict=True):
        assert a.dtype == jnp.float64
        assert np.abs(np.asarray(a) - b).max() <= bound * max(np.abs(b).max(), 1), name


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


CASES = {
    "every pair, scale 14": lambda rows: (*pairs(rows), 14.0, -10.0, np.ones(rows)),
    "random weights, scale 100": lambda rows: (*pairs(rows), 100.0, -10.0, some(rows)),
    "fractional weights": lambda rows: (*pairs(rows), 30.0, 3.0, some(rows) * np.linspace(0.1, 3, rows)),
    "identical embeddings": lambda rows: (*(np.full((rows, 12), 12**-0.5),) * 2, 100.0, -10.0, some(rows)),
    "one pair counts": lambda rows: (*pairs(rows), 100.0, -10.0, (np.arange(rows) == rows - 1).astype(np.float64)),
    "perfect pairs, scale 100": lambda rows: (*(pairs(rows)[0],) * 2, 100.0, -10.0, np.ones(rows)),
}


@pytest.mark.parametrize(
    "mesh", [*MESHES, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE_MESHES)], ids=str
)
def test_value_and_gradients_are_the_definition_on_every_mesh(x64, mesh):
    """In float64, 40 pairs, so that the last tile of 3 is not full on 1, 2, 4 or 8 devices."""
    devices = make_mesh(MeshConfig(*mesh), devices=jax.devices()[: mesh[0] * mesh[1]])
    for (kind, form), case in itertools.product(LOSSES, CASES.values()):
        assert_equal_to_definition(LossConfig(kind, form, tile=3), case(40), mesh=devices)


@pytest.mark.parametrize(("kind", "form"), LOSSES)
def test_one_pair_on_each_device(x64, kind, form):
    for case in CASES.values():
        assert_equal_to_definition(LossConfig(kind, form), case(8), mesh=make_mesh(MeshConfig(2, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_references_gradients_are_its_differences(kind):
    arguments = CASES["fractional weights"](7)
    _, gradients = definition(kind, *arguments)
    for i, gradient in enumerate(gradients):
        for index in [(0, 0), (3, 5), (6, 11)] if i < 2 else [()]:
            values = []
            for step in (1e-6, -1e-6):
                moved = [np.array(each, np.float64) for each in arguments]
                moved[i][index] += step
                values.append(definition(kind, *moved)[0])
            assert np.asarray(gradient)[index] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_open_clips_losses_are_these(x64, kind):
    """Value and gradients in float64 of ClipLoss and SigLipLoss."""
    losses = import_open_clip().loss
    import torch

    image, text = pairs(24)
    arguments = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (image, text, 50.0, -3.0)]
    if kind == "softmax":
        theirs = losses.ClipLoss()(*arguments[:3])
        arguments = arguments[:3]
    else:
        theirs = losses.SigLipLoss()(*arguments)
    theirs.backward()
    for form in FORMS:
        output, gradients = evaluate(LossConfig(kind, form), image, text, 50.0, -3.0, np.ones(24))
        assert float(output.loss) == pytest.approx(theirs.item(), rel=1e-12)
        for mine, their in zip(gradients, arguments, strict=False):
            assert relative(mine, their.grad) <= 1e-12


@pytest.mark.parametrize(("kind", "form"), LOSSES)
def test_weight_zero_is_as_if_the_pair_were_not_there(x64, kind, form):
    """Whatever the pair holds, it changes no bit of the others and gets no gradient."""
    image, text = pairs()
    weight = np.ones(len(image))
    weight[[2, 7, 23]] = 0
    kept = weight > 0
    one, gradients = evaluate(LossConfig(kind, form), image, text, 50.0, -3.0, weight)
    part, of_part = evaluate(LossConfig(kind, form), image[kept], text[kept], 50.0, -3.0, weight[kept])
    other, _ = evaluate(LossConfig(kind, form), np.where(kept[:, None], image, 3), text, 50.0, -3.0, weight)
    assert list(one) == list(other)
    np.testing.assert_allclose(one, part, rtol=1e-13)
    for mine, theirs in zip(gradients[:2], of_part[:2], strict=True):
        assert (np.asarray(mine)[~kept] == 0).all()
        np.testing.assert_allclose(np.asarray(mine)[kept], theirs, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("kind", "form"), LOSSES)
def test_no_pair_counts(kind, form):
    output, gradients = evaluate(LossConfig(kind, form), *pairs(dtype=np.float32), 9.0, -3.0, np.zeros(24))
    assert [float(value) for value in output] == [0, 0, 0]
    assert all((leaf == 0).all() for leaf in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_chance_and_perfect_pairs(form):
    rows = 16
    same = np.full((rows, 4), 0.5, np.float32)
    chance, _ = evaluate(LossConfig("softmax", form), same, same, 100.0, 0.0, np.ones(rows))
    assert float(chance.loss) == pytest.approx(chance_loss("softmax", rows), rel=1e-6)
    best = -np.log(rows - 1.0)  # the logit of a guess that a pairing is right
    chance, _ = evaluate(LossConfig("sigmoid", form), same, same, 1.0, best - 1.0, np.ones(rows))
    assert float(chance.loss) == pytest.approx(chance_loss("sigmoid", rows), rel=1e-6)
    assert chance_loss("sigmoid", 1) == chance_loss("softmax", 1) == 0
    eye = np.eye(rows, dtype=np.float32)
    for kind, bias in (("softmax", 0.0), ("sigmoid", -50.0)):
        perfect, _ = evaluate(LossConfig(kind, form), eye, eye, 100.0, bias, np.ones(rows))
        assert float(perfect.loss) == pytest.approx(0, abs=1e-6)
        assert float(perfect.image_accuracy) == float(perfect.text_accuracy) == 1


@pytest.mark.parametrize("mesh", [None, (4, 2)])
@pytest.mark.parametrize(("kind", "form"), LOSSES)
def test_accuracies_count_who_finds_its_partner(x64, kind, form, mesh):
    """Noisy copies: each side finds its partner sometimes, and not equally often; a caption that occurs twice never."""
    image, noise = pairs(64)
    text = unit(image + 0.9 * np.sort(noise, axis=0))
    text[9] = text[8]
    weight = some(64, 0.8, seed=3)
    weight[[8, 9]] = 1
    devices = None if mesh is None else make_mesh(MeshConfig(*mesh))
    output, _ = evaluate(LossConfig(kind, form, tile=5), image, text, 9.0, -3.0, weight, mesh=devices)
    kept = np.flatnonzero(weight)
    similarity = image[kept] @ text[kept].T
    similarity[np.arange(len(kept)) != np.arange(len(kept))[:, None]] += 1e-9  # a tie is lost
    by_image = np.mean(similarity.argmax(1) == np.arange(len(kept)))
    by_text = np.mean(similarity.argmax(0) == np.arange(len(kept)))
    assert 0 < by_image < 1
    assert by_image != by_text
    assert (float(output.image_accuracy), float(output.text_accuracy)) == pytest.approx((by_image, by_text))


@pytest.mark.parametrize(("kind", "form"), LOSSES)
def test_symmetry_and_permutation(x64, kind, form):
    image, text = pairs()
    config, weight = LossConfig(kind, form, tile=7), some(24)
    one, _ = evaluate(config, image, text, 30.0, -3.0, weight)
    swapped, _ = evaluate(config, text, image, 30.0, -3.0, weight)
    assert float(one.loss) == pytest.approx(float(swapped.loss), rel=1e-13)
    assert float(one.image_accuracy) == float(swapped.text_accuracy)
    order = np.random.default_rng(2).permutation(24)
    permuted, _ = evaluate(config, image[order], text[order], 30.0, -3.0, weight[order])
    assert float(one.loss) == pytest.approx(float(permuted.loss), rel=1e-13)


@pytest.mark.parametrize("pairing", ["random", "correlated"])
@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_f32_errors_are_within_the_bound(x64, kind, scale, pairing):
    """Largest gradient error over largest value, against float64: at most 2e-5, and at most twice the plain form's."""
    image, text = pairs(256, 64)
    if pairing == "correlated":
        text = unit(image + 2 * text)
    narrow = [each.astype(np.float32) for each in (image, text)]
    wide = [each.astype(np.float64) for each in narrow]
    _, exact = evaluate(LossConfig(kind, "reference"), *wide, scale, -10.0, np.ones(256))
    errors = {}
    for form in FORMS:
        _, found = evaluate(LossConfig(kind, form, tile=64), *narrow, scale, -10.0, np.ones(256))
        assert all(leaf.dtype == jnp.float32 for leaf in found)
        leaves = (*zip(found[:2], exact[:2], strict=True), (found.scale, exact.scale))
        errors[form] = np.max([relative(a, b) for a, b in leaves])
    print(kind, scale, pairing, {form: f"{error:.1e}" for form, error in errors.items()})
    largest = np.max(list(errors.values()))
    assert largest <= 2e-5
    assert largest <= 2 * errors["reference"]


@pytest.mark.parametrize("form", ["chunked", "ring"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_products_round_operands_and_nothing_else(kind, form):
    """Features that bf16 holds exactly give the same loss; gradients differ by the rounding of G only."""
    rounded = [np.asarray(jnp.asarray(each, jnp.bfloat16), np.float32) for each in pairs(256, 64)]
    arguments = (*rounded, 20.0, -10.0, np.ones(256))
    full, exact = evaluate(LossConfig(kind, form), *arguments)
    narrow, found = evaluate(LossConfig(kind, form, products="bfloat16"), *arguments)
    assert float(narrow.loss) == pytest.approx(float(full.loss), rel=1e-6)
    for a, b in zip(found[:2], exact[:2], strict=True):
        assert a.dtype == jnp.float32
        assert 0 < relative(a, b) <= 2**-8


@pytest.mark.parametrize(("form", "products"), [*((form, "full") for form in FORMS), ("chunked", "bfloat16")])
def test_products_are_of_the_operands_asked_for_and_not_rounded_further(form, products):
    """TPUs would multiply float32 in bfloat16, if they were not asked not to."""

    def loss(image, text):
        output = CLIPOutput(image, text, jnp.float32(9), jnp.float32(-3))
        return contrastive_loss(LossConfig("softmax", form, products=products), output, jnp.ones(24), mesh=None).loss

    found = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*pairs(dtype=np.float32)).jaxpr
    dots = [each for each in equations(found) if each.primitive.name == "dot_general" and each.outvars[0].aval.ndim]
    assert len(dots) == (3 if form == "reference" else 4)
    asked = "float32" if products == "full" else products
    assert {var.aval.dtype.name for dot in dots for var in dot.invars} == {asked}
    assert {dot.outvars[0].aval.dtype.name for dot in dots} == {"float32"}
    assert {dot.params["precision"] for dot in dots} == {(jax.lax.Precision.HIGHEST,) * 2}


def test_memory_at_32768_pairs_and_what_the_devices_say_to_each_other():
    """XLA's temporary bytes a device, of value and gradients: 8 devices, 768 channels."""
    mesh = make_mesh(MeshConfig())
    losses = {name: loss for name, loss in contenders(mesh).items() if name.endswith(("chunked", "ring"))}
    collectives = ("all-gather(", "reduce-scatter(", "collective-permute(", "all-to-all(")
    for name, found, text in measure(losses, 32_768, 768, mesh=mesh):
        print(f"{name}: {found / MIB:.1f} MiB")
        assert found <= (80 if name.endswith("ring") else 450) * MIB
        counts = [text.count(f" {each}") for each in collectives]
        assert (counts[0] > 0, counts[1] > 0, counts[2] > 0, counts[3]) == (
            (False, False, True, 0) if name.endswith("ring") else (True, True, False, 0)
        )
        assert "32768,32768]" not in text
        assert "4096,32768]" not in text
