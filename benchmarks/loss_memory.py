"""Memory of the contrastive loss and its gradients on one device: `python -m benchmarks.loss_memory`.

XLA's own account (temporary bytes of the compiled program, per device; nothing is run) on 8 simulated devices, ours
beside the two forms of open_clip's ClipLoss (`local_loss` off and on), written in JAX and differentiated by autodiff.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from benchmarks.figures import Figure, report
from clip_jax.config import LossConfig, MeshConfig
from clip_jax.models.clip import CLIPOutput
from clip_jax.partition import ROWS, make_mesh, replicated, row_sharding
from clip_jax.training.step import contrastive_loss

MIB = 2**20


class Measured(NamedTuple):
    """A compiled loss: its name, temporary bytes a device, and its optimized HLO."""

    name: str
    bytes: int
    text: str


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=768)
    arguments = parser.parse_args()
    mesh = make_mesh(MeshConfig())
    naive, *others = measure(contenders(mesh), arguments.batch, arguments.width, mesh=mesh)
    figures = [Figure(naive.name, naive.bytes / MIB, "MiB")]
    for each in others:
        figures.append(
            Figure(each.name, each.bytes / MIB, "MiB", naive.name, naive.bytes / MIB, naive.bytes / each.bytes)
        )
    size = f"{arguments.batch:,} pairs of {arguments.width} channels in float32"
    report(f"Temporary memory of loss and gradients on one of {mesh.size} devices, {size}", figures)


def contenders(mesh: Mesh) -> dict[str, Callable[..., jax.Array]]:
    """Returns losses of (image, text, scale, bias, weight) by name."""
    losses = {
        "all-gather, whole matrix on every device": _on_all(mesh, _whole_matrix),
        "open_clip's local_loss": _on_all(mesh, _local_rows),
    }
    for kind in ("softmax", "sigmoid"):
        for form in ("reference", "chunked", "ring"):
            config = LossConfig(kind=kind, form=form)
            losses[f"{kind}, {form}"] = partial(_ours, config, mesh)
    return losses


def measure(losses: dict[str, Callable], batch: int, width: int, *, mesh: Mesh) -> Iterator[Measured]:
    """Compiles value and gradients of each loss for that many pairs."""
    rows, scalar = row_sharding(mesh), replicated(mesh)
    features = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=rows)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=scalar)
    weight = jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=rows)
    for name, loss in losses.items():
        compiled = (
            jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)), out_shardings=(scalar, (rows, rows, scalar, scalar)))
            .lower(features, features, number, number, weight)
            .compile()
        )
        analysis: Any = compiled.memory_analysis()
        yield Measured(name, analysis.temp_size_in_bytes, str(compiled.as_text()))


def _ours(config: LossConfig, mesh: Mesh, *arguments: jax.Array) -> jax.Array:
    *output, weight = arguments
    return contrastive_loss(config, CLIPOutput(*output), weight, mesh=mesh).loss


def _on_all(mesh: Mesh, loss: Callable) -> Callable:
    """Returns the mean over devices of a loss of local features; weights are left out, as there."""
    one = PartitionSpec()

    def mean(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
        return jax.lax.pmean(loss(image, text, scale), ROWS[0])

    sharded = jax.shard_map(mean, mesh=mesh, in_specs=(ROWS, ROWS, one), out_specs=one)
    return lambda image, text, scale, bias, weight: sharded(image, text, scale)


def _whole_matrix(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    every_image, every_text = jax.lax.all_gather((image, text), ROWS[0], tiled=True)
    logits = scale * every_image @ every_text.T
    labels = jnp.arange(len(logits))
    return (_cross_entropy(logits, labels, axis=1) + _cross_entropy(logits, labels, axis=0)) / 2


def _local_rows(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    every_image, every_text = jax.lax.all_gather((image, text), ROWS[0], tiled=True)
    labels = jax.lax.axis_index(ROWS[0]) * len(image) + jnp.arange(len(image))
    by_image = _cross_entropy(scale * image @ every_text.T, labels, axis=1)
    return (by_image + _cross_entropy(scale * text @ every_image.T, labels, axis=1)) / 2


def _cross_entropy(logits: jax.Array, labels: jax.Array, *, axis: int) -> jax.Array:
    own = jnp.take_along_axis(logits, jnp.expand_dims(labels, axis), axis)
    return (jax.nn.logsumexp(logits, axis) - jnp.squeeze(own, axis)).mean()


if __name__ == "__main__":
    main()
