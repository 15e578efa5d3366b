"""The table of tokens: Flax's values and gradients, but for how those of many rows are summed."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from clip_jax.models.embedding import Embed

ROWS = jnp.array([[3, 0, 3], [1, 3, 0]])


def result_and_gradient(layer, dtype):
    """A function of the layer's variables, and random ones."""
    module = layer(5, 4, embedding_init=nn.initializers.normal(1.0), dtype=dtype)
    variables = module.init(jax.random.key(0), ROWS)

    def value(variables):
        result = module.apply(variables, ROWS)
        return (result.astype(jnp.promote_types(dtype, jnp.float32)) ** 3).sum(), result

    return jax.jit(jax.grad(value, has_aux=True)), variables


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_flax(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        (ours, variables), (theirs, same) = (result_and_gradient(layer, dtype) for layer in (Embed, nn.Embed))
        found, expected = ours(variables), theirs(same)
    assert found[1].dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, (variables, found[1]), (same, expected[1]))
    last_bit = 2.0**-8 if dtype == jnp.bfloat16 else 0  # Flax's sum of three rounds once more
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=last_bit), found[0], expected[0])


def test_a_row_that_is_read_often_loses_nothing():
    def gradient(layer):
        module = layer(3, 2, embedding_init=nn.initializers.zeros, dtype=jnp.bfloat16)
        rows = jnp.zeros(4096, jnp.int32)
        variables = module.init(jax.random.key(0), rows)
        found = jax.grad(lambda variables: module.apply(variables, rows).astype(jnp.float32).sum())(variables)
        return found["params"]["embedding"]

    ours, theirs = gradient(Embed), gradient(nn.Embed)
    print(f"gradient of a row that is read 4,096 times: {ours[0, 0]}, {theirs[0, 0]} with Flax's layer")
    np.testing.assert_array_equal(ours, [[4096, 4096], [0, 0], [0, 0]])
    assert theirs[0, 0] < 4096


@pytest.mark.parametrize(
    ("platform", "reduce_dtype", "summed"),
    [("cuda", "same", "f32"), ("cpu", "same", "f32"), ("tpu", "same", "bf16"), ("tpu", "float32", "f32")],
)
def test_only_programs_for_tpus_sum_in_the_results_dtype(platform, reduce_dtype, summed):
    layer = functools.partial(Embed, reduce_dtype=reduce_dtype)
    function, variables = result_and_gradient(layer, jnp.bfloat16)
    text = export.export(function, platforms=[platform])(variables).mlir_module()
    assert re.findall(r"-> tensor<5x4x(\w+)>", text[text.index("stablehlo.scatter") :])[0] == summed
