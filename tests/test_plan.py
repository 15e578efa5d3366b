"""Plans: operations, collectives and bytes are those of the real step; what cannot be is one line."""

import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import PartitionSpec
from tiny import TINY

from benchmarks import plans
from clip_jax.chips import parse_topology, peak_of
from clip_jax.config import LossConfig, MeshConfig, from_config_dict, override, to_config_dict
from clip_jax.data.synthetic import synthetic_batches
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.models.flops import grouped_text_flops, image_flops, loss_flops, text_flops
from clip_jax.models.text_groups import groups_of
from clip_jax.models.variants import ResNetConfig, model_config
from clip_jax.partition import AXES, make_mesh, place_rows
from clip_jax.planning import gpu_compiler
from clip_jax.planning.hlo import Collective, collectives
from clip_jax.planning.plan import Plan, _wanted, lever, levers, make_plan, report
from clip_jax.planning.utilization import StepFlops
from clip_jax.training.optim import make_optimizer
from clip_jax.training.program import make_program
from clip_jax.training.state import create_state
from clip_jax.training.step import make_train_step

ROOT = Path(__file__).parent.parent
CPU = parse_topology("cpu:8")

# GFLOP of a forward pass on an image and on a text.
GFLOPS = {
    "RN50": (11.59, 5.96),
    "RN101": (19.01, 5.96),
    "RN50x4": (41.16, 9.27),
    "RN50x16": (145.74, 13.30),
    "RN50x64": (520.25, 23.55),
    "ViT-B/32": (8.82, 5.96),
    "ViT-B/16": (35.13, 5.96),
    "ViT-L/14": (162.03, 13.30),
    "ViT-L/14@336": (381.92, 13.30),
}


@pytest.mark.parametrize("name", GFLOPS)
def test_operations_of_the_nine_models(name):
    config = model_config(name)
    assert (round(image_flops(config) / 1e9, 2), round(text_flops(config) / 1e9, 2)) == GFLOPS[name]


def test_dropped_patches_cost_nothing_in_training():
    half = dataclasses.replace(model_config("ViT-B/16"), patch_dropout=0.5)
    assert image_flops(half) == image_flops(model_config("ViT-B/16"))
    assert 0.49 < image_flops(half, train=True) / image_flops(half) < 0.52
    assert loss_flops(512, 1000, tiled=True) == 8 * 1000 * 512
    assert loss_flops(512, 1000, tiled=False) == 6 * 1000 * 512


