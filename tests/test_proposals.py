"""What is proposed for a budget: the edge of what fits, found with few tries of a compiler that is made up here."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny import TINY

from clip_jax.chips import parse_topology
from clip_jax.config import LossConfig, MeshConfig
from clip_jax.errors import UserError
from clip_jax.models.flops import image_flops, recomputed_flops, text_flops
from clip_jax.models.variants import ResNetConfig, model_config
from clip_jax.planning.hlo import Collective
from clip_jax.planning.plan import Plan, lasting_bytes, lower_step, make_plan
from clip_jax.planning.proposals import Exhausted, Search, Tried

ROOT = Path(__file__).parent.parent
GIB = 2**30
POD = parse_topology("v5e:4x4")
B32 = dataclasses.replace(TINY, model=model_config("ViT-B/32"), batch=4096, samples=4096 * 10_000)
SHARE = {"none": 1.0, "dots": 0.5, "block": 0.25, "full": 0.2}


def state_of(config):
    """GiB of a chip: 4 in all, two thirds of them optimizer state."""
    mesh, chips = config.mesh, POD.chips
    state = 4 / mesh.fsdp
    return int(GIB * (state / 3 + state * 2 / 3 / (chips if mesh.zero1 else 1)))


class Compiler:
    """A plan's memory by a formula: state, and 1 GiB for every 1,024 pairs in memory at a time."""

    def __init__(self, *, per_pair=1 / 1024, refuse=lambda config: False):
        self.per_pair, self.refuse, self.asked = per_pair, refuse, []

    def __call__(self, config):
        self.asked.append(config)
        if self.refuse(config):
            raise UserError("the compiler failed: for no reason")
        pairs = config.micro_batch or config.batch
        memory = state_of(config) + int(GIB * pairs * self.per_pair * SHARE[config.model.remat])
        sent = 10**9 * (1 + config.mesh.fsdp + config.mesh.zero1)
        return Plan(
            config,
            POD,
            1,
            (1, 1),
            45e9 * config.batch,
            {"total": memory},
            (Collective("all-reduce", False, 1, sent, sent, 0),),
        )


def searched(config, budget, *, tries=40, compiler=None):
    compiler = compiler or Compiler()
    search = Search(
        config,
        POD,
        budget=int(budget * GIB),
        tries=tries,
        mfu=0.4,
        planner=compiler,
        lasting=state_of,
        say=lambda line: None,
    )
    search.run()
    return search, compiler


def found(search):
    return [
        (each.config.batch, each.config.model.remat, each.config.mesh.fsdp, each.config.mesh.zero1)
        for each in search.frontier()
    ]


def edge(budget, batches=(4096, 8192, 16384, 32768), policies=("none", "dots", "block")):
    """By trying everything in the config's own mesh: of each batch, the policy that recomputes least."""
    return {
        batch: next((remat for remat in policies if 4 + batch / 1024 * SHARE[remat] <= budget), None)
        for batch in batches
    }


@pytest.mark.parametrize("budget", [8.5, 9, 13, 16, 37, 100])
def test_the_edge_of_what_fits_is_found_with_few_tries(budget):
    """Of every batch the policy that recomputes least, as the try of all 16 says, with one try for each step along the
    edge; and no batch or policy beyond it."""
    search, compiler = searched(B32, budget)
    own = {each.config.batch: each.config.model.remat for each in search.frontier() if each.config.mesh == B32.mesh}
    expected = {batch: remat for batch, remat in edge(budget).items() if remat}
    print(f"{budget} GiB: {len(compiler.asked)} compilations, {found(search)}")
    assert expected.items() <= own.items()
    assert len(compiler.asked) == len(set(compiler.asked)) <= 14
    in_own_mesh = [config for config in compiler.asked if config.mesh == B32.mesh]
    assert len(in_own_mesh) <= len(expected) + 4
    assert {config.batch for config in compiler.asked if config.model.remat == "full"} <= {B32.batch}


def test_another_mesh_is_tried_only_where_it_may_make_room():
    """At 7 GiB nothing of 4,096 fits without recomputing; with the optimizer state split it does."""
    search, compiler = searched(B32, 7.0)
    assert (4096, "dots", 1, False) in found(search)
    assert (4096, "none", 1, True) in found(search)
    plenty, _ = searched(B32, 100.0)
    assert {each.config.mesh for each in plenty.tried} == {B32.mesh}
    asked = [config for config in compiler.asked if config.mesh.zero1]
    assert (4096, "block") not in {(config.batch, config.model.remat) for config in asked}  # fits without


def test_a_batch_that_does_not_fit_is_tried_in_micro_batches():
    """At 4.3 GiB, and with a state that no mesh makes smaller: the largest part that fits, in the same global batch."""
    run = dataclasses.replace(B32, batch=16384, samples=16384 * 10_000, mesh=MeshConfig(fsdp=16))
    search, _ = searched(run, 2.5)
    (best, *_) = [each for each in search.frontier() if each.config.batch == 16384]
    assert best.config.micro_batch == 8192
    assert best.config.model.remat == "block"
    assert best.work > search.tried[0].work  # a forward pass more
    text = search.report()
    assert "--config.batch=16384 --config.micro_batch=8192 --config.model.remat=block" in text
    assert "fastest with the largest batch" not in text


def test_what_is_beaten_is_not_on_the_frontier():
    """In memory and time both; a trade of one for the other stays, and so does another batch."""
    search, _ = searched(B32, 100.0, compiler=Compiler(refuse=lambda config: True))
    configs = [dataclasses.replace(B32, batch=batch, seed=seed) for batch in (4096, 8192) for seed in range(3)]
    numbers = [(5, 2.0), (6, 3.0), (4, 4.0), (9, 9.0), (9, 9.5), (10, 8.0)]
    rows = [
        Tried(config, memory, fits=memory < 10, work=0.0, seconds=seconds)
        for config, (memory, seconds) in zip(configs, numbers, strict=True)
    ]
    search._tried = {each.config: each for each in rows}
    assert [(each.memory, each.seconds) for each in search.frontier()] == [(5, 2.0), (4, 4.0), (9, 9.0)]


