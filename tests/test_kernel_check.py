"""Our kernels, interpreted, as `clip-jax doctor` checks them on a GPU; and what it says of those that err or fail."""

import jax
import pytest
from batches import synthetic
from tiny import TINY

from clip_jax.doctor import examine
from clip_jax.models import activation_kernel, attention_kernel, gpu_kernels, kernel_check
from clip_jax.models.kernel_check import check_kernels
from clip_jax.partition import place_rows
from clip_jax.training import step
from clip_jax.training.program import make_program


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the kernels be checked without a GPU, on as little as one can bear to wait for."""
    for name, size in {"ROWS": 1, "HEADS": 1, "GROUPS": ((2, 16), (1, 24), (1, 77)), "MLP": (130, 128)}.items():
        monkeypatch.setattr(kernel_check, name, size)
    attend, activate = attention_kernel.attend_packed, activation_kernel.quick_gelu
    monkeypatch.setattr(gpu_kernels, "lacking", lambda dtype: "")
    monkeypatch.setattr(attention_kernel, "attend_packed", lambda *given: attend(*given, True))
    monkeypatch.setattr(activation_kernel, "quick_gelu", lambda *given: activate(*given, True))


@pytest.mark.slow
def test_all_kernels_are_checked_where_they_can_be_used(interpreted):
    checks = check_kernels()
    assert [each.key for each in checks] == ["attention"] * 4 + ["mlp"]
    for each in checks:
        print(f"{each.what}: {each.error:.1e}, by definition {each.usual:.1e}")
        assert each.has_passed
        assert 1e-3 < each.error < 3e-3  # bfloat16 has 8 bits


def test_without_gpus_there_is_nothing_to_check():
    assert check_kernels() == []


def findings(what):
    return [(each.verdict, each.found) for each in examine(None, {}) if each.what == what]


@pytest.mark.parametrize(("causal", "wrong"), [(True, [2, 3]), pytest.param(False, [0, 1], marks=pytest.mark.slow)])
def test_the_doctor_names_a_kernel_that_errs(monkeypatch, interpreted, causal, wrong):
    right = attention_kernel.attend_packed

    def err(packed, heads, is_causal, groups):
        return right(packed, heads, is_causal, groups) * (1 + 0.01 * (is_causal == causal))

    monkeypatch.setattr(attention_kernel, "attend_packed", err)
    found = findings("kernel")
    assert [i for i, (verdict, _) in enumerate(found) if verdict == "wrong"] == wrong
    assert all(text.endswith("; train with config.model.attention=xla") for _, text in (found[i] for i in wrong))


def test_the_doctor_names_a_gradient_that_errs(monkeypatch, interpreted):
    right = activation_kernel.quick_gelu
    monkeypatch.setattr(
        activation_kernel, "quick_gelu", lambda product, bias: right(product, jax.lax.stop_gradient(bias))
    )
    ((verdict, found),) = (each for each in findings("kernel") if "QuickGELU" in each[1])
    assert verdict == "wrong"
    assert found.endswith("; train with config.model.mlp=xla")


def test_the_doctor_says_that_kernels_cannot_be_computed(monkeypatch, interpreted):
    def fail(*given):
        raise RuntimeError("no Triton\nhere")

    monkeypatch.setattr(attention_kernel, "attend_packed", fail)
    (found,) = findings("kernels")
    assert found[0] == "wrong"
    assert found[1].startswith("they cannot be computed, train with config.model.attention=xla and mlp=xla: no Triton")


@pytest.mark.parametrize(
    ("platform", "flags", "options"),
    [
        ("gpu", "--xla_dump_to=x", {"xla_gpu_enable_triton_gemm": False}),
        ("gpu", "--xla_gpu_enable_triton_gemm=true", {}),
        ("tpu", "", {}),
        ("cpu", "", {}),
    ],
)
def test_gpus_multiply_by_cublas_unless_xlas_flags_say_otherwise(monkeypatch, platform, flags, options):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert gpu_kernels.product_options(platform) == options


def test_a_step_is_compiled_with_them(monkeypatch):
    monkeypatch.setattr(step, "product_options", lambda platform: {"xla_gpu_no_such_option": False})
    program = make_program(TINY)
    batch = place_rows(synthetic(TINY, 1)[0], program.mesh)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_gpu_no_such_option'"):
        program.train_step.lower(program.target, batch).compile()