def compiled_text(function, mesh, *shapes):
    ins = (PartitionSpec(AXES),) * len(shapes)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=PartitionSpec(AXES), check_vma=False)
    return jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def test_collectives_are_counted_in_loops_and_told_apart_by_fabric():
    """Eight devices in two slices: a ring of all, a sum within each slice, a gather across them."""
    mesh = make_mesh(MeshConfig(2, 2, dcn_data=2))
    ring = [(i, (i + 1) % 8) for i in range(8)]

    def exchange(x):
        x, _ = jax.lax.scan(lambda x, _: (jax.lax.ppermute(x, AXES, ring) * 2, None), x, length=5)
        x = x + jax.lax.psum(x, ("data", "fsdp"))
        return x + jax.lax.all_gather(x, "dcn_data").sum(axis=0)

    text = compiled_text(exchange, mesh, (16, 128))
    block = 2 * 128 * 4  # bytes on a device
    assert collectives(text, devices=8, slices=2) == [
        Collective("all-gather", across=True, count=1, bytes=2 * block, sent=block, hidden=0),
        Collective("all-reduce", across=False, count=1, bytes=block, sent=2 * block * 3 // 4, hidden=0),
        Collective("collective-permute", across=True, count=5, bytes=5 * block, sent=5 * block, hidden=0),
    ]
    assert not any(each.across for each in collectives(text, devices=8))


def test_of_a_conditional_the_branch_counts_that_moves_more():
    mesh = make_mesh(MeshConfig(8))

    def either(x):
        large, small = (lambda x: jax.lax.psum(x, "data"), lambda x: x * jax.lax.psum(x[:1], "data"))
        return jax.lax.cond(jax.lax.psum(x[0, 0], "data") > 0, large, small, x)

    text = compiled_text(either, mesh, (16, 128))
    assert " conditional(" in text
    moved = sum(each.bytes for each in collectives(text, devices=8))
    assert moved == 2 * 128 * 4 + 4
    branches = HLO.replace("ROOT %sum", "%sum").replace("ENTRY", "%large (p: f32[8]) -> f32[8] {\n  %a = ONE\n}\nENTRY")
    for form in ("branch_computations={%large, %add}", "true_computation=%add, false_computation=%large"):
        text = branches.replace("ONE", "f32[8] all-reduce(%p), to_apply=%add").replace(
            "%one = ", f"%c = f32[8] conditional(%p), {form}\n  %one = "
        )
        total = sum(each.bytes for each in collectives(text, devices=8) if each.kind == "all-reduce")
        assert total == 128 + 64 + 32


HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %one = f32[8,4]{1,0:T(8,128)} all-reduce(%p), replica_groups=REPLICA, to_apply=%add
  %two = (bf16[4]{0}, bf16[16]{0}, u32[]) all-gather-start(%p), replica_groups=REPLICA, dimensions={0}
  %three = (f32[2,8]{1,0}, u32[], token[]) send(%p), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


@pytest.mark.parametrize(
    ("groups", "across"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", False),
        ("{{0,4},{1,5},{2,6},{3,7}}", True),
        ("[2,4]<=[8]", False),
        ("[4,2]<=[2,4]T(1,0)", True),
        ("mesh['a'=2,'b'=4] {'b'}", False),
        ("mesh['a'=2,'b'=4] {'a'}", True),
        ("{}", True),
    ],
)
def test_groups_in_every_spelling(groups, across):
    found = collectives(HLO.replace("REPLICA", groups), devices=8, slices=2)
    assert ("all-gather", across, 1, 32) in [each[:4] for each in found]
    total = {each.across: each.bytes for each in found if each.kind == "all-reduce"}
    assert total == ({True: 128 + 64} if across else {False: 128, True: 64})


def test_bytes_that_a_ring_sends():
    """Among four: an all-reduce of 128 bytes sends them twice but for a quarter, a gather of 32 once."""
    found = collectives(HLO.replace("REPLICA", "{{0,1,2,3},{4,5,6,7}}"), devices=8, slices=2)
    assert {(each.kind, each.across): each.sent for each in found} == {
        ("all-gather", False): 32 * 3 // 4,
        ("all-reduce", False): 2 * 128 * 3 // 4,
        ("all-reduce", True): 64,  # between two slices
    }
    scattered = HLO.replace("REPLICA", "{{0,1,2,3},{4,5,6,7}}").replace("all-reduce(", "reduce-scatter(")
    assert ("reduce-scatter", 128 * 3) in [(each.kind, each.sent) for each in collectives(scattered, devices=8)]


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=4),
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in (MeshConfig(), MeshConfig(zero1=True))),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_step_that_runs(mesh):
    """What a plan says of eight CPU devices, against the step compiled from arrays as the trainer does it."""
    run = dataclasses.replace(TINY, mesh=mesh, batch=256, samples=256 * 20)
    plan = make_plan(run, CPU)
    devices = make_mesh(mesh)
    model, optimizer = CLIP(run.model), make_optimizer(run.optim, steps=run.steps)
    state = create_state(model, optimizer, mesh=devices, seed=0, zero1=mesh.zero1)
    text = run.model.text
    stream = synthetic_batches(
        batch=256, image_size=16, context=text.context, vocab_size=text.vocab_size, seed=run.seed
    )
    batch = {name: rows for name, rows in next(stream).items() if name != "index"}
    step = make_train_step(model, optimizer, run, mesh=devices, state=state)
    real = step.lower(state, place_rows(batch, devices)).compile().memory_analysis()
    found = plan.memory["total"] - plan.memory["program"]
    expected = real.argument_size_in_bytes + real.temp_size_in_bytes
    expected += real.output_size_in_bytes - real.alias_size_in_bytes
    print(f"{mesh}: plan {found:,} bytes, step {expected:,}")
    assert abs(found / expected - 1) <= 0.05
    first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params)]
    assert plan.memory["parameters"] == sum(first)


