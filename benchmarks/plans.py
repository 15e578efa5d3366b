"""The nine models of the paper planned for chips that need not be there: `python -m benchmarks.plans [configs]`.

Each config is compiled ahead of time for 256 chips of v5p, or with `--chips` for 8, 64, 256 or two slices of 128, and
with `--kind=h100` for as many GPUs, with 128 pairs on every chip, as 32,768 make on 256. A program gives two rows: what
its collectives cost, for the tables in docs/scaling.md, and what a chip holds, for the table in docs/plan.md. Needs the
compilers that docs/plan.md names. A program for TPUs takes 10 to 25 minutes to compile, mostly on one core, one for
GPUs 1 to 3.

The step is operations at a share of the peak (`--mfu`), and in the table of collectives also their time at the makers'
bandwidths, but for what is under way while the chip computes.
"""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from clip_jax.chips import parse_topology
from clip_jax.command_line import load_config, one_line_errors, simulate_devices
from clip_jax.models.variants import variant_name

if TYPE_CHECKING:
    from clip_jax.planning.plan import Plan

CONFIGS = ("rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit_b32", "vit_b16", "vit_l14", "vit_l14_336")
SLICES = {"8": 1, "64": 1, "256": 1, "2x128": 2}
SHAPES = {
    "v5p": {"8": "2x2x2", "64": "4x4x4", "256": "4x8x8", "2x128": "4x4x8"},
    "h100": {"8": "8", "64": "64", "256": "256", "2x128": "128"},
}
PAIRS_A_CHIP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", choices=SLICES, default=["256"])
    parser.add_argument("--kind", choices=SHAPES, default="v5p")
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--overlap", action="store_true", help="with config.mesh.overlap")
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    arguments = parser.parse_args()
    simulate_devices(1)
    with one_line_errors():
        for name in arguments.configs:
            for chips in arguments.chips:
                plan = _plan(name, arguments.kind, chips, overlap=arguments.overlap)
                print(exchange_row(plan, mfu=arguments.mfu), memory_row(plan, mfu=arguments.mfu), sep="\n", flush=True)


def _plan(name: str, kind: str, chips: str, *, overlap: bool) -> "Plan":
    from clip_jax.planning.plan import make_plan  # and JAX, for the devices that are simulated by now

    slices = SLICES[chips]
    topology = parse_topology(f"{kind}:{SHAPES[kind][chips]}", slices=slices)
    run = load_config(f"configs/{name}.py", [], without_data=True)
    batch, mesh = PAIRS_A_CHIP * topology.devices, dataclasses.replace(run.mesh, dcn_data=slices, overlap=overlap)
    return make_plan(dataclasses.replace(run, batch=batch, mesh=mesh), topology)


def exchange_row(plan: "Plan", *, mfu: float) -> str:
    """Returns what a plan's collectives cost, as a row of the table in docs/scaling.md."""
    topology = plan.topology
    seconds, exposed = plan.step_seconds(mfu), plan.exchange_seconds(hidden=False)
    sent = {across: sum(each.sent for each in plan.collectives if each.across == across) for across in (False, True)}
    hidden = sum(each.hidden for each in plan.collectives)
    return table_row(
        variant_name(plan.config.model),
        f"{topology.slices} x {topology.name}" if topology.slices > 1 else topology.name,
        f"{sum(each.count for each in plan.collectives):,}",
        f"{sent[False] / 2**20:,.0f} / {sent[True] / 2**20:,.1f}",
        f"{_sent_by_arithmetic(plan) / 2**20:,.0f}",
        f"{hidden / max(1, sum(sent.values())):.0%}",
        f"{1e3 * plan.exchange_seconds():.2f} ms",
        f"{1e3 * (seconds + exposed):,.1f} ms",
        f"{seconds / (seconds + exposed):.1%}",
        f"{plan.memory['total'] / 2**30:.2f}",
    )


def _sent_by_arithmetic(plan: "Plan") -> float:
    """Returns the bytes that a chip sends within its slice for gradients and features, in rings.

    A gradient of every parameter in the compute dtype, summed, and of every text the features and their gradient in
    float32, gathered and scattered, of which the compiler for TPUs makes sums. Between slices goes a chip's part of the
    gradients, which is then gathered by a second sum. On GPUs the token table's gradient is float32.
    """
    import jax.numpy as jnp

    run, topology = plan.config, plan.topology
    devices, sums = topology.devices // topology.slices, 1 if topology.slices == 1 else 2
    tpu, text = topology.chip.platform == "tpu", run.model.text
    gradients = sums * jnp.dtype(run.model.dtype).itemsize * plan.parameters
    gradients += 0 if tpu else 2 * text.vocab_size * text.width
    features = (2 if tpu else 1) * 4 * run.batch * run.model.embed_dim
    return 2 * (devices - 1) / devices * (gradients + features)


def memory_row(plan: "Plan", *, mfu: float) -> str:
    """Returns what a chip holds by a plan, as a row of the table in docs/plan.md."""
    gib = {kind: size / 2**30 for kind, size in plan.memory.items()}
    seconds = plan.step_seconds(mfu)
    return table_row(
        variant_name(plan.config.model),
        f"{plan.parameters / 1e6:.1f} M",
        f"{(plan.step_flops / plan.config.batch) / 1e9:,.1f}",
        f"{gib.get('parameters', 0) + gib.get('optimizer state', 0):.2f}",
        f"{gib.get('temporaries', 0):.2f}",
        f"{gib['total']:.2f}",
        "yes" if plan.fits(plan.topology.chip.memory) else "no",
        f"{seconds:.3f} s",
        f"{seconds * plan.config.steps / 86_400:.1f}",
    )


def table_row(*cells: str) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
