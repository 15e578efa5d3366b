"""What each memory lever does to the training step on one device: `python -m benchmarks.step_memory`.

The account of XLA's compiler for TPUs, which needs none (libtpu), for one chip of four; no array is made. State is
parameters and optimizer state. (XLA's CPU compiler merges what is recomputed with what it recomputes.)
"""

import argparse
from typing import Any

from clip_jax.chips import parse_topology
from clip_jax.command_line import load_config, simulate_devices

LEVERS = {
    "float32": {"model.dtype": "float32"},
    "bfloat16": {},
    "remat dots": {"model.remat": "dots"},
    "remat block": {"model.remat": "block"},
    "remat full": {"model.remat": "full"},
    "scan": {"model.scan_layers": "true"},
    "scan, remat block": {"model.scan_layers": "true", "model.remat": "block"},
    "first moment bfloat16": {"optim.mu_dtype": "bfloat16"},
    "micro-batches of 256": {"micro_batch": "256", "model.bn_group": "16"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/vit_b32.py")
    parser.add_argument("--levers", nargs="*", default=list(LEVERS), choices=list(LEVERS))
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--batch", default="1024")
    arguments = parser.parse_args()
    simulate_devices(1)
    import jax

    from clip_jax.planning.plan import devices_of, lower_step

    topology = parse_topology(arguments.topology)
    print(f"{arguments.config}, {arguments.batch} pairs on {topology.name}; MiB of a chip")
    for name in arguments.levers:
        overrides = [("batch", arguments.batch), *LEVERS[name].items()]
        state, lowered = lower_step(load_config(arguments.config, overrides, without_data=True), devices_of(topology))
        found: Any = lowered.compile().memory_analysis()
        lasting = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state)))
        sizes = found.temp_size_in_bytes / 2**20, lasting / 2**20
        print(f"{name:28} temporaries {sizes[0]:9,.0f}   state {sizes[1]:8,.0f}", flush=True)


if __name__ == "__main__":
    main()
