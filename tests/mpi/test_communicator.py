"""The MPI communicator keeps its promises, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from phalanx.parallel.communicator import Communicator, gather_bytes
from phalanx.parallel.hosts import host_ids
from phalanx.parallel.mpi_comm import world_communicator
from phalanx.runtime.control import FIRST_WORDS, ControlChannel, OrderKind
from phalanx.runtime.step import StepPlan

pytestmark = pytest.mark.mpi


@pytest.fixture
def comm() -> Iterator[Communicator]:
    world = world_communicator()
    yield world
    world.close()


def test_all_reduce_sums_in_place(comm: Communicator) -> None:
    array = np.full((3, 5), comm.rank + 1, np.float32)
    result = comm.all_reduce(array)
    assert result is array
    np.testing.assert_array_equal(array, np.full((3, 5), comm.size * (comm.size + 1) / 2, np.float32))


def test_all_gather_stacks_in_rank_order(comm: Communicator) -> None:
    gathered = comm.all_gather(np.arange(4, dtype=np.int32) + 10 * comm.rank)
    np.testing.assert_array_equal(gathered, np.arange(4) + 10 * np.arange(comm.size)[:, None])


@pytest.mark.parametrize("longest", [0, 1, 1000])
def test_gathered_bytes_keep_their_lengths(comm: Communicator, longest: int) -> None:
    texts = [bytes([rank % 3]) * (longest * rank) for rank in range(comm.size)]
    assert gather_bytes(comm, texts[comm.rank]) == texts


def test_ranks_of_one_machine_are_on_one_host(comm: Communicator) -> None:
    assert len(set(host_ids(comm))) == 1
    assert len(host_ids(comm)) == comm.size


@pytest.mark.parametrize("method", ["broadcast", "broadcast_idle"])
def test_broadcast_overwrites_with_the_roots_array(comm: Communicator, method: str) -> None:
    root = comm.size - 1
    array = np.full(7, comm.rank, np.int64)
    getattr(comm, method)(array, root)
    np.testing.assert_array_equal(array, np.full(7, root))


def test_send_does_not_wait_for_the_receiver(comm: Communicator) -> None:
    # Everybody sends first, a megabyte each: with waiting sends this would never end.
    size = 1 << 18
    comm.send(np.full(size, comm.rank, np.float32), (comm.rank + 1) % comm.size, tag=3)
    received = comm.recv(np.empty(size, np.float32), (comm.rank - 1) % comm.size, tag=3)
    np.testing.assert_array_equal(received, np.full(size, (comm.rank - 1) % comm.size, np.float32))


def test_sent_array_may_change_after_send_returned(comm: Communicator) -> None:
    array = np.full(4, comm.rank, np.int32)
    comm.send(array, (comm.rank + 1) % comm.size)
    array[...] = -1
    received = comm.recv(np.empty(4, np.int32), (comm.rank - 1) % comm.size)
    np.testing.assert_array_equal(received, np.full(4, (comm.rank - 1) % comm.size))


def test_split_groups_are_independent(comm: Communicator) -> None:
    groups = [range(0, comm.size, 2), range(1, comm.size, 2)]
    mine = groups[comm.rank % 2]
    group = comm.split(mine)
    assert (group.rank, group.size) == (comm.rank // 2, len(mine))
    total = group.all_reduce(np.array([comm.rank], np.int64))
    assert total[0] == sum(mine)
    group.close()


@pytest.mark.parametrize("num_tokens", [1, 100, *range(FIRST_WORDS - 34, FIRST_WORDS - 24), FIRST_WORDS, 5000])
def test_control_channel_carries_plans_of_any_size(comm: Communicator, num_tokens: int) -> None:
    columns = (np.array([value], np.int32) for value in (2, 0, num_tokens))
    plan = StepPlan.pack(7, *columns, np.arange(num_tokens, dtype=np.int32), np.array([num_tokens - 1], np.int32))
    channel = ControlChannel(comm)
    if comm.rank == 0:
        channel.send(OrderKind.PLAN, plan.words)
        channel.send(OrderKind.STOP)
        return
    received = channel.receive()
    assert received.kind == OrderKind.PLAN
    np.testing.assert_array_equal(received.words, plan.words)
    last = channel.receive()
    assert (last.kind, len(last.words)) == (OrderKind.STOP, 0)
