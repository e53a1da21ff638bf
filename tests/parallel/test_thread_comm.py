"""Ranks as threads keep the promises of the communicator protocol, and a failure ends the others."""

from __future__ import annotations

import numpy as np
import pytest

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.thread_comm import run_ranks


def test_collectives_and_messages() -> None:
    def rank(comm: Communicator) -> tuple[float, list[int], int]:
        total = comm.all_reduce(np.array([comm.rank + 1.0]))[0]
        gathered = comm.all_gather(np.array(comm.rank)).tolist()
        comm.send(np.array([comm.rank]), (comm.rank + 1) % comm.size)
        received = comm.recv(np.empty(1, np.int64), (comm.rank - 1) % comm.size)
        return float(total), gathered, int(received[0])

    assert run_ranks(3, rank) == [(6.0, [0, 1, 2], 2), (6.0, [0, 1, 2], 0), (6.0, [0, 1, 2], 1)]


def test_the_cause_is_raised_not_its_consequence_on_other_ranks() -> None:
    def rank(comm: Communicator) -> None:
        if comm.rank == 1:
            raise ZeroDivisionError("the cause")
        comm.barrier()

    with pytest.raises(ZeroDivisionError, match="the cause"):
        run_ranks(3, rank)


def test_waiting_receiver_ends_when_another_rank_fails() -> None:
    def rank(comm: Communicator) -> None:
        if comm.rank == 1:
            raise ZeroDivisionError("the cause")
        comm.recv(np.empty(1), 1)

    with pytest.raises(ZeroDivisionError):
        run_ranks(2, rank)
