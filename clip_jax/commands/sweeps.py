"""Commands about many runs: from one file, and side by side."""

import argparse
import sys
from pathlib import Path
from typing import Any

from clip_jax.commands.flags import add_path
from clip_jax.errors import UserError, did_you_mean


def add(commands: Any) -> None:
    """Adds `sweep` and `compare`."""
    _add_sweep(commands)
    _add_compare(commands)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="runs that differ in parts of their config, from one file")
    actions = sweep.add_subparsers(required=True, metavar="action")
    expand = actions.add_parser("expand", help="print each run's command, or write commands and resolved configs")
    expand.add_argument("--to", default="local", help="local, slurm (an array) or jobset (default: local)")
    add_path(expand, "--out", help="write into this folder instead of printing")
    expand.set_defaults(run=_sweep_expand)
    run = actions.add_parser("run", help="run what is not finished, on this machine; exit code 1 if a run failed")
    run.add_argument("--jobs", type=int, default=1, help="at once; cores and GPUs are divided (default: 1)")
    run.set_defaults(run=_sweep_run)
    for action in (expand, run):
        action.add_argument("sweep", type=Path, help="sweep file, such as configs/sweeps/demo_loss.py")
        add_path(action, "--runs", default="runs", help="the sweep's folder goes in here (runs)")


def _sweep_expand(arguments: argparse.Namespace) -> None:
    from clip_jax.ablations.launching import TARGETS, write_expanded
    from clip_jax.ablations.sweep import expand, load_sweep

    if arguments.to not in TARGETS:
        raise UserError(f"--to={arguments.to}{did_you_mean(arguments.to, TARGETS)} (targets: {', '.join(TARGETS)})")
    sweep = load_sweep(arguments.sweep)
    jobs, folder = expand(sweep, arguments.overrides), arguments.runs / sweep.name
    if arguments.out is None:
        print(TARGETS[arguments.to].write(sweep, jobs, folder), end="")
        return
    print(*write_expanded(sweep, jobs, folder, arguments.out, target=arguments.to), sep="\n")


def _sweep_run(arguments: argparse.Namespace) -> None:
    from clip_jax.ablations.running import run_sweep
    from clip_jax.ablations.sweep import expand, load_sweep
    from clip_jax.console import clock, print_table

    sweep = load_sweep(arguments.sweep)
    jobs, folder = expand(sweep, arguments.overrides), arguments.runs / sweep.name
    outcomes = run_sweep(sweep, jobs, folder, at_once=arguments.jobs)
    rows = [[job.arm, str(job.seed), state, clock(seconds), note] for job, state, seconds, note in outcomes]
    print_table(f"Sweep {sweep.name}", ["arm", "seed", "", "time", "last line of train.log"], rows)
    if any(outcome.state == "failed" for outcome in outcomes):
        sys.exit(1)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser("compare", help="put runs side by side, and say what is more than seed noise")
    compare.add_argument("folders", type=Path, nargs="+", metavar="run", help="a workdir, or a folder above some")
    compare.add_argument(
        "--baseline", default="", help="the arm that the others are compared with (default: the first)"
    )
    compare.add_argument("--metric", action="append", default=[], help="may be given several times (default: all)")
    add_path(compare, "--out", help="write compare.md, compare.json and compare.png into this folder")
    compare.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from clip_jax.ablations.compare import compare, report, write_comparison

    comparison = compare(arguments.folders, baseline=arguments.baseline, metrics=arguments.metric)
    print(report(comparison))
    if arguments.out is not None:
        write_comparison(comparison, arguments.out)