def test_the_number_of_tries_is_kept_and_what_was_found_is_there():
    with pytest.raises(Exhausted):
        searched(B32, 16.0, tries=2)
    search = Search(
        B32, POD, budget=16 * GIB, tries=2, mfu=0.4, planner=Compiler(), lasting=state_of, say=lambda line: None
    )
    with pytest.raises(Exhausted):
        search.run()
    assert len(search.tried) == 2
    assert "of 2 tried" in search.report()


def test_what_the_compiler_refuses_is_said_and_passed_over():
    said = []
    compiler = Compiler(refuse=lambda config: config.model.remat == "none")
    search = Search(B32, POD, budget=16 * GIB, tries=40, mfu=0.4, planner=compiler, lasting=state_of, say=said.append)
    search.run()
    assert said[0] == "--config.batch=4096: the compiler failed: for no reason"
    assert all(each.config.model.remat != "none" for each in search.frontier())
    assert found(search)[0] == (4096, "dots", 1, False)


def test_the_predicted_time_is_that_of_the_operations_and_of_the_links():
    search, _ = searched(B32, 100.0)
    first = search.tried[0]
    assert first.seconds == pytest.approx(45e9 * 4096 / (16 * 197e12 * 0.4) + 2e9 / 200e9)
    text = search.report()
    assert f"{4096 / first.seconds:,.0f}" in text
    assert "ViT-B/32 on 16 chip(s), v5e:4x4: what fits into 100.00 GiB of a chip, of 4 tried" in text
    assert text.splitlines()[-2:] == [
        "fastest with batch 4,096: --config.batch=4096",
        "fastest with the largest batch, 32,768: --config.batch=32768",
    ]


SMALL_RESNET = ResNetConfig(image_size=32, width=16, heads=4, layers=(1, 2, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["vit", "resnet"])
@pytest.mark.parametrize("remat", ["dots", "block", "full"])
def test_recomputed_operations_are_those_in_the_program(vision, remat):
    """The difference that a policy makes to XLA's count of the step before it is optimised."""
    text = dataclasses.replace(TINY.model.text, width=64, layers=3)
    tower = SMALL_RESNET if vision == "resnet" else dataclasses.replace(TINY.model.vision, width=64, layers=3)
    model = dataclasses.replace(TINY.model, vision=tower, text=text, dead_tokens="compute")
    run = dataclasses.replace(TINY, model=model, batch=8, samples=8 * 20, loss=LossConfig(form="reference"))

    def operations(policy):
        changed = dataclasses.replace(run, model=dataclasses.replace(model, remat=policy))
        return lower_step(changed, jax.devices()[:1])[1].cost_analysis()["flops"]

    forward = image_flops(model) + text_flops(model)
    counted = (operations(remat) - operations("none")) / 8
    expected = recomputed_flops(dataclasses.replace(model, remat=remat))
    print(f"{remat}: {counted / forward:.3f} of a forward pass in the program, {expected / forward:.3f} by arithmetic")
    assert abs(counted - expected) <= 0.12 * forward  # XLA counts norms and activations too


@pytest.mark.slow
def test_the_state_of_a_chip_is_that_of_the_plan():
    topology = parse_topology("cpu:8")
    for mesh in (MeshConfig(fsdp=4), MeshConfig(zero1=True)):
        run = dataclasses.replace(TINY, mesh=mesh)
        plan = make_plan(run, topology)
        assert lasting_bytes(run, topology) == plan.memory["parameters"] + plan.memory["optimizer state"]


PLAN = ("plan", "--config=configs/demo.py", "--topology=cpu:2", "--config.batch=16")
PLAN += ("--config.model.vision.layers=1", "--config.model.text.layers=1")


def plan(*arguments):
    whole = [sys.executable, "-m", "clip_jax.cli", *PLAN, *arguments]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True)


def test_the_command_where_nothing_fits_and_where_no_budget_is_known(command):
    code, out, errors = command(*PLAN, "--budget=0.0001", "--tries=1")
    assert code == 3, errors
    assert out.startswith("try 1/1  --config.batch=16: 0.")
    assert "there is more to try (--tries=1)" in out
    assert "of 1 tried: nothing; take more chips or a smaller batch" in out
    unknown = command(*PLAN, "--budget")
    assert unknown == (2, "", "error: --budget: say how many GiB a chip of cpu:2 has, such as --budget=16\n")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--mfu=40", "--mfu=40.0: it must be a share of the peak, such as 0.4"),
        ("--memory=nan", "--memory=nan: it must be positive"),
        ("--memory=-1", "--memory=-1.0: it must be positive"),
        ("--budget=nan", "--budget: say how many GiB"),
    ],
)
def test_numbers_that_no_plan_can_have(command, flag, message):
    code, out, errors = command(*PLAN, flag)
    assert (code, out) == (2, "")
    assert errors.startswith(f"error: {message}")


@pytest.mark.slow
def test_the_command_proposes_flags_that_its_plan_says_fit():
    """What is printed to be pasted is a plan of the memory that the table says."""
    found = plan("--config.batch=240", "--budget=0.11", "--tries=6")
    assert found.returncode == 0, found.stderr
    print(found.stdout)
    *_, last = [line for line in found.stdout.splitlines() if line.startswith("fastest with")]
    flags = last.partition(": ")[2].split()
    assert plan(*flags, "--memory=0.11").returncode == 0
