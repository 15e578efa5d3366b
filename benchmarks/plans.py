"""The nine models of the paper planned for one topology: `python -m benchmarks.plans`.

Prints the rows of the table in docs/plan.md. Needs libtpu, and half an hour on 2 cores.
"""

import argparse

from clip_jax.chips import parse_topology
from clip_jax.command_line import load_config, simulate_devices

CONFIGS = ("rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit_b32", "vit_b16", "vit_l14", "vit_l14_336")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", default="v5p:4x8x8")
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    arguments = parser.parse_args()
    simulate_devices(1)
    from clip_jax.models.variants import variant_name
    from clip_jax.plan import make_plan

    topology = parse_topology(arguments.topology)
    for name in arguments.configs:
        plan = make_plan(load_config(f"configs/{name}.py", [], without_data=True), topology)
        gib = {kind: size / 2**30 for kind, size in plan.memory.items()}
        seconds = plan.step_seconds(arguments.mfu)
        cells = (
            variant_name(plan.config.model),
            f"{plan.parameters / 1e6:.1f} M",
            f"{(plan.step_flops / plan.config.batch) / 1e9:,.1f}",
            f"{gib.get('parameters', 0) + gib.get('optimizer state', 0):.2f}",
            f"{gib.get('temporaries', 0):.2f}",
            f"{gib['total']:.2f}",
            "yes" if plan.fits(topology.chip.memory) else "no",
            f"{seconds:.3f} s",
            f"{seconds * plan.config.steps / 86_400:.1f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