def test_utilization_by_arithmetic():
    """Per second, device and peak; the paper's count has all tokens and whole blocks, the other what is computed."""
    run = dataclasses.replace(TINY, model=model_config("ViT-B/32"), batch=1024)
    flops = StepFlops.of(run, devices=8)
    loss = 1024 * loss_flops(512, 1024, tiled=True)
    assert flops.paper == 1024 * 3 * (image_flops(run.model) + text_flops(run.model)) + loss
    groups = groups_of(run.text_groups, rows=128, context=77)
    less = image_flops(run.model, read=True) + grouped_text_flops(run.model, groups)
    assert flops.computed == pytest.approx(1024 * 3 * less + loss)
    whole = dataclasses.replace(run, model=dataclasses.replace(run.model, dead_tokens="compute"))
    assert StepFlops.of(whole, devices=8) == StepFlops(flops.paper, flops.paper)
    rates = flops.rates(0.5, devices=8, peak=1e15)
    assert rates["tflops"] == pytest.approx(flops.computed / 4 / 1e12)
    assert rates["mfu"] == pytest.approx(flops.computed / 4e15)
    assert rates["mfu_effective"] == pytest.approx(flops.paper / 4e15)
    assert rates["mfu"] < rates["mfu_effective"]
    assert flops.rates(0.5, devices=8, peak=0.0).keys() == {"tflops"}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", 0),
        ("NVIDIA GeForce RTX 4090", 0),
        ("cpu", 0),
    ],
)
def test_peaks_by_what_jax_calls_a_device(kind, peak):
    assert peak_of(kind) == peak


ASYNCHRONOUS = """
ENTRY %main (p: f32[8]) -> f32[64] {
  %one = (f32[8], f32[64]) all-gather-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %two = f32[8] all-reduce-start(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %same = f32[8] bitcast(%p)
  %three = f32[8] all-reduce-done(%two)
  %work = f32[8] fusion(%p), kind=kLoop, calls=%add
  %part = ((f32[8]), f32[1]) reduce-scatter-start(%work), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %done = f32[1] reduce-scatter-done(%part)
  ROOT %four = f32[64] all-gather-done(%one)
}
"""


