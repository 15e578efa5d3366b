"""What more chips cost in exchange: `python -m benchmarks.scaling [configs]`.

Each config is compiled ahead of time for 8, 64 and 256 chips of v5p and for two slices of 128, with the same number
of pairs on every chip as 32,768 make on 256. Prints the rows of the table in docs/scaling.md. Needs libtpu; a program
takes minutes to compile.

The step is operations at a share of the peak (`--mfu`) and the time of its collectives at the makers' bandwidths, but
for what is under way while the chip computes.
"""

import argparse
import dataclasses

from clip_jax.chips import Topology, parse_topology
from clip_jax.command_line import load_config, simulate_devices

PAIRS_A_CHIP = 128
TOPOLOGIES = (("v5p:2x2x2", 1), ("v5p:4x4x4", 1), ("v5p:4x8x8", 1), ("v5p:4x4x8", 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--topologies", type=int, nargs="*", default=range(len(TOPOLOGIES)), help="which of the four")
    parser.add_argument("configs", nargs="*", default=["vit_b32"])
    arguments = parser.parse_args()
    simulate_devices(1)
    for name in arguments.configs:
        for number in arguments.topologies:
            shape, slices = TOPOLOGIES[number]
            print(_row(name, parse_topology(shape, slices=slices), mfu=arguments.mfu), flush=True)


def _row(name: str, topology: Topology, *, mfu: float) -> str:
    from clip_jax.models.variants import variant_name
    from clip_jax.plan import make_plan

    run = load_config(f"configs/{name}.py", [], without_data=True)
    batch = PAIRS_A_CHIP * topology.chips
    mesh = dataclasses.replace(run.mesh, dcn_data=topology.slices)
    plan = make_plan(dataclasses.replace(run, batch=batch, mesh=mesh), topology)
    seconds, exposed = plan.step_seconds(mfu), plan.exchange_seconds(hidden=False)
    sent = {across: sum(each.sent for each in plan.collectives if each.across == across) for across in (False, True)}
    hidden = sum(each.hidden for each in plan.collectives)
    cells = (
        variant_name(run.model),
        f"{topology.slices} x {topology.name}" if topology.slices > 1 else topology.name,
        f"{sum(each.count for each in plan.collectives)}",
        f"{sent[False] / 2**20:,.0f} / {sent[True] / 2**20:,.1f}",
        f"{hidden / max(1, sum(sent.values())):.0%}",
        f"{1e3 * plan.exchange_seconds():.2f} ms",
        f"{1e3 * (seconds + exposed):.1f} ms",
        f"{seconds / (seconds + exposed):.1%}",
        f"{plan.memory['total'] / 2**30:.2f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
