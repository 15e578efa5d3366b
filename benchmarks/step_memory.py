"""What each memory lever does to the training step on one device: `python -m benchmarks.step_memory`.

XLA's account of the compiled step on a CPU; no array is made. State is parameters and optimizer state.
"""

import argparse
from typing import Any

import jax

from clip_jax.command_line import load_config
from clip_jax.plan import lower_step

LEVERS = {
    "float32": {"model.dtype": "float32"},
    "bfloat16": {},
    "remat dots": {"model.remat": "dots"},
    "remat block": {"model.remat": "block"},
    "remat full": {"model.remat": "full"},
    "scan": {"model.scan_layers": "true"},
    "scan, remat block": {"model.scan_layers": "true", "model.remat": "block"},
    "first moment bfloat16": {"optim.mu_dtype": "bfloat16"},
    "micro-batches of a quarter": {"micro_batch": "64", "model.bn_group": "16"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/vit_b32.py")
    parser.add_argument("--levers", nargs="*", default=list(LEVERS), choices=list(LEVERS))
    arguments = parser.parse_args()
    print(f"{arguments.config}, 256 pairs on one device; MiB")
    for name in arguments.levers:
        overrides = [("batch", "256"), *LEVERS[name].items()]
        state, lowered = lower_step(load_config(arguments.config, overrides, without_data=True), jax.devices()[:1])
        found: Any = lowered.compile().memory_analysis()
        lasting = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state)))
        sizes = found.temp_size_in_bytes / 2**20, lasting / 2**20
        print(f"{name:28} temporaries {sizes[0]:9,.0f}   state {sizes[1]:8,.0f}", flush=True)


if __name__ == "__main__":
    main()
