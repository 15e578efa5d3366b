"""Where arrays live: the mesh, the axes of every parameter, and batches placed on it.

One program serves one CPU and several pods: a mesh always has the axes `dcn_data`, `data` and `fsdp`, if need be of
size 1. Rows of a batch lie on all three; parameters and optimizer states are split over `fsdp` and replicated over the
others (with ZeRO-1 the optimizer states are split over `data` as well).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from clip_jax.config import MeshConfig
from clip_jax.errors import ConfigError
from clip_jax.rules import apply_rules, leaf_paths

AXES = ("dcn_data", "data", "fsdp")
ROWS = PartitionSpec(AXES)

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
    """Returns a mesh with the axes `dcn_data`, `data` and `fsdp` over all devices (or those given).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or `dcn_data` is not that of slices or nodes.
    """
    devices = jax.devices() if devices is None else devices
    count, fixed = len(devices), config.dcn_data * config.fsdp
    data = count // fixed if config.data == -1 else config.data
    if data * fixed != count:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"config.mesh is dcn_data={config.dcn_data}, data={config.data}, fsdp={config.fsdp}, and there are {count} "
            f"devices; dcn_data x data x fsdp must be {count} (each can be {', '.join(map(str, divisors))}, with "
            "data=-1 for the rest)"
        )
    types = (AxisType.Auto,) * len(AXES)
    if config.dcn_data == 1:
        return jax.make_mesh((1, data, config.fsdp), AXES, axis_types=types, devices=devices)
    return Mesh(hybrid_grid(config.dcn_data, (data, config.fsdp), devices), AXES, axis_types=types)


def hybrid_grid(slices: int, grid: tuple[int, int], devices: Sequence[Any]) -> np.ndarray:
    """Returns devices as [slices, *grid], each slice's together.

    Args:
      slices: what the first axis counts: the TPU's slices where the devices have a `slice_index`, else nodes, which are
        one process or several.
      grid: data and fsdp within a slice.
      devices: all of them.

    Raises:
      ConfigError: the devices' slices, or processes, are not a multiple of `slices`.
    """
    kinds = {getattr(device, "slice_index", None) for device in devices}, {device.process_index for device in devices}
    found, by_process = (len(kinds[0]), False) if None not in kinds[0] else (len(kinds[1]), True)
    if found == 1:  # one process' devices stand for several slices
        return np.asarray(devices).reshape(slices, *grid)
    if found % slices:
        what = "processes" if by_process else "slices"
        fitting = [str(n) for n in range(1, found + 1) if found % n == 0]
        raise ConfigError(
            f"config.mesh.dcn_data is {slices}, and the devices are in {found} {what}; use {' or '.join(fitting)}"
        )
    if found == slices:
        return mesh_utils.create_hybrid_device_mesh((1, *grid), (slices, 1, 1), devices, process_is_granule=by_process)
    order = sorted(devices, key=lambda device: (device.process_index, device.id))
    return np.asarray(order).reshape(slices, *grid)  # several processes to a node


def check_batch(key: str, batch: int, mesh: Mesh, *, whole: int = 0) -> None:
    """Raises a ConfigError unless a batch has the same number of rows for every device.

    Args:
      key: the config key that holds `batch`, for the message.
      batch: rows over all devices.
      mesh: the devices.
      whole: rows that the batch is a part of, so that it must divide them; 0 means none.
    """
    if batch % mesh.size:
        shared = range(mesh.size, (whole or batch + mesh.size) + 1, mesh.size)
        fitting = [rows for rows in shared if not whole or whole % rows == 0]
        below, above = [rows for rows in fitting if rows < batch], [rows for rows in fitting if rows > batch]
        near = " or ".join(str(rows) for rows in (*below[-1:], *above[:1]))
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
    _check_divisible(state, jax.tree.leaves(axes, is_leaf=_is_spec), mesh.shape["fsdp"])
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), axes, is_leaf=_is_spec)


def split_over_data(tree: Any, shardings: Any) -> Any:
    """Returns shardings that split every matrix over `data` besides, along the first dimension that allows it.

    Args:
      tree: arrays or `ShapeDtypeStruct`s; vectors and scalars keep their sharding.
      shardings: theirs, as `state_shardings` gives them.
    """

    def split(leaf: Any, sharding: NamedSharding) -> NamedSharding:
        spec = [*sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
        for i, size in enumerate(sharding.shard_shape(leaf.shape) if leaf.ndim > 1 else ()):
            if size % sharding.mesh.shape["data"] == 0:
                whole = ("data",) if spec[i] is None else ("data", spec[i])
                return NamedSharding(sharding.mesh, PartitionSpec(*spec[:i], whole, *spec[i + 1 :]))
        return sharding

    return jax.tree.map(split, tree, shardings)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keeps the first axis of an activation on the mesh's devices, row by row, where a step is traced for a mesh.

    Without it the compiler may prefer to split an activation like the parameters that it is multiplied by. The one for
    GPUs may also lay out a whole residual stream, forward and backward, with the samples innermost, as suits the one
    product behind its last row, and transpose it for all others. There activations are row-major: `benchmarks/LOG.md`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if mesh.size > 1:
        x = jax.lax.with_sharding_constraint(x, ROWS)
    return on_each_device(_row_major, x) if traced_for() == "gpu" else x


def on_each_device(function: Callable[..., jax.Array], x: jax.Array, *weights: jax.Array) -> jax.Array:
    """Applies to each device's rows what the partitioner does not know, for which it would gather all of them.

    Weights are given whole to each device, and their gradients summed over all.
    """
    if devices_of_rows() == 1:
        return function(x, *weights)
    whole = [PartitionSpec()] * len(weights)
    return jax.shard_map(function, in_specs=(ROWS, *whole), out_specs=ROWS, check_vma=False)(x, *weights)


def sum_over_rows(function: Callable[..., jax.Array], *rows: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns a sum over all rows, such as a weight's gradient: of each device's rows by itself, then between devices.

    Args:
      function: of a device's rows to their sum.
      rows: arrays whose first axis is the batch, or the devices.
      dtype: in which the devices' sums are added up; the result's.
    """

    def summed(*rows: jax.Array) -> jax.Array:
        return jax.lax.psum(function(*rows).astype(dtype), AXES)

    if devices_of_rows() == 1:
        return function(*rows).astype(dtype)
    return jax.shard_map(summed, in_specs=(ROWS,) * len(rows), out_specs=PartitionSpec(), check_vma=False)(*rows)


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def traced_for() -> str:
    """Returns the platform of the mesh for which a step is traced, such as `gpu`; elsewhere nothing."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else ""


def traced_kind() -> str:
    """Returns the kind of those devices as JAX names it, such as `NVIDIA H100 80GB HBM3`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else ""