def test_what_is_under_way_while_the_device_computes_is_hidden():
    """The sum ends before the work begins, and the gather after it."""
    assert collectives(ASYNCHRONOUS, devices=8) == [
        Collective("all-gather", False, 1, 256, sent=256 * 7 // 8, hidden=256 * 7 // 8),
        Collective("all-reduce", False, 1, 32, sent=32, hidden=0),
        Collective("reduce-scatter", False, 1, 4, sent=4 * 7, hidden=0),
    ]


SPARSE_CORES = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%called (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[8] all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%branch (p: f32[8]) -> f32[8] {
  %start = ((f32[8]), f32[8]) call-start(%p), async_execution_thread="sparsecore", to_apply=%called
  %work = f32[8] fusion(%p), kind=kLoop, calls=%add
  ROOT %done = f32[8] call-done(%start)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %one = f32[8] conditional(%p), branch_computations={%add, %branch}
  %start = ((f32[8]), f32[8]) call-start(%p), async_execution_thread="sparsecore", to_apply=%called
  %same = f32[8] bitcast(%p)
  ROOT %done = f32[8] call-done(%start)
}
"""


def test_what_sparse_cores_carry_beside_work_is_hidden():
    """The same call twice, in a conditional's branch with work beside it, and without work."""
    assert collectives(SPARSE_CORES, devices=8) == [Collective("all-reduce", False, 2, 64, sent=64, hidden=32)]


@pytest.mark.parametrize(("before", "after", "hidden"), [(True, False, 0), (False, True, 32)])
def test_what_starts_without_arguments_is_under_way_once_it_has_them(before, after, hidden):
    """As libtpu 0.0.48 writes what SparseCores carry."""
    work = "  %work = f32[8] fusion(%p), kind=kLoop, calls=%add\n"
    entry = f"""
ENTRY %main (p: f32[8]) -> f32[8] {{
  %start = ((), (), s32[]{{:S(2)}}) call-start(), async_execution_thread="sparsecore", to_apply=%called
{before * work}  %given = ((f32[8]), f32[8]) call-update(%start, %p)
{after * work}  ROOT %done = f32[8] call-done(%given)
}}
"""
    text = SPARSE_CORES.partition("%branch")[0] + entry
    assert collectives(text, devices=8) == [Collective("all-reduce", False, 1, 32, sent=32, hidden=hidden)]


def test_a_collective_that_is_cut_into_parts_counts_once():
    parts = "".join(
        f"""  %part.{number} = f32[8] all-reduce(%p), channel_id=2, to_apply=%add, backend_config={{"""
        f""""async_collective_fusion_config":{{"flag_start":"{start}","flag_end":"21"}}}}\n"""
        for number, start in enumerate((-1, 2, 2))
    )
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n" + parts + "}\n"
    assert [each.count for each in collectives(text, devices=8)] == [1]


def plan_of(**changes) -> Plan:
    run = dataclasses.replace(TINY, samples=TINY.batch * 1000)
    figures = {
        "config": run,
        "topology": parse_topology("v5p:2x2x1"),
        "parameters": 1000,
        "sample_flops": (10**9, 10**9),
        "step_flops": 4 * 459e12 * 0.4 * 2,
        "memory": {"parameters": 2**30, "temporaries": 9 * 2**30, "total": 10 * 2**30},
        "collectives": (Collective("all-reduce", False, 3, 2**20, 2 * 2**20, 2**20),),
    }
    return Plan(**(figures | changes))


def test_the_arithmetic_of_a_report():
    """A step of 2 s, of 32 pairs, a thousand times, on one host of four chips."""
    text = " ".join(report(plan_of(), mfu=0.4, memory=16 * 2**30, images_per_core=4.0).split())
    for line in (
        "16.00 GiB: fits",
        "all-reduce, a step 3 x, 1.0 MiB a chip",
        "step at 40% of the peak 2.000 s, 16 pairs/s",
        "each of 1 host(s) 16 images/s, 4.0 cores at 4",
        "1,000 steps 0.0 days, 2 chip-hours",
    ):
        assert line in text
    assert "does not fit; try model.remat=dots" in report(plan_of(), mfu=0.4, memory=2**30, images_per_core=4.0)


def test_a_chip_of_two_devices_is_paid_once():
    """A step of 2 s on two hosts of eight devices, four chips each."""
    plan = plan_of(topology=parse_topology("tpu7x:2x2x2"), step_flops=8 * 2307e12 * 0.4 * 2)
    text = " ".join(report(plan, mfu=0.4, memory=16 * 2**30, images_per_core=4.0).split())
    for line in (
        "on 8 chip(s) (16 devices), tpu7x:2x2x2",
        "memory of a device: there is 16.00 GiB: fits",
        "all-reduce, a step 3 x, 1.0 MiB a device",
        "step at 40% of the peak 2.000 s, 16 pairs/s",
        "each of 2 host(s) 8 images/s, 2.0 cores at 4",
        "1,000 steps 0.0 days, 4 chip-hours",
    ):
        assert line in text


def test_hosts_and_links_are_those_of_a_slice():
    """Four chips of v5e are half of a host, and eight GPUs have NVLink among them, in each of several slices too."""
    halves = plan_of(topology=parse_topology("v5e:2x2", slices=4), step_flops=16 * 197e12 * 0.4 * 2)
    text = " ".join(report(halves, mfu=0.4, memory=0, images_per_core=4.0).split())
    assert "each of 4 host(s) 4 images/s, 1.0 cores at 4" in text
    one, four = (parse_topology("a100:8", slices=slices) for slices in (1, 4))
    assert one.bandwidth(across=False) == four.bandwidth(across=False) == 300e9
    assert parse_topology("a100:16", slices=2).bandwidth(across=False) == 200e9


def test_the_first_lever_is_what_holds_most():
    state = {"parameters": 3 * 2**30, "optimizer state": 6 * 2**30, "total": 10 * 2**30}
    assert lever(plan_of(memory=state)).startswith("try mesh.fsdp=4 ")
    run = plan_of().config
    blocks = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="block"))
    assert lever(plan_of(config=blocks)).startswith("try micro_batch=16 ")
    smallest = dataclasses.replace(blocks, micro_batch=4)
    assert lever(plan_of(config=smallest)) == "try model.remat=full, or more chips"
    reference = dataclasses.replace(run, loss=LossConfig(form="reference"))
    found = [text.split(" ")[0] for text in levers(reference, devices=4)]
    assert found == ["loss.form=chunked", "model.remat=dots", "micro_batch=16", "model.remat=full,", "mesh.fsdp=4", "a"]


