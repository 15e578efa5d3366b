"""Where arrays live: the mesh, the axes of every parameter, and batches placed on it.

One program serves one CPU and a pod: a mesh always has the axes `data` and `fsdp`, if need be of size 1. Rows of a
batch lie on both; parameters and optimizer states are split over `fsdp` and replicated over `data`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax.config import MeshConfig
from clip_jax.errors import ConfigError
from clip_jax.rules import apply_rules

ROWS = PartitionSpec(("data", "fsdp"))

# The larger dimension of every matrix is split; vectors and scalars are replicated, and so are the small convolutions
# of a ResNet's stem.
PARAMETER_AXES = (
    (r"(^|/)(scale|bias|mean|var|class_token|logit_scale|logit_bias)$", PartitionSpec()),
    (r"/positions$", PartitionSpec(None, "fsdp")),
    (r"token_embedding/embedding$", PartitionSpec("fsdp", None)),
    (r"patch_embedding/kernel$", PartitionSpec(None, "fsdp")),
    (r"(attention/qkv|mlp/in)/kernel$", PartitionSpec(None, "fsdp")),
    (r"(attention|mlp)/out/kernel$", PartitionSpec("fsdp", None)),
    (r"/projection/kernel$", PartitionSpec("fsdp", None)),
    (r"stem_conv_\d/kernel$", PartitionSpec()),
    (r"/conv_2/kernel$", PartitionSpec(None, None, None, "fsdp")),
    (r"/(conv_1|conv_3|shortcut_conv)/kernel$", PartitionSpec(None, "fsdp")),
    (r"attention_pool/(query|key|value)/kernel$", PartitionSpec(None, "fsdp")),
    (r"attention_pool/out/kernel$", PartitionSpec("fsdp", None)),
)
COUNTER_AXES = ((r"(^|/)(step|count)$", PartitionSpec()),)


def make_mesh(config: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes `data` and `fsdp` over all devices (or those given).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    data = count // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != count:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"config.mesh is data={config.data}, fsdp={config.fsdp}, and there are {count} devices; "
            f"data x fsdp must be {count} (fsdp can be {', '.join(map(str, divisors))}, with data=-1 for the rest)"
        )
    return jax.make_mesh((data, config.fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(key: str, batch: int, mesh: Mesh) -> None:
    """Raises a ConfigError unless a batch has the same number of rows for every device.

    Args:
      key: the config key that holds `batch`, for the message.
      batch: rows over all devices.
      mesh: the devices.
    """
    if batch % mesh.size:
        below = batch // mesh.size * mesh.size
        near = " or ".join(str(rows) for rows in (below, below + mesh.size) if rows)
        raise ConfigError(f"config.{key} is {batch}, not divisible by the mesh's {mesh.size} devices; use {near}")


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every leaf of a train state (or of parameters alone).

    Optimizer moments have the path of their parameter at the end of their own, and so its axes.

    Args:
      state: arrays or `ShapeDtypeStruct`s.
      mesh: the devices.

    Raises:
      ValueError: a leaf without a rule, or a rule without a leaf.
      ConfigError: a split dimension that `fsdp` does not divide.
    """
    axes = apply_rules((*COUNTER_AXES, *PARAMETER_AXES), state, all_used=False)
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(axes, is_leaf=_is_spec), strict=True):
        _check_divisible(leaf.shape, spec, mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), axes, is_leaf=_is_spec)


def place_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of the rows that each process holds of a batch."""
    sharding = row_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def _check_divisible(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"config.mesh.{axis} is {mesh.shape[axis]}, which does not divide a model dimension of {size}"
            )


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
