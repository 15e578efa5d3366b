"""What devices exchange of a kernel's gradient: in the dtype of the products, or in float32."""

import dataclasses
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import assert_alike_in_f64, resnet
from tiny import TINY

from clip_jax.config import MeshConfig
from clip_jax.models.clip import CLIP
from clip_jax.models.convolution import Conv3x3
from clip_jax.models.dense import Dense
from clip_jax.models.variants import ResNetConfig
from clip_jax.partition import make_mesh, row_sharding
from clip_jax.planning.plan import lower_step
from clip_jax.rules import leaf_paths
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import abstract_state

ROWS, DEVICES = (64, 4, 4, 16), 8
LAYERS = {
    "dense": lambda reduce_dtype: Dense(16, dtype=jnp.bfloat16, reduce_dtype=reduce_dtype),
    "convolution": lambda reduce_dtype: Conv3x3(16, 1, jnp.bfloat16, reduce_dtype, nn.initializers.normal()),
}


def kernel_gradient(layer, x, gradient, mesh):
    """The gradient of a layer's kernel, where rows lie on the devices of a mesh."""
    variables = layer.init(jax.random.key(0), x[:1])

    def pull(x, gradient):
        return jax.vjp(lambda variables: layer.apply(variables, x), variables)[1](gradient)[0]["params"]["kernel"]

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = jax.jit(pull, in_shardings=row_sharding(mesh))(x, gradient)
    assert found.dtype == jnp.float32
    return np.asarray(found)


def chain(parts):
    """A sum that is rounded to bfloat16 after every part, as devices in a ring make it."""
    total = jnp.zeros(parts[0].shape, jnp.bfloat16)
    for part in parts:
        total += part.astype(jnp.bfloat16)
    return np.asarray(total, np.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_devices_add_up_in_float32_what_each_has(name):
    rng = np.random.default_rng(0)
    x, gradient = (jnp.asarray(rng.standard_normal(ROWS), jnp.bfloat16) for _ in range(2))
    wide, same = (LAYERS[name](reduce_dtype) for reduce_dtype in ("float32", "same"))
    one, all_devices = make_mesh(MeshConfig(), devices=jax.devices()[:1]), make_mesh(MeshConfig(2, 2, 2))
    parts = [
        kernel_gradient(wide, *each, one) for each in zip(*(jnp.split(a, DEVICES) for a in (x, gradient)), strict=True)
    ]
    expected = np.sum(parts, axis=0)

    def error(found):
        return np.abs(found - expected).max() / np.abs(expected).max()

    errors = [error(kernel_gradient(layer, x, gradient, all_devices)) for layer in (wide, same)]
    print(
        f"{name}, a sum of {DEVICES} devices: off by {errors[0]:.1e}, by {errors[1]:.1e} where it is rounded once, "
        f"by {error(chain(parts)):.1e} where after every part"
    )
    assert errors[0] < 1e-6 < errors[1]


def sums(run):
    """The sums between devices that a step itself asks for, by dtype. Others are the partitioner's, for products."""
    found = lower_step(run, jax.devices()[:4])[1].as_text().split("stablehlo.all_reduce")[1:]
    return Counter(re.search(r"\}\) : \(tensor<(?:\S*x)?(\w+)>\)", text)[1] for text in found)


@pytest.mark.parametrize("groups", [(), ("4:0.25", "8:0.375")], ids=["whole rows", "groups"])
@pytest.mark.parametrize("vision", [TINY.model.vision, ResNetConfig(32, 8, 4, (1, 1, 1, 1))], ids=["vit", "resnet"])
def test_every_kernels_gradient_is_summed_so(vision, groups):
    model = dataclasses.replace(TINY.model, vision=vision, dtype="bfloat16")
    run = dataclasses.replace(TINY, model=model, batch=64, text_groups=groups)
    params = abstract_state(CLIP(model), make_optimizer(run.optim, steps=100), mesh=make_mesh(MeshConfig())).params
    image, text = (sum(path.endswith("kernel") for path in leaf_paths(params[tower])) for tower in ("image", "text"))
    asked = sums(dataclasses.replace(run, model=dataclasses.replace(model, reduce_dtype="float32"))) - sums(run)
    assert asked == {"f32": image + text * (2 if groups else 1)}  # both layouts of captions are in the program


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [0, 64])
@pytest.mark.parametrize("run", [TINY, resnet(8)], ids=["vit", "resnet"])
def test_training_is_alike_on_every_mesh_in_f64(run, micro_batch):
    model = dataclasses.replace(run.model, reduce_dtype="float32")
    run = dataclasses.replace(run, model=model, batch=128, samples=128 * 20, micro_batch=micro_batch)
    assert_alike_in_f64(run, MeshConfig(2, 2, dcn_data=2))
