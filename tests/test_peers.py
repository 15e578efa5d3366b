"""Processes that miss each other: over real sockets, with exit codes noted instead of exits."""

import contextlib
import socket
import threading
import time

import pytest

from clip_jax.errors import RESTART
from clip_jax.processes.peers import Addresses, Peers, join_peers


class Exits(list):
    """Exit codes of one process."""

    def __call__(self, code):
        self.append(code)

    def within(self, seconds):
        end = time.monotonic() + seconds
        while not self and time.monotonic() < end:
            time.sleep(0.01)
        return list(self)


@pytest.fixture
def star():
    """Makes the peers of a run; the sockets of all but process 0, and what each process exits with."""
    with contextlib.ExitStack() as stack:

        def make(count, *, heartbeat=60.0):
            pairs = [tuple(map(stack.enter_context, socket.socketpair())) for _ in range(count - 1)]
            exits = [Exits() for _ in range(count)]
            links = [{i + 1: pair[0] for i, pair in enumerate(pairs)}, *({0: pair[1]} for pair in pairs)]
            peers = [Peers(i, links[i], heartbeat=heartbeat, leave=exits[i]) for i in range(count)]
            for each in peers:
                stack.callback(each.close)
            return peers, [pair[1] for pair in pairs], exits

        yield make


def test_a_process_that_is_gone_ends_all_others_at_once(star, capsys):
    _, sockets, exits = star(4)
    began = time.monotonic()
    sockets[1].shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
    assert [exits[i].within(1) for i in (0, 1, 3)] == [[RESTART]] * 3
    assert time.monotonic() - began < 1
    shown = capsys.readouterr().err
    assert shown.count("error: process 2 of the run is gone; started again, the run goes on from its newest") == 3


def test_the_others_notice_that_process_0_is_gone(star, capsys):
    peers, _, exits = star(3)
    for link in list(peers[0]._links.values()):
        link.shutdown(socket.SHUT_RDWR)
    assert [exits[i].within(1) for i in (1, 2)] == [[RESTART]] * 2
    assert "process 0 of the run is gone" in capsys.readouterr().err


def test_a_silent_process_counts_as_lost(capsys):
    here, there = socket.socketpair()
    exits = Exits()
    with here, there:
        peers = Peers(0, {1: here}, heartbeat=0.7, leave=exits)
        assert exits.within(3) == [RESTART]
        peers.close()
    assert "process 1 of the run is silent for 1 s" in capsys.readouterr().err


def test_messages_keep_processes_from_counting_as_lost(star):
    peers, _, exits = star(2, heartbeat=1.5)
    time.sleep(3)
    assert exits == [[], []]


def test_a_process_that_failed_gives_its_exit_code_to_all(star, monkeypatch, capsys):
    monkeypatch.setattr("clip_jax.processes.peers._LEAVE_S", 0.3)
    peers, sockets, exits = star(3)
    peers[1].fail(2)
    sockets[0].shutdown(socket.SHUT_RDWR)
    assert [each.within(2) for each in exits] == [[2]] * 3
    assert "process 1 of the run failed, see its log; exit code 2" in capsys.readouterr().err


def test_an_end_in_order_is_no_loss(star):
    peers, _, exits = star(3)
    for each in peers:
        each.close()
    time.sleep(0.3)
    assert exits == [[], [], []]


def test_processes_find_each_other_and_strangers_are_hung_up_on():
    line, told = [], threading.Event()
    addresses = Addresses(
        "127.0.0.1", publish=lambda text: (line.append(text), told.set()), read=lambda: (told.wait(5), line[0])[1]
    )
    found = {}

    def join(index):
        found[index] = join_peers(index, 3, heartbeat=60.0, addresses=addresses, bind="127.0.0.1")

    threads = [threading.Thread(target=join, args=(0,))]
    threads[0].start()
    assert told.wait(5)
    with socket.create_connection(("127.0.0.1", int(line[0].split()[0]))) as stranger:
        stranger.sendall(b"x" * 36)
        assert stranger.recv(1) == b""
    threads += [threading.Thread(target=join, args=(index,)) for index in (1, 2)]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(found[0]._links) == [1, 2]
    for peers in found.values():
        peers.close()


def test_a_process_that_cannot_connect_goes_on_without(capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    addresses = Addresses("127.0.0.1", publish=print, read=lambda: f"{port} {'0' * 32}")
    join_peers(1, 2, heartbeat=60.0, addresses=addresses).close()
    assert "no connection to process 0" in capsys.readouterr().err


@pytest.mark.parametrize("codes", [(RESTART, 2), (2, RESTART)])
def test_the_first_failure_names_the_code(star, monkeypatch, codes):
    monkeypatch.setattr("clip_jax.processes.peers._LEAVE_S", 0.3)
    peers, sockets, exits = star(3)
    peers[1].fail(codes[0])
    assert exits[0].within(2) == [codes[0]]
    assert exits[2].within(2) == [codes[0]]
