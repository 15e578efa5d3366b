"""The processes of a run notice within moments that one of them is gone, and then all end with the same exit code.

JAX alone learns of a lost peer when a collective fails, or after the time-out of its heartbeats, in some phases minutes
later; and where process 0 is lost, it aborts the others from C++. So every process keeps a TCP connection to process 0:
the kernel closes it as a process ends, in whatever way. A message a second shows that a process is not merely stopped.
"""

import math
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence

from clip_jax.errors import RESTART

_MESSAGE = struct.Struct("!BI")
_HELLO = struct.Struct("!32sI")
_ALIVE, _GOODBYE, _FAILED, _LOST = range(4)
_CONNECT_S, _BEAT_S, _BEFORE_HUB_S, _LEAVE_S = 10.0, 1.0, 0.1, 5.0


class Peers:
    """One process's connections to its peers, watched by a thread.

    A peer that is gone, or silent for `heartbeat` seconds, ends this process with RESTART. A peer that failed by itself
    ends it with that one's exit code, five seconds later, so that what all are about to raise is raised by all.

    Args:
      index: of this process.
      links: connections by the peer's index: of all others in process 0, of process 0 in the others.
      heartbeat: seconds of silence after which a peer counts as gone.
      leave: ends this process with an exit code.
    """

    def __init__(
        self,
        index: int,
        links: dict[int, socket.socket],
        *,
        heartbeat: float,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._index, self._links, self._heartbeat, self._leave = index, dict(links), heartbeat, leave
        self._parts = dict.fromkeys(links, b"")
        self._heard = dict.fromkeys(links, time.monotonic())
        self._failed: tuple[float, int, int] | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._selector = selectors.DefaultSelector()
        for peer, link in links.items():
            self._selector.register(link, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets go in order, when all processes are about to end."""
        self._over.set()  # first: the others answer by closing their ends
        self._tell(_GOODBYE, 0)
        self._thread.join()
        self._selector.close()
        for link in self._links.values():
            link.close()

    def fail(self, code: int) -> None:
        """Ends this process with an exit code, and with it the others."""
        self._failed = math.inf, self._index, code
        self._tell(_FAILED, code)
        end = time.monotonic() + _LEAVE_S + 1
        while self._index == 0 and self._links and time.monotonic() < end:  # the others would miss process 0 first
            time.sleep(0.01)
        self._over.set()
        self._leave(code)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.is_set():
            for key, _ in self._selector.select(timeout=0.2):
                self._receive(key.data)
            now = time.monotonic()
            if now - last > _BEAT_S:
                self._tell(_ALIVE, 0)
                if now - last > 3 * _BEAT_S:  # it was this process that stood still
                    self._heard = dict.fromkeys(self._links, now)
                last = now
            for peer, heard in list(self._heard.items()):
                if now - heard > self._heartbeat:
                    self._lose(peer, f"is silent for {self._heartbeat:.0f} s")
            if self._failed is not None and now > self._failed[0]:
                _, peer, code = self._failed
                self._end(f"process {peer} of the run failed, see its log", code)

    def _receive(self, peer: int) -> None:
        try:
            found = self._links[peer].recv(4096)
        except OSError:
            found = b""
        if not found:
            self._drop(peer)
            if self._failed is None and not self._over.is_set():
                self._lose(peer, "is gone")
            return
        self._heard[peer] = time.monotonic()
        self._parts[peer] += found
        while len(self._parts[peer]) >= _MESSAGE.size:
            kind, value = _MESSAGE.unpack_from(self._parts[peer])
            self._parts[peer] = self._parts[peer][_MESSAGE.size :]
            self._take(peer, kind, value)

    def _take(self, peer: int, kind: int, value: int) -> None:
        if kind == _GOODBYE:
            self._drop(peer)
        elif kind == _LOST:
            self._end(f"process {value} of the run is gone", RESTART)
        elif kind == _FAILED and self._failed is None:
            self._failed = time.monotonic() + _LEAVE_S, peer, value
            self._tell(_FAILED, value)

    def _drop(self, peer: int) -> None:
        link = self._links.pop(peer, None)
        self._heard.pop(peer, None)
        if link is not None:
            self._selector.unregister(link)
            link.close()

    def _lose(self, peer: int, how: str) -> None:
        self._heard.pop(peer, None)
        self._tell(_LOST, peer)
        if self._index == 0:
            time.sleep(_BEFORE_HUB_S)  # the others shall learn it from this message, not from losing process 0
        self._end(f"process {peer} of the run {how}", RESTART)

    def _end(self, what: str, code: int) -> None:
        self._over.set()
        then = "started again, the run goes on from its newest checkpoint" if code == RESTART else f"exit code {code}"
        print(f"error: {what}; {then}", file=sys.stderr, flush=True)
        self._leave(code)

    def _tell(self, kind: int, value: int) -> None:
        with self._lock:
            for link in list(self._links.values()):
                try:
                    link.sendall(_MESSAGE.pack(kind, value))
                except OSError:
                    continue  # its end is read as such


def join_peers(index: int, count: int, *, heartbeat: float, addresses: "Addresses", bind: str = "") -> Peers:
    """Connects the processes of a run, each with process 0.

    A process that cannot connect is left out, and is missed only by JAX's own heartbeats.

    Args:
      index: of this process.
      count: their number.
      heartbeat: see `Peers`.
      addresses: what process 0 tells the others.
      bind: address on which process 0 listens until all are there; empty means all of its host.
    """
    if index == 0:
        with socket.create_server((bind, 0)) as server:
            token = secrets.token_hex(16)
            addresses.publish(f"{server.getsockname()[1]} {token}")
            return Peers(0, _accept(server, token, count), heartbeat=heartbeat)
    port, token = addresses.read().split()
    try:
        link = socket.create_connection((addresses.host, int(port)), timeout=_CONNECT_S)
        link.sendall(_HELLO.pack(token.encode(), index))
        link.settimeout(None)
        return Peers(index, {0: link}, heartbeat=heartbeat)
    except OSError as error:
        print(f"note: no connection to process 0, port {port} ({error}); its loss is noticed late", file=sys.stderr)
        return Peers(index, {}, heartbeat=heartbeat)


class Addresses:
    """How processes learn where process 0 listens.

    Args:
      host: of process 0.
      publish: tells the others a line.
      read: waits for that line.
    """

    def __init__(self, host: str, *, publish: Callable[[str], object], read: Callable[[], str]) -> None:
        self.host, self.publish, self.read = host, publish, read


def _accept(server: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
    """Returns the connections of those that know the token; whoever else calls is hung up on."""
    links: dict[int, socket.socket] = {}
    end = time.monotonic() + _CONNECT_S
    while len(links) < count - 1 and (left := end - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            link, _ = server.accept()
        except OSError:
            continue
        try:
            link.settimeout(1)
            found, index = _HELLO.unpack(_exactly(link, _HELLO.size))
        except (OSError, struct.error):
            found, index = b"", 0
        if secrets.compare_digest(found, token.encode()) and 0 < index < count:
            link.settimeout(None)
            links[index] = link
        else:
            link.close()
    if len(links) < count - 1:
        missing = sorted(set(range(1, count)) - set(links))
        print(f"note: no connection from processes {_few(missing)}; their loss is noticed late", file=sys.stderr)
    return links


def _exactly(link: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (part := link.recv(size - len(found))):
        found += part
    return found


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
