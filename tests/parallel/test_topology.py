"""Rank arithmetic: tensor-parallel ranks are neighbours, then stages, then replicas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Layout, Topology, resolve_layout

sizes = st.integers(1, 5)


@given(tp=sizes, pp=sizes, dp=sizes)
def test_every_place_is_taken_exactly_once(tp: int, pp: int, dp: int) -> None:
    layout = Layout(tp, pp, dp)
    places = {(t.replica, t.stage, t.tp_rank) for t in (Topology(layout, rank) for rank in range(layout.world_size))}
    assert places == {(r, s, t) for r in range(dp) for s in range(pp) for t in range(tp)}


@given(tp=sizes, pp=sizes, dp=sizes, data=st.data())
def test_groups_hold_the_rank_at_its_own_place(tp: int, pp: int, dp: int, data: st.DataObject) -> None:
    layout = Layout(tp, pp, dp)
    topology = Topology(layout, data.draw(st.integers(0, layout.world_size - 1)))
    assert topology.tp_group[topology.tp_rank] == topology.replica_rank
    assert len(topology.tp_group) == tp
    assert topology.pp_group[topology.stage] == topology.replica_rank
    assert len(topology.pp_group) == pp
    assert topology.replica_group[topology.replica_rank] == topology.rank
    peers = [Topology(layout, topology.replica_group[place]) for place in topology.pp_group]
    assert [(peer.stage, peer.tp_rank) for peer in peers] == [(stage, topology.tp_rank) for stage in range(pp)]


def test_tensor_parallel_ranks_are_consecutive() -> None:
    assert list(Topology(Layout(tp=2, pp=2, dp=2), 6).tp_group) == [2, 3]
    assert list(Topology(Layout(tp=2, pp=2, dp=2), 6).pp_group) == [0, 2]


def test_all_ranks_become_tensor_parallel_by_default() -> None:
    assert resolve_layout(8) == Layout(tp=8)
    assert resolve_layout(8, pp=2) == Layout(tp=4, pp=2)
    assert resolve_layout(8, pp=2, dp=2) == Layout(tp=2, pp=2, dp=2)


@pytest.mark.parametrize(
    ("world", "sizes", "way_out"), [(3, (2, None, None), "mpirun -n 2"), (3, (None, 2, None), "mpirun -n 2")]
)
def test_wrong_number_of_ranks_names_the_right_one(world: int, sizes: tuple[int | None, ...], way_out: str) -> None:
    with pytest.raises(ConfigError, match=way_out):
        resolve_layout(world, *sizes)


@pytest.mark.parametrize("size", [0, -1])
def test_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"={size} is below 1"):
        Layout(tp=size)
