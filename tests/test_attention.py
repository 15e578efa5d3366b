"""Attention: its definition; and cuDNN's kernels, which no test machine has: what they are asked for, and when."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import tracing_for
from jaxprs import runs_of
from tiny import TINY

from clip_jax.errors import ConfigError
from clip_jax.models import attention, gpu_kernels
from clip_jax.models.attention import attend, attend_packed, takes_packed
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.layers import BlockInit, Transformer
from clip_jax.models.variants import TextConfig
from clip_jax.partition import make_mesh

CUDNN = jax.nn.dot_product_attention
PRIVATE = "jax._src.cudnn.fused_attention_stablehlo.cuda_versions"


def operands(tokens, *, head=8, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(tokens), (3, 2, tokens, 4, head), dtype)


@pytest.fixture
def in_a_step():
    with jax.sharding.use_abstract_mesh(make_mesh(TINY.mesh, devices=jax.devices()[:1]).abstract_mesh):
        yield


@pytest.fixture
def gpu(monkeypatch, in_a_step):
    """Lets a step believe that it is traced for a GPU, and computes what it asks of cuDNN; gives these requests."""
    asked = []

    def compute(query, key, value, *, implementation, **options):
        asked.append((implementation, query.shape, options["is_causal"]))
        return CUDNN(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(gpu_kernels, "traced_for", lambda: "gpu")
    monkeypatch.setattr(gpu_kernels, "capability", lambda: 9.0)
    monkeypatch.setattr(jax.nn, "dot_product_attention", compute)
    return asked


@pytest.mark.parametrize("causal", [False, True])
def test_it_equals_its_definition_in_f64(causal):
    with jax.enable_x64(True):
        query, key, value = np.random.default_rng(0).standard_normal((3, 2, 5, 4, 8))
        found = attend(*map(jnp.asarray, (query, key, value)), causal=causal)
        for b, h in np.ndindex(2, 4):
            logits = query[b, :, h] @ key[b, :, h].T / math.sqrt(8)
            shares = np.exp(np.where(np.tri(5) > 0, logits, -np.inf) if causal else logits)
            expected = shares / shares.sum(1, keepdims=True) @ value[b, :, h]
            np.testing.assert_allclose(found[b, :, h], expected, atol=1e-14)


def test_its_softmax_is_f32_where_products_are_bf16():
    query, key, value = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 64, 2, 8)), jnp.bfloat16)
    found = attend(8 * query, key, value, causal=False)
    assert found.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in (8 * query, key, value)), causal=False)
    np.testing.assert_allclose(found, exact, atol=0.02)  # logits in bfloat16 err by 0.1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "asked_for"), [(6, 6), (7, 8)])
def test_cudnn_is_asked_for_even_lengths_and_gives_the_definitions_values(gpu, tokens, asked_for, causal):
    given = operands(tokens)

    def result_and_gradients(kind):
        mixed, pull = jax.vjp(lambda *x: attend(*x, causal=causal, kind=kind), *given)
        return mixed, *pull(given[0])

    found = result_and_gradients("auto")
    assert gpu == [("cudnn", (2, asked_for, 4, 8), causal)]
    for a, b in zip(found, result_and_gradients("xla"), strict=True):
        a, b = np.float64(a), np.float64(b)
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)  # bfloat16's last bit; a wrong mask gives 0.1 and more
    assert len(gpu) == 1


def test_where_cudnn_cannot_be_used_auto_takes_the_definition(gpu, monkeypatch):
    attend(*operands(6, dtype=jnp.float32), causal=True, kind="auto")
    attend(*operands(6, head=12), causal=True, kind="auto")
    query, key, value = operands(6)
    attend(query[:, :1], key, value, causal=True, at=jnp.zeros((2, 1), jnp.int32), kind="cudnn")
    monkeypatch.setattr(gpu_kernels, "capability", lambda: 7.5)
    attend(query, key, value, causal=True, kind="auto")
    assert not gpu


def test_outside_of_a_step_kernels_are_not_used(monkeypatch):
    monkeypatch.setattr(attention, "_lacking", lambda *what: "")
    monkeypatch.delattr(jax.nn, "dot_product_attention")
    monkeypatch.setattr(gpu_kernels, "capability", lambda: 9.0)
    attend(*operands(6), causal=True, kind="cudnn")
    packed = jnp.ones((2, 6, 3 * 64), jnp.bfloat16)
    assert not takes_packed("pallas", packed, 1)
    assert not takes_packed("auto", packed, 1)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (True, {}),
        (True, {"tokens": 1_000, "groups": ((10, 77), (2, 16))}),
        (False, {"tokens": 258}),  # cuDNN's are faster
        (False, {"tokens": 1_000, "groups": ((10, 16), (2, 258))}),
        (False, {"capability": 8.0}),  # no such card has timed them
        (False, {"capability": 10.0}),
        (False, {"dtype": jnp.float32}),
        (False, {"head": 80}),
    ],
)
def test_auto_takes_our_kernels_where_they_are_the_fastest(gpu, monkeypatch, asked, given):
    settings = {"tokens": 257, "groups": (), "capability": 9.0, "dtype": jnp.bfloat16, "head": 64} | given
    monkeypatch.setattr(gpu_kernels, "capability", lambda: settings["capability"])
    packed = jnp.ones((1, settings["tokens"], 3 * 2 * settings["head"]), settings["dtype"])
    assert takes_packed("auto", packed, 2, settings["groups"]) == asked
    assert takes_packed("pallas", packed, 2, settings["groups"])
    assert not takes_packed("cudnn", packed, 2, settings["groups"])


@pytest.mark.parametrize(
    ("kind", "given", "capability", "reason"),
    [
        ("cudnn", {"dtype": jnp.float32}, 9.0, "config.model.dtype is float32, not bfloat16"),
        ("cudnn", {"head": 12}, 9.0, "a head has 12 channels, not a multiple of 8 up to 128"),
        ("cudnn", {"head": 136}, 9.0, "a head has 136 channels, not a multiple of 8 up to 128"),
        ("cudnn", {}, 7.5, "the devices are not NVIDIA GPUs since A100"),
        ("pallas", {"head": 64, "dtype": jnp.float32}, 9.0, "config.model.dtype is float32, not bfloat16"),
        ("pallas", {"head": 80}, 9.0, "a head has 80 channels, not 16 or 32 or 64 or 128"),
        ("pallas", {"head": 64}, 7.5, "the devices are not NVIDIA GPUs since A100"),
    ],
)
def test_kernels_that_cannot_be_used_are_refused(gpu, monkeypatch, kind, given, capability, reason):
    monkeypatch.setattr(gpu_kernels, "capability", lambda: capability)
    parts = operands(6, **given)
    packed = jnp.concatenate([part.reshape(2, 6, -1) for part in parts], axis=-1)
    ask = {
        "cudnn": lambda: attend(*parts, causal=True, kind="cudnn"),
        "pallas": lambda: attend_packed(packed, 4, causal=True),
    }
    with pytest.raises(ConfigError, match=f"^config.model.attention is {kind}, and {reason}; auto uses what can be"):
        ask[kind]()


@pytest.mark.parametrize("kind", ["cudnn", "pallas"])
@pytest.mark.parametrize("method", ["encode_image", "encode_text"])
def test_the_config_reaches_both_towers(in_a_step, method, kind):
    towers = {name: dataclasses.replace(getattr(TINY.model, name), layers=2) for name in ("vision", "text")}
    model = CLIP(dataclasses.replace(TINY.model, **towers, dtype="bfloat16", attention=kind))
    variables = jax.eval_shape(
        lambda: init_variables(CLIP(dataclasses.replace(model.config, attention="xla")), jax.random.key(0))
    )
    given = {"encode_image": jnp.zeros((2, 16, 16, 3)), "encode_text": jnp.zeros((2, 12), jnp.int32)}[method]
    with pytest.raises(ConfigError, match="the devices are not NVIDIA GPUs since A100"):
        jax.eval_shape(lambda variables: model.apply(variables, given, method=method), variables)


@pytest.mark.parametrize(("tokens", "causal"), [(50, False), (257, False), (77, True)])
def test_jax_lowers_it_and_its_gradient_for_gpus(in_a_step, monkeypatch, tokens, causal):
    monkeypatch.setattr(PRIVATE, types.SimpleNamespace(cudnn_get_version=lambda: 91_000))
    monkeypatch.setattr(attention, "_lacking", lambda *what: "")
    given = [jax.ShapeDtypeStruct((2, tokens, 4, 64), jnp.bfloat16)] * 3

    def value(*given):
        return attend(*given, causal=causal, kind="auto").astype(jnp.float32).sum()

    text = jax.jit(jax.grad(value, argnums=(0, 1, 2))).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmhaSoftmax(") == 1
    assert text.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 1
    assert "dot_general" not in text


@pytest.mark.parametrize(
    ("kind", "kernel"), [("cudnn", "dot_product_attention_fwd_wrapper"), ("pallas", "attention_forward")]
)
def test_kernels_are_run_again_only_where_whole_blocks_are(in_a_step, monkeypatch, kind, kernel):
    monkeypatch.setattr(PRIVATE, types.SimpleNamespace(cudnn_get_version=lambda: 91_000))
    monkeypatch.setattr(attention, "_lacking", lambda *what: "")
    x, rows, found = jnp.ones((2, 6, 128), jnp.bfloat16), jnp.zeros((2, 1), jnp.int32), {}
    for remat in ("none", "dots", "block"):
        options = {"dtype": "bfloat16", "dead_tokens": "compute", "remat": remat, "attention": kind}
        sizes, model = TextConfig(width=128, heads=2, layers=3), dataclasses.replace(TINY.model, **options)
        tower = Transformer(sizes, True, BlockInit.scaled(sizes), model)
        weights = jax.eval_shape(tower.init, jax.random.key(0), x, rows)
        gradient = jax.grad(lambda weights, tower=tower: tower.apply(weights, x, rows).astype(jnp.float32).sum())
        found[remat] = runs_of(kernel, jax.make_jaxpr(gradient)(weights).jaxpr)
    assert found == {"none": 3, "dots": 3, "block": 6}


@pytest.mark.parametrize(("kind", "capability"), [("NVIDIA A100-SXM4-80GB", 8.0), ("NVIDIA H100 80GB HBM3", 9.0)])
def test_a_step_is_for_the_gpus_of_its_mesh(monkeypatch, kind, capability):
    monkeypatch.setattr(jax, "local_devices", lambda backend: [types.SimpleNamespace(compute_capability="12.0")])
    with tracing_for(kind):
        assert gpu_kernels.capability() == capability
    assert gpu_kernels.capability() == 12.0


@pytest.mark.parametrize(("found", "capability"), [("9.0", 9.0), ("gfx942", 0.0), (None, 0.0)])
def test_only_nvidias_gpus_have_a_capability(monkeypatch, found, capability):
    device = types.SimpleNamespace(**({"compute_capability": found} if found else {}))
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    assert gpu_kernels.capability() == capability


def test_gpus_that_are_elsewhere_will_do():
    assert gpu_kernels.capability() == gpu_kernels.FIRST_CAPABILITY
