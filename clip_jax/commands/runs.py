"""Commands around a run: what it needs, whether it would work, and how its config differs from another."""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from clip_jax.commands.flags import check_mfu, check_positive
from clip_jax.errors import UserError
from clip_jax.files import json_object


def add(commands: Any) -> None:
    """Adds `plan`, `overfit-one-batch`, `doctor` and `config-diff`."""
    for add_command in (_add_plan, _add_overfit, _add_doctor, _add_config_diff):
        add_command(commands)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="say what a run needs: does it fit, how long does it take")
    plan.add_argument("--config", required=True, help="config file, such as configs/vit_b32.py[:key=value,...]")
    plan.add_argument("--topology", required=True, help="such as v5p:4x8x8, tpu7x:4x4x8, h100:64 or cpu:8")
    plan.add_argument("--slices", type=int, default=1, help="slices of that topology, or nodes; sets mesh.dcn_data")
    plan.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (default: 0.4)")
    plan.add_argument("--memory", type=float, help="GiB of a device, instead of what such chips have")
    plan.add_argument("--images-per-core", type=float, default=150.0, help="that a core of a host decodes in a second")
    plan.add_argument(
        "--budget",
        type=float,
        nargs="?",
        const=0.0,
        help="propose batch, remat and mesh for so many GiB of a device, or for all that it has, by trying them",
    )
    plan.add_argument("--tries", type=int, default=12, help="compilations for --budget at most (default: 12)")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from clip_jax.chips import parse_topology
    from clip_jax.command_line import load_config, simulate_devices
    from clip_jax.planning.gpu_compiler import compiles_for

    topology = parse_topology(arguments.topology, slices=arguments.slices)
    overrides = arguments.overrides
    if topology.slices > 1:
        overrides = [("mesh.dcn_data", str(topology.slices)), *overrides]
    config = load_config(arguments.config, overrides, without_data=True)
    check_positive(arguments, "images_per_core", "tries", "memory")
    check_mfu(arguments)
    ahead_of_time = topology.chip.platform == "tpu" or compiles_for(topology)
    simulate_devices(1 if ahead_of_time else topology.devices)
    memory = topology.chip.memory if arguments.memory is None else int(arguments.memory * 2**30)
    if arguments.budget is not None:
        _propose(config, topology, arguments.budget * 2**30 or float(memory), arguments)
        return
    from clip_jax.planning.plan import make_plan, report

    plan = make_plan(config, topology)
    print(report(plan, mfu=arguments.mfu, memory=memory, images_per_core=arguments.images_per_core))
    if not plan.fits(memory):
        sys.exit(3)


def _propose(config: Any, topology: Any, budget: float, arguments: argparse.Namespace) -> None:
    if not 0 < budget < math.inf:
        raise UserError(f"--budget: say how many GiB a {topology.each} of {topology.name} has, such as --budget=16")
    from clip_jax.planning.plan import devices_of, lasting_bytes, make_plan
    from clip_jax.planning.proposals import Exhausted, Search

    devices_of(topology)  # refuses a topology that does not exist before anything is tried
    search = Search(
        config,
        topology,
        budget=int(budget),
        tries=arguments.tries,
        mfu=arguments.mfu,
        planner=lambda tried: make_plan(tried, topology),
        lasting=lambda tried: lasting_bytes(tried, topology),
        say=lambda line: print(line, flush=True),
    )
    interrupted = False
    try:
        search.run()
    except Exhausted:
        print(f"there is more to try (--tries={arguments.tries})")
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; until then:")
    print(search.report())
    if interrupted or not search.frontier():
        sys.exit(130 if interrupted else 3)


def _add_overfit(commands: Any) -> None:
    overfit = commands.add_parser(
        "overfit-one-batch", help="a first check: train on the first batch alone, whose loss must go to about 0"
    )
    overfit.add_argument("--config", required=True, help="config file of the run, with a batch such as :batch=256")
    overfit.add_argument("--steps", type=int, default=300, help="at most (default: 300)")
    overfit.set_defaults(run=_overfit)


def _overfit(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config
    from clip_jax.processes.distributed import processes

    check_positive(arguments, "steps")
    config = load_config(arguments.config, arguments.overrides)
    with processes(config.distributed):
        import jax

        from clip_jax.run.overfit import advice, overfit_one_batch

        def say(line: str) -> None:
            if jax.process_index() == 0:
                print(line, flush=True)

        found = overfit_one_batch(config, steps=arguments.steps, say=say)
        steps, loss = len(found.metrics), found.metrics[-1]["loss"]
        if found.reached:
            say(f"learnt by heart: {found.pairs} pairs, loss {loss:.4f} after {steps} steps")
        else:
            say(f"the loss of one batch is {loss:.4f} after {steps} steps, and not under {found.limit:.4f}; look at:")
            for line in advice(found):
                say(f"- {line}")
    if not found.reached:  # outside, where an exit code would be taken for a failure that others must hear of
        sys.exit(3)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="say what a run would find on this machine, and what is wrong with it")
    doctor.add_argument("--config", help="config file of the run; without one, only the machine is examined")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config
    from clip_jax.console import print_table
    from clip_jax.doctor import examine

    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    findings = examine(config, os.environ)
    print_table("This machine", ["", "what", "found"], findings)
    if any(finding.verdict == "wrong" for finding in findings):
        sys.exit(1)


def _add_config_diff(commands: Any) -> None:
    config_diff = commands.add_parser("config-diff", help="show what differs between two runs' configs")
    config_diff.add_argument("old", type=Path, help="a workdir or its config.json")
    config_diff.add_argument("new", type=Path, help="a workdir or its config.json")
    config_diff.set_defaults(run=_config_diff)


def _config_diff(arguments: argparse.Namespace) -> None:
    from clip_jax.config import diff

    changes = diff(_read_config(arguments.old), _read_config(arguments.new))
    for key, (old, new) in changes.items():
        print(f"{key}: {old!r} -> {new!r}")
    if not changes:
        print("no difference")


def _read_config(path: Path) -> dict:
    file = path / "config.json" if path.is_dir() else path
    try:
        return json_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a run's config: {error}") from None
