"""Our attention kernels, interpreted, beside attention's definition; and what their compiler is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from clip_jax.models import attention, attention_kernel
from clip_jax.models.attention import attend
from clip_jax.models.attention_kernel import Blocks, attend_packed
from clip_jax.models.layers import Attention, BlockInit
from clip_jax.partition import make_mesh

LENGTHS = [(5, True), (50, False), (64, True), (77, True), (128, False), (129, True), (200, False), (257, False)]


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
            for kernel in (lambda x: attend_packed(x, 2, causal, True), lambda x: by_definition(x, 2, causal))
        )
        assert difference(found, expected) < 1e-14


def test_its_softmax_is_f32_where_products_are_bf16():
    packed, gradient = (
        jax.random.normal(jax.random.key(key), (2, 77, 64 * parts), jnp.bfloat16) for key, parts in enumerate((3, 1))
    )
    exact = both_ways(lambda x: by_definition(x, 1, True), 3 * packed.astype(jnp.float32), gradient.astype(jnp.float32))
    ours, plain = (
        difference(both_ways(kernel, 3 * packed, gradient), exact)
        for kernel in (lambda x: attend_packed(x, 1, True, True), lambda x: by_definition(x, 1, True))
    )
    print(f"error of the kernels {ours:.2e}, of the definition in bfloat16 {plain:.2e}")
    assert ours < 1.5 * plain


@pytest.mark.parametrize(("tokens", "whole", "rest"), [(50, 0, 64), (64, 1, 0), (77, 1, 16), (257, 4, 16), (90, 1, 32)])
def test_blocks_hold_every_token_and_few_others(tokens, whole, rest):
    blocks = Blocks(tokens, causal=False)
    assert (blocks.whole, blocks.rest) == (whole, rest)
    assert blocks.padded == 64 * whole + rest >= tokens


@pytest.fixture
def interpreted(monkeypatch):
    """Lets a step's attention be computed by the kernels, without a GPU; gives how often each shape was asked for."""
    asked = []

    def attend_interpreted(packed, heads, causal):
        asked.append(packed.shape)
        return attend_packed(packed, heads, causal, True)

    monkeypatch.setattr(attention, "_lacking", lambda *what: "")
    monkeypatch.setattr(attention_kernel, "attend_packed", attend_interpreted)
    return asked


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("groups", "shapes"), [((), [(4, 19, 96)]), (((3, 2), (2, 5)), [(12, 2, 96), (8, 5, 96)])])
def test_a_step_computes_by_them_what_it_does_by_the_definition(interpreted, devices, groups, shapes):
    """In groups too, behind which tokens are left over, and on each device its own rows."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (4, 19, 32), jnp.float64)

        def both(kind):
            module = Attention(2, True, BlockInit.scaled(32, 2), jnp.float64, kind, groups)
            variables = module.init(jax.random.key(1), x)
            mesh = make_mesh(TINY.mesh, devices=jax.devices()[:devices])
            with jax.set_mesh(mesh):
                return jax.jit(lambda x: both_ways(lambda x: module.apply(variables, x), x, jnp.cos(x)))(x)

        found = both("pallas")
        assert interpreted == [(rows // devices, *rest) for rows, *rest in shapes]
        assert difference(found, both("xla")) < 1e-14
        assert len(interpreted) == len(shapes)
        last = 19 if not groups else 16
        assert float(jnp.abs(found[0][:, :last]).min()) > 0


@pytest.mark.parametrize(("tokens", "causal"), [(50, False), (77, True), (257, False)])
def test_jax_lowers_them_for_gpus(tokens, causal):
    given = jax.ShapeDtypeStruct((2, tokens, 3 * 128), jnp.bfloat16)

    def value(packed):
        return attend_packed(packed, 2, causal).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(value)).trace(given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton(") == 2
    assert "stablehlo.dot_general" not in text
