"""Our kernels for QuickGELU, interpreted, beside its definition; where they are refused, and what a GPU is given."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import tracing_for
from jaxprs import runs_of
from tiny import TINY

from clip_jax.errors import ConfigError
from clip_jax.models import activation_kernel, activations, gpu_kernels
from clip_jax.models.activation_kernel import AT_ONCE, ROWS, quick_gelu
from clip_jax.models.activations import ACTIVATIONS, activates_by_kernels
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.dense import add_parameter
from clip_jax.models.layers import MLP, BlockInit, Transformer
from clip_jax.models.variants import TextConfig
from clip_jax.partition import make_mesh


def by_kernels(product, bias):
    return quick_gelu(product, bias, True)


def by_definition(product, bias):
    return ACTIVATIONS["quick_gelu"](add_parameter(product, bias))


def both_ways(function, product, bias, gradient):
    result, pull = jax.vjp(function, product, bias)
    return result, *pull(gradient)


def operands(shape, dtype):
    """Returns a product, a bias and a gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    product, bias, gradient = (
        2 * jax.random.normal(*each, dtype) for each in zip(keys, (shape, shape[-1:], shape), strict=True)
    )
    return product, bias.astype(jnp.promote_types(dtype, jnp.float32)), gradient


def errors(found, exact):
    """Returns the differences' norms over the norms."""
    pairs = [(np.float64(a), np.float64(b)) for a, b in zip(found, exact, strict=True)]
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 5, 256), (ROWS, 128), (3, 171, 128), (2, ROWS, 384)])
def test_result_and_gradients_are_the_definitions_in_f64(shape):
    """Behind the last row an interpreted kernel finds NaN: none may count."""
    with jax.enable_x64(True):
        given = operands(shape, jnp.float64)
        found, expected = (
            jax.jit(functools.partial(both_ways, function))(*given) for function in (by_kernels, by_definition)
        )
        assert np.max(errors(found, expected)) < 1e-14


def test_rows_are_read_and_written_behind_a_mask():
    """What is written behind the last row an interpreted kernel does not show."""
    program = str(jax.make_jaxpr(functools.partial(both_ways, quick_gelu))(*operands((5, 128), jnp.bfloat16)))
    accesses = re.findall(rf"<- \w+\[\w+:\w+\+{AT_ONCE},:\].*", program)
    assert len(accesses) == 2 + 3
    assert all("mask=" in access for access in accesses)


def test_in_bf16_it_is_as_close_to_the_definition():
    given = operands((4, 100, 128), jnp.bfloat16)
    with jax.enable_x64(True):
        exact = both_ways(by_definition, *(jnp.float64(x) for x in given))
    ours, plain = (errors(both_ways(function, *given), exact) for function in (by_kernels, by_definition))
    print(f"errors of result and gradients {ours}, {plain} without the kernels")
    assert all(a <= b for a, b in zip(ours, plain, strict=True))


@pytest.fixture
def interpreted(monkeypatch):
    """Lets a step use the kernels without a GPU; gives how often each shape was asked for."""
    asked = []

    def compute_interpreted(product, bias):
        asked.append(product.shape)
        return quick_gelu(product, bias, True)

    monkeypatch.setattr(gpu_kernels, "lacking", lambda dtype: "")
    monkeypatch.setattr(activation_kernel, "quick_gelu", compute_interpreted)
    return asked


