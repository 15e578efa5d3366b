"""Our attention kernels, interpreted, beside attention's definition; and what their compiler is given."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import tracing_for
from jax.experimental import pallas as pl
from tiny import TINY

from clip_jax.models import attention, attention_kernel
from clip_jax.models.attention import attend
from clip_jax.models.attention_kernel import Blocks, attend_packed
from clip_jax.models.layers import Attention, BlockInit
from clip_jax.partition import make_mesh

LENGTHS = [
    (2, False),
    (5, True),
    (50, False),
    (64, True),
    (77, True),
    (128, False),
    (129, True),
    (200, False),
    (257, False),
]


def by_definition(packed, heads, causal):
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in jnp.split(packed, 3, axis=-1))
    return attend(query, key, value, causal=causal).reshape(*packed.shape[:2], -1)


def both_ways(kernel, packed, gradient):
    mixed, pull = jax.vjp(kernel, packed)
    return mixed, *pull(gradient)


def difference(found, expected):
    """Returns the larger of the differences' norms over the norms, NaN if there is one."""
    pairs = [(np.float64(a), np.float64(b)) for a, b in zip(found, expected, strict=True)]
    return np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])


@pytest.mark.parametrize(("tokens", "causal"), LENGTHS)
def test_result_and_gradient_are_the_definitions_in_f64(tokens, causal):
    """Behind the last token an interpreted kernel finds NaN: none may count."""
    with jax.enable_x64(True):
        packed, gradient = (
            jax.random.normal(jax.random.key(key), (2, tokens, 32 * parts), jnp.float64)
            for key, parts in enumerate((3, 1))
        )
        found, expected = (
            jax.jit(functools.partial(both_ways, kernel))(3 * packed, gradient)
            for kernel in (lambda x: attend_packed(x, 2, causal, interpret=True), lambda x: by_definition(x, 2, causal))
        )
        assert difference(found, expected) < 1e-14


def test_its_softmax_is_f32_where_products_are_bf16():
    packed, gradient = (
        jax.random.normal(jax.random.key(key), (2, 77, 64 * parts), jnp.bfloat16) for key, parts in enumerate((3, 1))
    )
    exact = both_ways(lambda x: by_definition(x, 1, True), 3 * packed.astype(jnp.float32), gradient.astype(jnp.float32))
    ours, plain = (
        difference(both_ways(kernel, 3 * packed, gradient), exact)
        for kernel in (lambda x: attend_packed(x, 1, True, interpret=True), lambda x: by_definition(x, 1, True))
    )
    print(f"error of the kernels {ours:.2e}, of the definition in bfloat16 {plain:.2e}")
    assert ours < 1.5 * plain


@pytest.mark.parametrize(("tokens", "whole", "rest"), [(50, 0, 64), (64, 1, 0), (77, 1, 16), (257, 4, 16), (90, 1, 32)])
def test_blocks_hold_every_token_and_few_others(tokens, whole, rest):
    blocks = Blocks(tokens, causal=False)
    assert (blocks.whole, blocks.rest) == (whole, rest)
    assert blocks.padded == 64 * whole + rest >= tokens


@pytest.mark.parametrize("packed", [False, True])
def test_behind_a_sequence_nothing_is_written(packed):
    """There the next one's program writes, at the same time on a GPU."""
    own = attention_kernel._Sequence(Blocks(5, causal=False), start=2)
    (block,) = own.blocks.fold(lambda block, found: (*found, block), ())

    def write(_, ref):
        ones = jnp.ones((block.size, 4))
        own.store_packed(ref, block, ones, attention_kernel.KEY) if packed else own.store(ref, block, ones)

    before = jnp.zeros((20, 3, 4) if packed else (20, 4))
    shape = jax.ShapeDtypeStruct(before.shape, before.dtype)
    found = pl.pallas_call(write, out_shape=shape, input_output_aliases={0: 0}, interpret=True)(before)
    written = np.flatnonzero(found.reshape(20, -1, 4)[:, -2 if packed else 0].all(axis=1))
    np.testing.assert_array_equal(written, np.arange(2, 7))
    assert found.sum() == 5 * 4


@pytest.fixture
def interpreted(monkeypatch):
    """Lets a step's attention be computed by the kernels, without a GPU; gives how often each shape was asked for."""
    asked = []

    def attend_interpreted(packed, heads, causal, groups):
        asked.append(packed.shape)
        return attend_packed(packed, heads, causal, groups, True)

    monkeypatch.setattr(attention, "_lacking", lambda *what: "")
    monkeypatch.setattr(attention_kernel, "attend_packed", attend_interpreted)
    return asked


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("groups", [(), ((3, 2), (2, 5)), ((1, 70), (2, 3))])
def test_a_step_computes_by_them_what_it_does_by_the_definition(interpreted, devices, groups):
    """In groups too, behind which tokens are left over, and on each device its own rows."""
    last = sum(count * length for count, length in groups)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (4, last + 3, 32), jnp.float64)

        def both(kind):
            model = dataclasses.replace(TINY.model, dtype="float64", attention=kind)
            module = Attention(2, True, BlockInit.scaled(TINY.model.text), model, groups)
            variables = module.init(jax.random.key(1), x)
            mesh = make_mesh(TINY.mesh, devices=jax.devices()[:devices])
            with jax.set_mesh(mesh):
                return jax.jit(lambda x: both_ways(lambda x: module.apply(variables, x), x, jnp.cos(x)))(x)

        found = both("pallas")
        assert interpreted == [(4 // devices, last + 3, 96)]
        assert difference(found, both("xla")) < 1e-14
        assert len(interpreted) == 1
        assert float(jnp.abs(found[0][:, :last]).min(initial=1)) > 0


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11
@pytest.mark.parametrize(("tokens", "causal"), [(50, False), (77, True), (257, False)])
def test_jax_lowers_them_for_gpus(tokens, causal):
    """Each once, however many blocks a tower has."""
    given = jax.ShapeDtypeStruct((2, tokens, 3 * 128), jnp.bfloat16)

    def value(packed):
        return sum(attend_packed(x, 2, causal).astype(jnp.float32).sum() for x in (2 * packed, 3 * packed))

    with tracing_for("NVIDIA H100 80GB HBM3"):
        text = jax.jit(jax.grad(value)).trace(given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton(") == 2
    assert "stablehlo.dot_general" not in text
