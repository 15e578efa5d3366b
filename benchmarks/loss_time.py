"""Time of the contrastive losses and their gradients beside open_clip's: `python -m benchmarks.loss_time`.

One device, float32, forward and backward; the contenders take turns. open_clip's losses run in torch on the same
features, on a GPU where JAX has one.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import Figure, report
from benchmarks.turns import in_turns
from clip_jax.config import LossConfig
from clip_jax.models.clip import CLIPOutput
from clip_jax.training.step import contrastive_loss
from tests.references import import_open_clip

REFERENCE = "open_clip"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=4_096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    image, text = (_unit(rng.standard_normal((arguments.batch, arguments.width))) for _ in range(2))
    figures = []
    for kind in ("softmax", "sigmoid"):
        calls = {REFERENCE: _open_clip(kind, image, text)}
        for form in ("reference", "chunked", "ring"):
            calls[form] = _ours(LossConfig(kind=kind, form=form), image, text)
        figures += _summarize(kind, in_turns(calls, arguments.rounds))
    title = f"Loss and gradients, {arguments.batch:,} pairs of {arguments.width} channels, median (best)"
    report(f"{title}; {jax.devices()[0]}", figures)


def _summarize(kind: str, seconds: dict[str, list[float]]) -> Iterator[Figure]:
    theirs = 1e3 * statistics.median(seconds[REFERENCE])
    for name, times in list(seconds.items())[1:]:
        faster = statistics.median(a / b for a, b in zip(seconds[REFERENCE], times, strict=True))
        middle = 1e3 * statistics.median(times)
        yield Figure(f"{kind}, {name}", middle, f"ms ({1e3 * min(times):.1f})", REFERENCE, theirs, faster)


def _ours(config: LossConfig, image: np.ndarray, text: np.ndarray) -> Callable[[], None]:
    weight = jnp.ones(len(image))
    output = CLIPOutput(jnp.asarray(image), jnp.asarray(text), jnp.float32(14), jnp.float32(-10))
    run = jax.jit(jax.value_and_grad(lambda output: contrastive_loss(config, output, weight, mesh=None).loss))
    return lambda: jax.block_until_ready(run(output))


def _open_clip(kind: str, image: np.ndarray, text: np.ndarray) -> Callable[[], None]:
    loss_module = import_open_clip().loss
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    arguments = [torch.tensor(value, device=device, requires_grad=True) for value in (image, text, 14.0, -10.0)]
    if kind == "softmax":
        loss, arguments = loss_module.ClipLoss(), arguments[:3]
    else:
        loss = loss_module.SigLipLoss()

    def run() -> None:
        for argument in arguments:
            argument.grad = None
        loss(*arguments).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
    main()