@pytest.mark.parametrize("devices", [1, 4])
def test_a_step_computes_by_them_what_it_does_without(interpreted, devices):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (4, 7, 32), jnp.float64)

        def both(kind):
            model = dataclasses.replace(TINY.model, dtype="float64", mlp=kind)
            module = MLP(128, BlockInit.torch_default(TINY.model.text), model)
            variables = jax.tree.map(jnp.float64, module.init(jax.random.key(1), x))
            with jax.set_mesh(make_mesh(TINY.mesh, devices=jax.devices()[:devices])):
                result, pull = jax.jit(functools.partial(jax.vjp, module.apply))(variables, x)
                return jax.tree.leaves((result, pull(jnp.cos(x))))

        found = both("pallas")
        assert interpreted == [(4 // devices, 7, 128)]
        assert np.max(errors(found, both("xla"))) < 1e-14
        assert len(interpreted) == 1


def test_outside_of_a_step_they_are_not_used():
    assert not activates_by_kernels("pallas", jnp.bfloat16, 128, "quick_gelu")
    assert not activates_by_kernels("auto", jnp.bfloat16, 128, "quick_gelu")
    module = MLP(128, BlockInit.torch_default(TINY.model.text), dataclasses.replace(TINY.model, mlp="pallas"))
    module.init(jax.random.key(0), jnp.ones((1, 2, 8)))


@pytest.fixture
def in_a_step():
    with jax.sharding.use_abstract_mesh(make_mesh(TINY.mesh, devices=jax.devices()[:1]).abstract_mesh):
        yield


@pytest.mark.parametrize(
    ("width", "dtype", "activation", "reason"),
    [
        (128, jnp.bfloat16, "gelu", "config.model.activation is gelu, not quick_gelu"),
        (192, jnp.bfloat16, "quick_gelu", "the MLP is 192 wide, not a multiple of 128"),
        (128, jnp.float32, "quick_gelu", "config.model.dtype is float32, not bfloat16"),
        (128, jnp.bfloat16, "quick_gelu", "the devices are not NVIDIA GPUs since A100"),
    ],
)
def test_where_they_cannot_be_used_they_are_refused(in_a_step, width, dtype, activation, reason):
    with pytest.raises(ConfigError, match=f"^config.model.mlp is pallas, and {reason}; auto uses what can be used$"):
        activations.activate(jnp.ones((1, 2, width), dtype), jnp.zeros(width), activation)


@pytest.mark.parametrize(
    ("used", "given"),
    [
        (True, {}),
        (False, {"width": 192}),
        (False, {"dtype": "float32"}),
        (False, {"activation": "gelu"}),
        (False, {"capability": 8.0}),  # no such card has timed them
    ],
)
def test_auto_uses_them_where_they_have_been_timed(in_a_step, monkeypatch, used, given):
    settings = {"dtype": "bfloat16", "width": 128, "activation": "quick_gelu", "capability": 9.0} | given
    capability = settings.pop("capability")
    monkeypatch.setattr(gpu_kernels, "traced_for", lambda: "gpu")
    monkeypatch.setattr(gpu_kernels, "capability", lambda: capability)
    assert activates_by_kernels("auto", **settings) == used
    assert activates_by_kernels("pallas", **settings)
    assert not activates_by_kernels("xla", **settings)


@pytest.mark.parametrize("method", ["encode_image", "encode_text"])
def test_the_config_reaches_both_towers(in_a_step, method):
    towers = {name: dataclasses.replace(getattr(TINY.model, name), width=32) for name in ("vision", "text")}
    model = CLIP(dataclasses.replace(TINY.model, **towers, dtype="bfloat16", mlp="pallas"))
    plain = CLIP(dataclasses.replace(model.config, mlp="xla"))
    variables = jax.eval_shape(lambda: init_variables(plain, jax.random.key(0)))
    given = {"encode_image": jnp.zeros((2, 16, 16, 3)), "encode_text": jnp.zeros((2, 12), jnp.int32)}[method]
    with pytest.raises(ConfigError, match="config.model.mlp is pallas, and the devices are not NVIDIA GPUs since A100"):
        jax.eval_shape(lambda variables: model.apply(variables, given, method=method), variables)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11
def test_jax_lowers_them_for_gpus():
    """Each once, however many blocks a tower has."""
    product, bias, _ = jax.eval_shape(lambda: operands((2, 50, 3072), jnp.bfloat16))

    def value(product, bias):
        return sum(quick_gelu(x, bias).astype(jnp.float32).sum() for x in (2 * product, 3 * product))

    traced = jax.jit(jax.value_and_grad(value, argnums=(0, 1))).trace
    with tracing_for("NVIDIA H100 80GB HBM3"):
        text = traced(product, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton(") == 2


def test_what_is_cheap_is_computed_again_where_products_are_kept(interpreted):
    x, rows, found = jnp.ones((2, 6, 32), jnp.bfloat16), jnp.zeros((2, 1), jnp.int32), {}
    for remat in ("none", "dots"):
        options = {"dtype": "bfloat16", "dead_tokens": "compute", "remat": remat, "attention": "xla", "mlp": "pallas"}
        sizes, model = TextConfig(width=32, heads=2, layers=3), dataclasses.replace(TINY.model, **options)
        tower = Transformer(sizes, True, BlockInit.scaled(sizes), model)
        weights = tower.init(jax.random.key(0), x, rows)
        with jax.sharding.use_abstract_mesh(make_mesh(TINY.mesh, devices=jax.devices()[:1]).abstract_mesh):
            gradient = jax.grad(lambda weights, tower=tower: tower.apply(weights, x, rows).astype(jnp.float32).sum())
            found[remat] = runs_of("quick_gelu_forward", jax.make_jaxpr(gradient)(weights).jaxpr)
    assert found == {"none": 3, "dots": 6}
