"""Gradients of batches that do not fit in memory, exactly (GradCache: Gao et al., 2021, arXiv:2101.06983).

The loss sees every pair of the batch, but reaches the towers only through the features. So the towers are applied twice
in micro-batches: once to get all features, from which come the loss and its gradients on each feature; and once more,
micro-batch by micro-batch, to pull these back to the parameters. Four passes instead of three, the activations of one
micro-batch at a time, and the same gradients, because a sample's features depend on nothing outside its micro-batch:
random keys belong to samples, and BatchNorm's groups lie within.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.config import RunConfig
from clip_jax.errors import ConfigError
from clip_jax.models.clip import CLIPOutput
from clip_jax.partition import AXES, ROWS, check_batch

Forward = Callable[[Any, Any], tuple[CLIPOutput, Any]]
Loss = Callable[[CLIPOutput, jax.Array], Any]
"""Features and weights of a batch to what has the loss as its attribute `loss`."""


def check_micro_batch(config: RunConfig, mesh: Mesh) -> None:
    """Raises a ConfigError unless the devices share micro-batches evenly, and no BatchNorm group is torn.

    Args:
      config: the run's.
      mesh: the devices.
    """
    if not config.micro_batch:
        return
    check_batch("micro_batch", config.micro_batch, mesh)
    each, group = config.micro_batch // mesh.size, config.model.bn_group
    if group and config.micro_batch < config.batch and each % group:
        raise ConfigError(
            f"config.model.bn_group is {group}, and a device has {each} samples of a micro-batch (config.micro_batch "
            f"{config.micro_batch} on {mesh.size} devices); the group must divide them"
        )


def cached_gradients(
    forward: Forward, loss: Loss, params: Any, batch: dict[str, jax.Array], *, parts: int, mesh: Mesh
) -> tuple[Any, Any, Any]:
    """Returns the loss, the gradients on the parameters, and what else `forward` gives, averaged.

    Args:
      forward: (params, micro-batch) to the features and, as training's by-product, a tree of means over samples.
      loss: (features, weight) of the whole batch to the loss, and what else is said of it.
      params: what the gradients are on.
      batch: arrays whose first axis is the batch.
      parts: micro-batches.
      mesh: the devices; each takes part in every micro-batch.
    """
    micro = jax.tree.map(lambda rows: _split(rows, parts, mesh), batch)

    def embed(_: None, part: dict[str, jax.Array]) -> tuple[None, CLIPOutput]:
        return None, forward(params, part)[0]

    _, every = jax.lax.scan(embed, None, micro)
    features = CLIPOutput(_join(every.image, mesh), _join(every.text, mesh), every.scale[0], every.bias[0])

    def value(features: CLIPOutput) -> tuple[jax.Array, Any]:
        output = loss(features, batch["weight"])
        return output.loss, output

    of_features, output = jax.grad(value, has_aux=True)(features)
    first = (jnp.arange(parts) == 0).astype(of_features.scale.dtype)  # scale and bias are not per sample: pulled once
    cotangents = CLIPOutput(
        _split(of_features.image, parts, mesh),
        _split(of_features.text, parts, mesh),
        first * of_features.scale,
        first * of_features.bias,
    )

    def pull(sums: tuple[Any, Any], xs: tuple[dict[str, jax.Array], CLIPOutput]) -> tuple[tuple[Any, Any], None]:
        part, cotangent = xs
        _, back, means = jax.vjp(lambda params: forward(params, part), params, has_aux=True)
        return jax.tree.map(jnp.add, sums, (*back(cotangent), means)), None

    shapes = jax.eval_shape(lambda: forward(params, jax.tree.map(lambda rows: rows[0], micro))[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (params, shapes))
    (gradients, sums), _ = jax.lax.scan(pull, zeros, (micro, cotangents))
    return output, gradients, jax.tree.map(lambda total: total / parts, sums)


def _split(rows: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """Cuts [b, …] into [parts, b / parts, …], every device's rows by themselves, so that none changes its device."""
    each = len(rows) // mesh.size // parts
    by_device = rows.reshape(mesh.size, parts, each, *rows.shape[1:])
    micro = by_device.swapaxes(0, 1).reshape(parts, mesh.size * each, *rows.shape[1:])
    return jax.lax.with_sharding_constraint(micro, NamedSharding(mesh, PartitionSpec(None, AXES)))


def _join(micro: jax.Array, mesh: Mesh) -> jax.Array:
    """Undoes `_split`."""
    parts, rows = micro.shape[:2]
    by_device = micro.reshape(parts, mesh.size, rows // mesh.size, *micro.shape[2:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(
        by_device.reshape(parts * rows, *micro.shape[2:]), NamedSharding(mesh, ROWS)
    )
