"""Exchange between a TPU's chips while they compute, by options of XLA's compiler.

Unasked, that compiler sums all gradients at the end of each tower's backward pass, and the chips wait; and in a large
slice it makes sums over zeros of the loss's gather and scatter of features. A chip's SparseCores can carry collectives
beside its other cores. What is sent, hidden and held with these options stands in docs/scaling.md.
"""

from jax.sharding import Mesh

from clip_jax.chips import CHIPS, chip_of
from clip_jax.config import MeshConfig
from clip_jax.errors import ConfigError

_SPARSE_CORES = "xla_tpu_enable_sparse_core_collective_offload"
OPTIONS = {
    f"{_SPARSE_CORES}_all_reduce": "true",
    f"{_SPARSE_CORES}_all_gather": "true",
    f"{_SPARSE_CORES}_reduce_scatter": "true",
    f"{_SPARSE_CORES}_nd_reduce_scatter": "true",  # over all axes of a slice at once
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_jf_crs_combiner_threshold_in_bytes": str(16 * 2**20),  # gradients that are ready do not wait for the last ones
}


def overlap_options(config: MeshConfig, mesh: Mesh) -> dict[str, str]:
    """Returns with which of XLA's options a program for a mesh exchanges while it computes, if the config asks for it.

    Raises:
      ConfigError: see `check_overlap`.
    """
    check_overlap(config, mesh)
    return dict(OPTIONS) if config.overlap else {}


def check_overlap(config: MeshConfig, mesh: Mesh) -> None:
    """Refuses to overlap on devices that cannot.

    Raises:
      ConfigError: the mesh's devices have no SparseCores that libtpu lets carry collectives.
    """
    kind = mesh.devices.flat[0].device_kind
    chip = chip_of(kind)
    if config.overlap and (chip is None or not chip.overlaps):
        fitting = " and ".join(name for name, each in CHIPS.items() if each.overlaps)
        raise ConfigError(
            f"config.mesh.overlap is true, and the devices are {kind}; it is for TPU {fitting}, whose SparseCores "
            "carry collectives"
        )
