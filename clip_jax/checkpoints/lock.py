"""One run to a workdir: a lock that names its owner, and that dies with it.

The lock is the kernel's (`flock`), so a process that is killed leaves none behind. On network file systems that pass it
on, such as NFS 4, it holds between hosts as well; there it outlives a host that is gone, until the server finds out.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import jax

from clip_jax.errors import UserError
from clip_jax.files import take_lock

FILE = "lock"
_LEASE_S = 120.0
"""How long a lock may outlive the host that took it: a server of NFS 4 gives most 90 s."""

_LOG = logging.getLogger(__name__)


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the workdir if need be, and keeps other runs out of it; process 0 does so for its whole run.

    A lock of another host is waited for, two minutes at most: that host may be gone.

    Raises:
      UserError: another run is in it, or it cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / FILE).open("a+")
    except OSError as error:
        raise unwritable(workdir, error) from None
    with file:
        _take(file, workdir)
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T %Z")}
        with suppress(OSError):  # a full disk: the lock holds without its owner's name
            file.truncate(0)
            os.write(file.fileno(), json.dumps(owner).encode())
        yield


def _take(file: TextIO, workdir: Path) -> None:
    end = time.monotonic() + _LEASE_S
    while True:
        try:
            take_lock(file, "another run in it would not be noticed")
            return
        except BlockingIOError:
            host, owner = _owner(workdir / FILE)
            if host in ("", socket.gethostname()) or time.monotonic() > end:
                raise UserError(
                    f"--workdir {workdir} is in use by {owner}; let it end, or name another folder"
                ) from None
            _LOG.warning("%s is in use by %s; waiting, since that host may be gone", workdir, owner)
            time.sleep(10.0)


def unwritable(workdir: Path, error: OSError) -> UserError:
    """Returns the one line on a workdir that cannot be written."""
    return UserError(f"--workdir {workdir} cannot be written: {error.strerror}; name a folder that can")


def _owner(file: Path) -> tuple[str, str]:
    """Returns the host of a lock's owner, and what to call the owner."""
    try:
        owner = json.loads(file.read_text())
        return owner["host"], f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError):  # it has only just taken the lock
        return "", "another run"
