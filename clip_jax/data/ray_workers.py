"""Calls of one function over the machines of a Ray cluster (the extra `ray`).

A task is a call. Ray gives the tasks of a node that goes away to others, so that only work is lost. The machines must
see the same files under the same paths, and have this package. Ray's usage reports are off.
"""

import itertools
import logging
import os
import re
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from clip_jax.data.workers import Outcomes, attempt
from clip_jax.errors import UserError, one_line

T = TypeVar("T")
R = TypeVar("R")

_RETRIES = 20  # of one task, for each time that its node goes away
_LEAST_WAITING = 64
_SILENCE_S = 10


def run_ray(function: Callable[[T], R], tasks: Sequence[T], *, address: str = "") -> Outcomes[R]:
    """Yields what the calls return, or the UserError that they raise; see `clip_jax.data.workers.run`.

    A Ray that is running in this process already is used, and left running.

    Raises:
      UserError: Ray is not installed; no cluster is there; or a task was given up.
    """
    # Before the import, which reads them. Reports would go to Ray's makers; of GPUs and TPUs nothing is needed.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not address:
        # The only way to make Ray listen on loopback alone; `_node_ip_address` is resolved to an outer address.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise UserError(f'--runner=ray needs Ray ({one_line(error)}); pip install "ray>=2.60"') from None
    return _run(ray, function, tasks, address)


def _run(ray: Any, function: Callable[[T], R], tasks: Sequence[T], address: str) -> Outcomes[R]:
    if not tasks:
        return
    own = not ray.is_initialized()
    if own:
        _connect(ray, address)
    waiting: list[Any] = []
    try:
        call = ray.remote(num_cpus=1, max_retries=_RETRIES, scheduling_strategy="SPREAD")(attempt)
        todo = iter(tasks)
        while True:
            room = max(_LEAST_WAITING, 2 * int(ray.cluster_resources().get("CPU", 1))) - len(waiting)
            waiting += [call.remote(function, task) for task in itertools.islice(todo, max(room, 0))]
            if not waiting:
                return
            done, waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(done[0])
    except ray.exceptions.RayError as error:
        raise UserError(
            f"Ray gave a task up ({one_line(error)[:200]}); run the same command again: it goes on where it stopped"
        ) from None
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if own:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Joins a cluster, or starts one on this machine that only this machine reaches."""
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    try:
        if address:
            _reach(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at --address={address or '(started here)'}: {one_line(error)[:200]}") from None


def _reach(address: str) -> None:
    """Raises OSError where nothing answers, after which Ray would go on looking for minutes."""
    parts = re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", address)
    if parts is not None:
        socket.create_connection((parts[1], int(parts[2])), timeout=_SILENCE_S).close()
