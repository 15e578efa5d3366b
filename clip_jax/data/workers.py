"""Many calls of one function, over the cores of this machine or over a Ray cluster.

The function must be idempotent. What it raises as a UserError comes back as a value, so that one call that fails does
not end the others.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from clip_jax.errors import UserError, did_you_mean

T = TypeVar("T")
R = TypeVar("R")

Outcomes = Generator[R | UserError, None, None]

RUNNERS = ("pool", "ray")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def run(
    function: Callable[[T], R], tasks: Sequence[T], *, runner: str = "pool", workers: int = 0, address: str = ""
) -> Outcomes[R]:
    """Yields what the calls return, or the UserError that they raise, in the order in which they end.

    Closing the iterator ends the calls that are under way.

    Args:
      function: of a module, so that other processes find it.
      tasks: its arguments.
      runner: `pool`, processes on this machine; or `ray`.
      workers: of the pool; 0 means one for each core that this process may use.
      address: of the Ray cluster, such as `auto` or `ray://host:10001`; empty means one started here for this job.

    Raises:
      UserError: an unknown runner, or an option of the other one; Ray is not installed or not there; or a worker
        process died.
    """
    if runner == "ray" and workers:
        raise UserError(f"--workers={workers} is for --runner=pool; Ray uses the cores of its machines")
    if runner == "ray":
        from clip_jax.data.ray_workers import run_ray

        return run_ray(function, tasks, address=address)
    if runner != "pool":
        raise UserError(f"no runner {runner!r}{did_you_mean(runner, RUNNERS)} (runners: {', '.join(RUNNERS)})")
    if address:
        raise UserError(f"--address={address} is for --runner=ray")
    if workers < 0:
        raise UserError(f"--workers={workers}: it must be positive, or 0 for one a core")
    return _run_pool(function, tasks, min(workers or cores(), len(tasks)))


def cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def attempt(function: Callable[[T], R], task: T) -> R | UserError:
    """Returns what the function does, or the UserError that it raises."""
    try:
        return function(task)
    except UserError as error:
        return error


def _run_pool(function: Callable[[T], R], tasks: Sequence[T], workers: int) -> Outcomes[R]:
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        for future in as_completed([pool.submit(attempt, function, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for want of memory; run the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()


def _start_worker(parent: int) -> None:
    """Lets a worker die with its parent, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