@pytest.mark.parametrize(
    ("sizes", "chips", "offered"),
    [
        ({"batch": 48, "dcn_data": 2, "mesh.data": 4}, 8, ["micro_batch=24 with model.bn_group=3"]),
        ({"batch": 64, "bn_group": 4}, 8, ["micro_batch=32"]),
        ({"batch": 32, "bn_group": 4}, 8, []),  # 2 samples a device
        ({"batch": 36}, 6, ["micro_batch=18 with model.bn_group=3"]),
        ({"batch": 18, "micro_batch": 9, "bn_group": 1}, 1, []),  # 4 does not divide 18
    ],
)
def test_what_the_levers_offer_is_accepted(sizes, chips, offered):
    vision = ResNetConfig(image_size=64, width=8, heads=4, layers=(1, 1, 1, 1))
    config = to_config_dict(dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, vision=vision)))
    for key, value in sizes.items():
        override(config, key, str(value))
    found = levers(from_config_dict(config), devices=chips)
    assert [text.partition(" (")[0] for text in found if text.startswith("micro_batch=")] == offered
    for text in found:
        changed = config.copy_and_resolve_references()
        for key, value in re.findall(r"([\w.]+)=(-?\w+)", text):
            override(changed, key, value)
        make_program(from_config_dict(changed), devices=jax.devices()[:chips])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5q:2x2", r"unknown chip 'v5q'; did you mean 'v5p'\? \(such as v5p:4x8x8"),
        ("v5p:4x4", "v5p comes in 3 dimension"),
        ("v5e", "v5e comes in 2 dimension"),
        ("h100:8x8", "such as h100:8"),
        ("cpu:0", "such as cpu:8"),
        ("cpu:99999999", "99,999,999 chips; runs can be planned for 16,384 at most"),
    ],
)
def test_topologies_that_do_not_exist(text, message):
    with pytest.raises(UserError, match=message):
        parse_topology(text)


DEMO = "--config=configs/demo.py:vision.layers=1,text.layers=1"


