"""Several processes as one run, through JAX's own runtime (`jax.distributed`).

JAX itself finds its peers under SLURM, on Cloud TPUs, under Open MPI and in Kubernetes jobs; what is here decides
whether to ask it, checks what it would die of without a word (a port in use: SIGSEGV; a coordinator that is not there:
SIGABRT), and ends a process whose peers are gone, which an ordinary exit would leave hanging.
`clip_jax.processes.peers` sees to it that they notice.
"""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.config import DistributedConfig
from clip_jax.errors import RESTART, RestartError, UserError, one_line
from clip_jax.processes.peers import Addresses, Peers, join_peers
from clip_jax.processes.preemption import PreemptedError

SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
_JAX_LATER_S = 10
"""How much later JAX's own heartbeats give up on a peer, by aborting."""
_PART_S = 10.0
"""How long processes that were told to end wait for each other."""
_VERDICT_S = 0.5
"""How long an exception waits, so that where its cause is a lost peer that is what is said."""
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")


@contextmanager
def processes(config: DistributedConfig) -> Iterator[None]:
    """Joins this process to its peers, if it has any, before JAX is used; leaves them at the end.

    Where something fails inside, all processes of the run end with the same exit code: a user's mistake's, or RESTART.
    A preemption, which all processes raise together, is passed on when they have left each other in order.

    Raises:
      UserError: the coordinator's port is taken, or nobody answers there; or JAX does not find the others.
      PreemptedError: was raised inside.
    """
    cluster = detect(config, os.environ)
    if cluster is None:
        yield
        return
    _initialize(config, cluster)
    peers = _join_peers(config)
    try:
        yield
    except PreemptedError as error:
        timer = threading.Timer(_PART_S, os._exit, (error.code,))
        timer.daemon = True
        timer.start()
        _part(peers)
        timer.cancel()
        raise
    except BaseException as error:
        time.sleep(_VERDICT_S)
        _explain(error)
        peers.fail(2 if isinstance(error, UserError) else RESTART)  # an exit in order would wait for the others
    _part(peers)


def detect(config: DistributedConfig, environment: Mapping[str, str]) -> str | None:
    """Returns what brings several processes together, or None where this one is alone.

    Args:
      config: with `mode` off the answer is None, with explicit it is `the config`.
      environment: variables, as `os.environ`.
    """
    if config.mode == "off":
        return None
    if config.mode == "explicit":
        return "the config"
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return "JAX_COORDINATOR_ADDRESS"
    if not half_set(environment) and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "Cloud TPU"
    if all(name in environment for name in _KUBERNETES):
        return "Kubernetes"
    return "Cloud TPU" if "TPU_WORKER_HOSTNAMES" not in environment and _tpu_hosts() > 1 else None


def half_set(environment: Mapping[str, str]) -> list[str]:
    """Returns the variables that SLURM has not set although it has set others, as in a shell of `salloc`."""
    missing = [name for name in SLURM if name not in environment]
    return missing if len(missing) < len(SLURM) else []


def sees_all_devices(environment: Mapping[str, str]) -> bool:
    """Whether all devices that this process can see are its own: it is the only one on its host, or has one GPU.

    JAX gives a process of SLURM or Open MPI one GPU of a host, that of its number there, unless it is told otherwise:
    of eight, a process alone would leave seven idle; and where the scheduler shows each process one GPU, there is none
    of a higher number.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return False
    one_a_node = environment.get("SLURM_NTASKS", "") == environment.get("SLURM_STEP_NUM_NODES")
    alone = one_a_node or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return alone or len(environment.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1


def any_process(flag: bool) -> bool:
    """Returns whether it is so in any process; collective."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def from_first(values: np.ndarray) -> np.ndarray:
    """Returns an array as the first process has it; collective, and of the same shape and dtype in all."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _tpu_hosts() -> int:
    """Returns the hosts of this Cloud TPU, all slices together, which only Google's metadata know; 1 elsewhere.

    Raises:
      UserError: there are TPUs, and the metadata cannot be asked.
    """
    try:
        from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster  # what JAX goes by, which has no public name
    except ImportError:  # by another version it may have another name: a run elsewhere must not end for that
        return 1
    try:
        return GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1
    except Exception as error:  # of the network, or of what was answered
        raise UserError(
            f"how many hosts this TPU has cannot be found out ({one_line(error)[:200]}); say "
            "config.distributed.mode=off if this one is all of it, or explicit"
        ) from None


def _initialize(config: DistributedConfig, cluster: str) -> None:
    shared: dict[str, Any] = {
        "initialization_timeout": config.timeout,
        "heartbeat_timeout_seconds": config.heartbeat + _JAX_LATER_S,
        "local_device_ids": [] if sees_all_devices(os.environ) else None,  # None lets JAX choose
    }
    if config.mode == "auto":
        try:
            jax.distributed.initialize(**shared)
        except ValueError as error:  # of Open MPI 5, and where JAX_COORDINATOR_ADDRESS stands alone
            raise UserError(
                f"JAX does not find the processes that {cluster} brings together ({one_line(error).rstrip('.')}); say "
                "which they are with config.distributed.mode=explicit (docs/launch.md), or off where this is all"
            ) from None
        return
    host, _, port = config.coordinator.rpartition(":")
    if config.process_id == 0:
        _check_free(int(port))
    else:
        _wait_for(host, int(port), config.timeout)
    jax.distributed.initialize(
        config.coordinator,
        config.processes,
        config.process_id,
        coordinator_bind_address=config.bind or None,
        **shared,
    )


def _join_peers(config: DistributedConfig) -> Peers:
    """Connects the processes; JAX's key-value store, which has no public name, tells them where."""
    from jax._src.distributed import global_state

    client: Any = global_state.client
    host = str(global_state.coordinator_address).rpartition(":")[0].strip("[]")
    addresses = Addresses(
        host,
        publish=lambda line: client.key_value_set("clip_jax/peers", line),
        read=lambda: client.blocking_key_value_get("clip_jax/peers", 60_000),
    )
    bind = config.bind.rpartition(":")[0]
    return join_peers(
        global_state.process_id,
        global_state.num_processes,
        heartbeat=float(config.heartbeat),
        addresses=addresses,
        bind="" if ":" in bind else bind,  # IPv6 in brackets: all addresses
    )


def _part(peers: Peers) -> None:
    peers.close()
    jax.distributed.shutdown()


def _explain(error: BaseException) -> None:
    if isinstance(error, UserError | RestartError):
        print("error:", one_line(error), file=sys.stderr)
    else:
        traceback.print_exc()
        print("error: the run failed, see above; started again, it goes on from its newest checkpoint", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"config.distributed.coordinator: port {port} cannot be listened on ({error.strerror}); use another "
                f"one in every process, such as {free_port()}"
            ) from None


def _wait_for(host: str, port: int, timeout: float) -> None:
    """Returns as soon as the coordinator's port answers."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"config.distributed.coordinator: nobody answers at {host}:{port} within {timeout:.0f} s "
                    f"({error}); process 0 must run there, with its port open to this host"
                ) from None
        time.sleep(0.2)
