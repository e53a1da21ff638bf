"""What keeps MPICH's launcher from noticing a rank's end too early, between threads that stand for the ranks of one host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.liveness.hydra import HeldRanks
from phalanx.parallel.thread_comm import run_ranks

NUM_RANKS = 3
Sockets = list[dict[int, socket.socket]]


@pytest.fixture
def pmi(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The launcher's end of a rank's PMI connection, and the rank's, which the environment names as Hydra does."""
    launcher, rank = os.pipe()
    monkeypatch.setenv("PMI_FD", str(rank))
    monkeypatch.setenv("MPI_LOCALRANKID", "0")
    return launcher, rank


def star(family: socket.AddressFamily = socket.AF_UNIX) -> Sockets:
    """Connections between rank 0 and each of the others, by rank."""
    ends: Sockets = [{} for _ in range(NUM_RANKS)]
    for rank in range(1, NUM_RANKS):
        if family == socket.AF_UNIX:
            ends[0][rank], ends[rank][0] = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                ends[rank][0] = socket.create_connection(listener.getsockname())
                ends[0][rank] = listener.accept()[0]
    return ends


def exchange(sockets: Sockets) -> list[HeldRanks]:
    def rank(world: Communicator) -> HeldRanks:
        return HeldRanks.exchange(world, sockets[world.rank])

    held = run_ranks(NUM_RANKS, rank)
    close(sockets)
    return held


def close(sockets: Sockets) -> None:
    for ends in sockets:
        for sock in ends.values():
            sock.close()


def has_ended(launcher: int) -> bool:
    """Whether the launcher would take the ranks for ended: nobody holds their end of the connection any more."""
    os.set_blocking(launcher, False)
    try:
        return os.read(launcher, 1) == b""
    except BlockingIOError:
        return False


def test_the_launcher_sees_an_end_only_once_ranks_0_and_1_let_go(pmi: tuple[int, int]) -> None:
    launcher, own = pmi
    held = exchange(star())
    assert all(held)
    os.close(own)  # as the end of every rank's process would
    assert not has_ended(launcher)
    held[0].release()
    assert not has_ended(launcher), "rank 1 holds what rank 0 had"
    held[2].release()
    assert not has_ended(launcher)
    held[1].release()
    assert has_ended(launcher)
    held[1].release()  # nothing is left to let go
    os.close(launcher)


def test_a_descriptor_that_a_rank_does_not_have_is_not_handed_over(
    pmi: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, own = pmi
    missing = os.dup(own)
    os.close(missing)
    monkeypatch.setenv("PMI_FD", str(missing))
    os.close(own)
    held = exchange(star())
    assert all(held)
    assert has_ended(launcher)
    for each in held:
        each.release()
    os.close(launcher)


def test_a_rank_that_is_lost_meanwhile_is_held_by_nobody(pmi: tuple[int, int]) -> None:
    launcher, own = pmi
    sockets = star()
    sockets[0][2].close()
    sockets[0][2], lost = socket.socketpair()
    lost.close()
    held = exchange(sockets)
    os.close(own)
    assert not has_ended(launcher), "rank 1 is there"
    held[0].release()
    held[1].release()
    assert has_ended(launcher)
    os.close(launcher)


@pytest.mark.parametrize("reason", ["another launcher", "several hosts", "no connections"])
def test_elsewhere_nothing_is_held(pmi: tuple[int, int], monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    launcher, own = pmi
    if reason == "another launcher":
        monkeypatch.delenv("MPI_LOCALRANKID")
    sockets = star(socket.AF_INET if reason == "several hosts" else socket.AF_UNIX)
    if reason == "no connections":
        close(sockets)
        sockets = [{} for _ in range(NUM_RANKS)]
    assert not any(exchange(sockets))
    os.close(own)
    assert has_ended(launcher)
    os.close(launcher)


def test_a_silent_rank_of_this_host_can_be_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held = HeldRanks([], {1: process.pid, 2: 0})
    held.kill(2)  # in another container, where its number means nothing here
    held.kill(3)  # on another host
    assert process.poll() is None
    held.kill(1)
    assert process.wait(60) == -9
    held.kill(1)  # which has ended already
    assert process.stdin is not None
    process.stdin.close()