def plan_command(*arguments, config=DEMO):
    command = [sys.executable, "-m", "clip_jax.cli", "plan", config, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command(command):
    """Exit 0 where it fits, 3 where not, 2 and one line where it cannot be."""
    small = ("plan", DEMO, "--topology=cpu:2", "--config.batch=16", "--config.samples=16000")
    code, out, errors = command(*small, "--memory=1")
    assert code == 0, errors
    assert "batch 16 on 2 chip(s), cpu:2" in out
    assert "1.00 GiB: fits" in out
    code, out, errors = command(*small, "--memory=0.001")
    assert code == 3, errors
    assert "does not fit; try " in out
    wrong = command("plan", DEMO, "--topology=cpu:2", "--config.batch=7", "--config.samples=7000")
    assert wrong == (2, "", "error: config.batch is 7, not divisible by the mesh's 2 devices; use 6 or 8\n")


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@needs_libtpu
def test_a_plan_for_tpu_slices_that_are_not_there():
    found = plan_command("--topology=v5e:2x2", "--slices=2")
    assert found.returncode == 0, found.stderr
    assert "16.00 GiB: fits" in found.stdout
    assert "all-reduce, between slices" in found.stdout
    assert "reduce-scatter, within a slice" in found.stdout
    missing = plan_command("--topology=v5p:3x3x3")
    assert missing.returncode == 2
    assert "error: --topology=v5p:3x3x3: there is no such slice: " in missing.stderr


@needs_libtpu
def test_what_tpus_cannot_hold_does_not_fit():
    """The compiler gives up where the temporaries alone are too many: that is an answer, no failure."""
    found = plan_command("--topology=v5e:1x1", config="--config=configs/demo.py:batch=131072,samples=409600000")
    assert found.returncode == 3, found.stderr
    assert re.search(r"temporaries +\d\d\.\d\d GiB", found.stdout)
    assert "16.00 GiB: does not fit; try model.remat=dots" in found.stdout


def test_what_a_compiler_says_that_it_wants():
    state = make_program(TINY, devices=jax.devices()[:1]).target
    assert _wanted("Used 17.51G of 15.75G hbm. Exceeded hbm capacity by 1.76G.", state) == {"total": int(17.51 * 2**30)}
    found = _wanted("required for HLO temporaries (1.50M) exceeds available HBM (1.00M).", state)
    assert found.pop("temporaries") == 3 << 19
    assert found.pop("total") == (3 << 19) + sum(found.values())
    assert set(found) == {"parameters", "optimizer state"}
    assert not _wanted("INTERNAL: something else", state)


needs_gpu_compiler = pytest.mark.skipif(not gpu_compiler.is_installed(), reason="JAX's CUDA plugin is not installed")


@needs_gpu_compiler
@pytest.mark.parametrize("fused", ["cudnn", "pallas"])
def test_a_plan_for_gpus_that_are_not_there(fused):
    """Attention is by kernels, and nothing but gradients and features is exchanged, on several hosts too."""
    keys = "--config.model.dtype=bfloat16", "--config.batch=16384", "--config.samples=3276800", "--topology=h100:16"
    found, defined = (
        plan_command(*keys, f"--config.model.attention={kind}", config="--config=configs/demo.py")
        for kind in (fused, "xla")
    )
    assert found.returncode == 0, found.stderr
    assert "CPU" not in found.stdout
    assert "74.51 GiB: fits" in found.stdout
    gathers = [re.search(r"all-gather, a step +(\d+) x, ", each.stdout) for each in (found, defined)]
    assert [int(match[1]) for match in gathers if match] == [2, 2]
    held = [re.search(r"temporaries +([\d.]+) GiB", each.stdout) for each in (found, defined)]
    little, much = (float(match[1]) for match in held if match)
    print(f"temporaries with attention by {fused}: {little} GiB; by the definition: {much} GiB")
    assert little < much


def test_without_the_gpus_compiler_temporaries_are_called_the_cpus(monkeypatch):
    gpus = dataclasses.replace(plan_of(), topology=parse_topology("h100:4"))
    monkeypatch.setattr(gpu_compiler, "is_installed", lambda: False)
    text = report(gpus, mfu=0.4, memory=2**34, images_per_core=4.0)
    assert "the CPU's account, which is too much; with the GPU's compiler: pip install --no-deps jax-cuda12" in text
    monkeypatch.setattr(gpu_compiler, "is_installed", lambda: True)
    assert "account" not in report(gpus, mfu=0.4, memory=2**34, images_per_core=4.0)


@pytest.mark.parametrize(
    ("name", "slices", "shape"),
    [
        ("h100:64", 1, "1x8x8"),
        ("a100:4", 1, "1x1x4"),
        ("h200:16", 2, "2x2x8"),
        ("h100:12", 1, "1x3x4"),
        ("b200:8", 1, "1x1x8"),
    ],
)
def test_gpus_to_compile_for_are_hosts_of_up_to_eight(monkeypatch, name, slices, shape):
    asked = []

    def describe(topology_name, platform, **options):
        asked.append((platform, options["topology"], options["target_config"]))
        return types.SimpleNamespace(devices=["a device"])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    assert gpu_compiler.gpus(parse_topology(name, slices=slices)) == ["a device"]
    ((platform, found, target),) = asked
    assert (platform, found) == ("cuda", shape)
    assert f'device_description_str: "NVIDIA {name[:4].upper()}"' in target
    major = {"a100": 8, "h100": 9, "h200": 9, "b200": 10}[name[:4]]
    assert f"major: {major} minor: 0 }}" in target


def test_a_plugin_that_cannot_compile_is_one_line(monkeypatch):
    def refuse(*arguments, **options):
        raise NotImplementedError("topology not implemented for cuda")  # as JAX says it

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=r"h100:8: JAX's CUDA plugin .* \(topology not implemented for cuda\); install"):
        gpu_compiler.gpus(parse_topology("h100:8"))


