"""From the start of a process to its first step: programs that are kept for the next start, and where the time goes.

XLA compiles a run's programs anew in every process. Kept in a folder (`config.compilation_cache`), they are read there
by the next start with the same programs, devices and versions of JAX. What is read is what was compiled, so a run has
the same bits either way.
"""

import functools
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jax
from etils import epath

from clip_jax.errors import UserError, one_line

_COMPILED_OR_READ = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_hits"


def keep_programs(folder: str) -> None:
    """Lets JAX keep what it compiles in a folder, and look there before it compiles; for before the first program.

    Process 0 of a run writes, and all read. JAX's own default leaves out what took less than a second to compile; on
    a device all of these together are seconds too.

    Args:
      folder: local, or any that JAX can write; made if it is not there. Empty leaves JAX's own setting, which is what
        JAX_COMPILATION_CACHE_DIR says.

    Raises:
      UserError: the folder cannot be made.
    """
    if not folder:
        return
    folder = os.path.expanduser(folder)  # as shells do, but for what stands behind a `=`
    try:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of any kind: stores have their own
        raise UserError(f"config.compilation_cache: {folder} cannot be made: {one_line(error)}") from None
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def process_age() -> float:
    """Returns the seconds since this process was started; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class Startup:
    """A stopwatch from the start of a process to the end of its first step, and a count of its programs.

    Args:
      age: seconds that have passed already.
    """

    def __init__(self, *, age: float = 0.0) -> None:
        self._began = self._last = time.perf_counter() - age
        self._seconds: dict[str, float] = {}
        self._before = _programs().copy()

    def lap(self, name: str) -> None:
        """Puts the time since the last lap to what is called so."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """Returns seconds by lap and in all, and how many programs were compiled, and how many read."""
        found = self._seconds | {"total": self._last - self._began}
        programs = _programs() - self._before
        read = programs[_READ]
        found |= {"programs_compiled": float(programs[_COMPILED_OR_READ] - read), "programs_read": float(read)}
        return {f"startup/{name}": value for name, value in found.items()}


@functools.cache
def _programs() -> Counter[str]:
    """Returns JAX's events of this process by name, which go on being counted."""
    counts: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **details: counts.update([event]))
    jax.monitoring.register_event_listener(lambda event, **details: counts.update([event]))
    return counts


def describe_startup(values: Mapping[str, float]) -> str:
    """Returns the metrics of a start as one line."""
    found = {name.removeprefix("startup/"): value for name, value in values.items()}
    total, compiled, read = (found.pop(name) for name in ("total", "programs_compiled", "programs_read"))
    parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in found.items())
    return (
        f"first step done after {total:.1f} s ({parts}); {compiled:.0f} programs compiled, "
        f"{read:.0f} read from the compilation cache"
    )