def devices_of_rows() -> int:
    """Returns into how many parts rows are split where a step is traced for a mesh; 1 elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def place_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of the rows that each process holds of a batch."""
    sharding = row_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def split_rows(rows: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """Cuts [b, …] into [parts, b / parts, …], every device's rows by themselves, so that none changes its device."""
    each = len(rows) // mesh.size // parts
    by_device = rows.reshape(mesh.size, parts, each, *rows.shape[1:])
    micro = by_device.swapaxes(0, 1).reshape(parts, mesh.size * each, *rows.shape[1:])
    return jax.lax.with_sharding_constraint(micro, NamedSharding(mesh, PartitionSpec(None, AXES)))


def join_rows(micro: jax.Array, mesh: Mesh) -> jax.Array:
    """Undoes `split_rows`."""
    parts, rows = micro.shape[:2]
    by_device = micro.reshape(parts, mesh.size, rows // mesh.size, *micro.shape[2:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(
        by_device.reshape(parts * rows, *micro.shape[2:]), NamedSharding(mesh, ROWS)
    )


def place_whole(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Makes a global array of values that every process holds all of."""
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _check_divisible(state: Any, specs: Sequence[PartitionSpec], fsdp: int) -> None:
    split = [
        (size, path)
        for path, leaf, spec in zip(leaf_paths(state), jax.tree.leaves(state), specs, strict=True)
        for size, axis in zip(leaf.shape, spec, strict=False)
        if axis == "fsdp"
    ]
    for size, path in split:
        if size % fsdp:
            common = math.gcd(*(size for size, _ in split))
            raise ConfigError(
                f"config.mesh.fsdp is {fsdp}, which does not divide {size}, a dimension of {path}; of this model it "
                f"must divide {common}"
            )


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