def test_the_gpus_compiler_is_found_by_its_plugin(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for module in [name for name in sys.modules if name.startswith("jax_plugins")]:
        monkeypatch.delitem(sys.modules, module)
    assert not gpu_compiler.is_installed()
    (tmp_path / "jax_plugins" / "other").mkdir(parents=True)
    importlib.invalidate_caches()
    assert not gpu_compiler.is_installed()
    (tmp_path / "jax_plugins" / "xla_cuda13").mkdir()
    (tmp_path / "jax_plugins" / "xla_cuda13" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert gpu_compiler.is_installed()


@pytest.mark.parametrize(("platform", "version"), [("gpu", 91_002), ("cpu", None)])
def test_jax_is_told_cudnns_version_for_gpus_alone(monkeypatch, platform, version):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    with gpu_compiler.assumed_cudnn([types.SimpleNamespace(platform=platform)]):
        told = fused_attention_stablehlo.cuda_versions
        assert (told.cudnn_get_version() if told else None) == version
    assert fused_attention_stablehlo.cuda_versions is None


EVERY_TPU = """
from clip_jax.chips import parse_topology
from clip_jax.command_line import simulate_devices
from clip_jax.config import MeshConfig
from clip_jax.partition import make_mesh
from clip_jax.planning.plan import devices_of

simulate_devices(1)
for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "v5e:1x1", "v6e:1x1"):
    topology = parse_topology(name)
    print(name, make_mesh(MeshConfig(), devices=devices_of(topology)).size, topology.devices)
"""


@needs_libtpu
def test_a_chip_is_one_device_of_a_mesh_and_of_tpu7x_two():
    command = [sys.executable, "-c", EVERY_TPU]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    expected = ["v4:2x2x1 4 4", "v5e:2x2 4 4", "v5p:2x2x1 4 4", "v6e:2x2 4 4", "tpu7x:2x2x1 8 8"]
    assert found.stdout.splitlines() == [*expected, "v5e:1x1 1 1", "v6e:1x1 1 1"], found.stderr


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_chips_with_sparse_cores_compute_while_gradients_are_summed(topology):
    """The share of the sums that is under way beside other work: nothing unasked, nearly all if asked."""
    keys = "--config.mesh.overlap=false", "--config.mesh.overlap=true"
    reports = [plan_command(f"--topology={topology}", key).stdout for key in keys]
    pattern = r"all-reduce, a step .* MiB a chip(?:, (\d+)% of it beside other work)?\n"
    shares = [re.search(pattern, text) for text in reports]
    print(*reports)
    assert [share and int(share[1] or 0) for share in shares] == [0, pytest.approx(100, abs=5)]


@pytest.mark.parametrize(
    ("topology", "devices"),
    [
        ("cpu:2", "cpu"),
        pytest.param("v5e:2x2", "TPU v5 lite", marks=needs_libtpu),
        pytest.param("v4:2x2x1", "TPU v4", marks=needs_libtpu),
    ],
)
def test_chips_that_cannot_overlap_refuse_to(topology, devices):
    refused = plan_command(f"--topology={topology}", "--config.mesh.overlap=true")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith(
        f"error: config.mesh.overlap is true, and the devices are {devices}; it is for TPU v5p and v6e, whose "
        "SparseCores carry collectives\n"
    )


@needs_libtpu
@pytest.mark.slow
def test_what_chips_send_is_gradients_and_features():
    command = [sys.executable, "-m", "benchmarks.plans", "demo", "--chips", "8"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    print(found)
    cells = found.splitlines()[0].split("|")
    sent, predicted = float(cells[4].split("/")[0]), float(cells[5])
    assert sent == pytest.approx(predicted, rel=0.05)  # both in whole MiB


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("config", plans.CONFIGS)
def test_which_of_the_nine_models_fit_a_v5p_of_256_chips(config):
    """As docs/plan.md has it; each takes the compiler 10 to 25 minutes."""
    command = [sys.executable, "-m", "benchmarks.plans", config]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    print(found)
    assert f"| {'no' if config == 'rn50x64' else 'yes'} |" in found
