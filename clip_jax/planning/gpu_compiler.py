"""NVIDIA's GPUs to compile for, which need not be there: JAX's CUDA plugin has the compiler, and needs neither CUDA nor
cuDNN for it.

Nothing can be tuned by trial.
"""

import contextlib
import importlib
import importlib.util
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

from clip_jax.chips import Topology
from clip_jax.errors import UserError, one_line

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
INSTALL = "pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, in JAX's version"

# Of each kind what the compiler asks a GPU for (CUDA's device properties; XLA's gpu_device_info), with the SXM socket.
_TARGETS = {
    "a100": """
        core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
        memory_bandwidth: 2039000000000 l2_cache_size: 41943040 device_memory_size: 85094105088
        shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
    """,
    "h100": """
        core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
        memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
        shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
    """,
    "h200": """
        core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
        memory_bandwidth: 4814000000000 l2_cache_size: 62914560 device_memory_size: 150110011392
        shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
    """,
    "b200": """
        core_count: 148 fpus_per_core: 128 clock_rate_ghz: 1.965
        memory_bandwidth: 7672320000000 l2_cache_size: 132644864 device_memory_size: 191514411008
        shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
    """,
}
_ALL_HAVE = """
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
    registers_per_core_limit: 65536 registers_per_block_limit: 65536
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
"""
_CUDNN = (9, 10, 2)


def is_installed() -> bool:
    """Whether the compiler is installed; imports no JAX."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(plugin) for plugin in PLUGINS)


def compiles_for(topology: Topology) -> bool:
    """Whether a topology is of GPUs that the compiler is there for; imports no JAX."""
    return topology.chip.platform == "gpu" and is_installed()


def gpus(topology: Topology) -> Sequence[Any]:
    """Returns devices to compile for; a slice is so many hosts of up to eight GPUs.

    Raises:
      UserError: the plugin is not one that this JAX can compile with.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    chips = topology.chips // topology.slices
    hosts = chips // math.gcd(chips, topology.chip.per_host)
    major, minor, patch = _CUDNN
    capability = "major: {} minor: {}".format(*str(topology.chip.capability).split("."))
    target = f"""
        gpu_device_info {{ {_TARGETS[topology.kind]} cuda_compute_capability {{ {capability} }} {_ALL_HAVE} }}
        platform_name: "CUDA" device_description_str: "NVIDIA {topology.kind.upper()}"
        dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
    """
    shape = f"{topology.slices}x{hosts}x{chips // hosts}"
    try:
        return topologies.get_topology_desc("", "cuda", target_config=target, topology=shape).devices
    except (JaxRuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--topology={topology.name}: JAX's CUDA plugin does not compile for it ({one_line(error)[:100]}); install "
            f"the one that belongs to this JAX: {INSTALL}"
        ) from None


@contextlib.contextmanager
def assumed_cudnn(devices: Sequence[Any]) -> Iterator[None]:
    """Tells JAX cuDNN's version where a step is traced for GPUs: it asks the library itself, which may be absent."""
    if devices[0].platform != "gpu":
        yield
        return
    module: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    major, minor, patch = _CUDNN
    version = 10_000 * major + 100 * minor + patch
    known = module.cuda_versions
    module.cuda_versions = types.SimpleNamespace(cudnn_get_version=lambda: version)
    try:
        yield
    finally:
        module.cuda_versions = known
