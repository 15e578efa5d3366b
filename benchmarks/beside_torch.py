"""Whole training steps beside open_clip's in torch, in turns in one process.

  python -m benchmarks.beside_torch --config=configs/vit_b32.py:batch=64 --config.model.dtype=float32
      [--compare=key=value]

The same model, batch, precision and machine: both towers, contrastive loss, backward pass, AdamW, clamp of the scale.
Ours is measured as configured, and, if that differs, with `model.dead_tokens=compute`, which computes what open_clip
does; and with more keys changed. open_clip runs as its users run it at its best: bfloat16 by autocast over float32
weights, fused AdamW, TF32 products on a GPU, and with `--compile` through `torch.compile` too. Synthetic pairs, whose
captions are as long as web captions. Needs torch and open_clip.
"""

import argparse
import functools
import math
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room beside

import jax
import numpy as np

from benchmarks.figures import Figure, report
from benchmarks.step import compile_steps, load_runs, matmul_speed, trainers
from benchmarks.turns import add_compare, in_turns
from clip_jax.chips import peak_of
from clip_jax.command_line import load_config, one_line_errors, take_overrides
from clip_jax.config import RunConfig
from clip_jax.data.images import preprocess_of
from clip_jax.data.synthetic import synthetic_batches
from clip_jax.models.variants import variant_name
from tests.references import import_open_clip

OURS, PLAIN, THEIRS, COMPILED = "clip_jax", "clip_jax, all tokens", "open_clip", "open_clip, compiled"


def main() -> None:
    with one_line_errors():
        rest, overrides = take_overrides(sys.argv[1:])
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--config", required=True, help="config file, such as configs/vit_b32.py:batch=64")
        add_compare(parser)
        parser.add_argument("--rounds", type=int, default=7, help="turns; the median counts")
        parser.add_argument("--steps", type=int, default=2, help="timed steps in a turn, after one that is not")
        parser.add_argument("--compile", action="store_true", help="open_clip through torch.compile too")
        arguments = parser.parse_args(rest)
        first, *others = load_runs(arguments.config, overrides, compare=arguments.compare).items()
        plain = load_config(arguments.config, [*overrides, ("model.dead_tokens", "compute")], without_data=True)
        runs = {**({} if first[1] == plain else {OURS: first[1]}), **dict(others), PLAIN: plain}
        measure(runs, rounds=arguments.rounds, steps=arguments.steps, compiled=arguments.compile)


def measure(runs: dict[str, RunConfig], *, rounds: int, steps: int, compiled: bool) -> None:
    """Reports the time of a step of each contender.

    Args:
      runs: ours, by name, the plain one last, or alone.
      rounds: turns that count, after one that does not.
      steps: timed in a turn, after one that is not.
      compiled: measure open_clip through torch.compile too.
    """
    run, device = runs[PLAIN], jax.devices()[0]
    with ThreadPoolExecutor(1) as pool:  # their model is made while ours compile
        theirs = pool.submit(_open_clip, run, gpu=device.platform == "gpu", compiled=compiled)
        steps_of, state = compile_steps(runs)
    others = theirs.result()
    contenders = trainers(steps_of, state) | others
    calls = {name: functools.partial(train, steps) for name, train in contenders.items()}
    seconds = in_turns(calls, rounds, settle=lambda name: contenders[name](1))
    peak = peak_of(device.device_kind) or matmul_speed(device, None)
    report(
        f"Training step, {variant_name(run.model)}, {run.batch} pairs, {run.model.dtype}; {device.device_kind}, jax "
        f"{jax.__version__}; median of {rounds} turns",
        [
            *(_beside(name, seconds[name], other, seconds[other], steps) for other in others for name in runs),
            *(
                figure
                for name, step in steps_of.items()
                for figure in step.figures(name, statistics.median(seconds[name]) / steps, peak)
            ),
        ],
    )


def _beside(name: str, ours: list[float], other: str, theirs: list[float], steps: int) -> Figure:
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    mine, their = (1e3 * statistics.median(seconds) / steps for seconds in (ours, theirs))
    return Figure(name, mine, "ms", other, their, ratio)


def _open_clip(run: RunConfig, *, gpu: bool, compiled: bool) -> dict[str, Callable[[int], None]]:
    import torch

    open_clip = import_open_clip()
    torch.set_float32_matmul_precision("high" if gpu else "highest")
    device = torch.device("cuda" if gpu else "cpu")
    name = variant_name(run.model).replace("/", "-").replace("@", "-")
    model: Any = open_clip.create_model(f"{name}-quickgelu", pretrained=None).to(device)
    loss = open_clip.ClipLoss()
    decayed = [leaf for key, leaf in model.named_parameters() if leaf.ndim >= 2 and "bn" not in key]
    others = [leaf for key, leaf in model.named_parameters() if leaf.ndim < 2 or "bn" in key]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optim = run.optim
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.b1, optim.b2), eps=optim.eps, fused=True)
    rows = _batch(run)
    preprocess = preprocess_of(run.model)
    mean, std = (torch.tensor(each, device=device).reshape(1, 3, 1, 1) for each in (preprocess.mean, preprocess.std))
    pixels = torch.from_numpy(rows["image"].transpose(0, 3, 1, 2).copy()).to(device)
    tokens = torch.tensor(rows["tokens"], dtype=torch.long).to(device)

    def train(forward: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=run.model.dtype == "bfloat16"):
                features = forward((pixels / 255 - mean) / std, tokens)
                value = loss(*features[:3])
            value.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(optim.max_scale))
        value.item()

    forwards = {THEIRS: model} | ({COMPILED: torch.compile(model)} if compiled else {})
    return {name: functools.partial(train, forward) for name, forward in forwards.items()}


def _batch(run: RunConfig) -> dict[str, np.ndarray]:
    size, text = run.model.vision.image_size, run.model.text
    return next(
        synthetic_batches(
            batch=run.batch, image_size=size, context=text.context, vocab_size=text.vocab_size, seed=run.seed
        )
    )


if __name__ == "__main__":
    main()
