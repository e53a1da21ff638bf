"""What each rank holds: whole units, everything exactly once, key/value heads copied when there are too few."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard, local_heads, local_kv_heads, stage_layers


@given(units=st.integers(1, 40), unit=st.integers(1, 16), size=st.integers(1, 8))
def test_even_split_covers_every_unit_once(units: int, unit: int, size: int) -> None:
    assume(units >= size)
    spans = [Shard(0, unit).span(units * unit, rank, size) for rank in range(size)]
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert (spans[0].start, spans[-1].stop) == (0, units * unit)
    assert all(span.start % unit == 0 and span.padding == 0 for span in spans)
    counts = [(span.stop - span.start) // unit for span in spans]
    assert max(counts) - min(counts) <= 1


@given(kv_heads=st.integers(1, 8), group=st.integers(1, 9), size=st.integers(1, 16))
def test_query_heads_stay_with_their_key_value_head(kv_heads: int, group: int, size: int) -> None:
    assume(size <= kv_heads * group)
    owned: list[int] = []
    for rank in range(size):
        heads = local_heads(kv_heads * group, kv_heads, rank, size)
        kv = local_kv_heads(kv_heads, rank, size)
        assert {head // group for head in range(heads.start, heads.stop)} == set(range(kv.start, kv.stop))
        assert heads.size % kv.size == 0, "attention groups query heads evenly over a rank's key/value heads"
        owned += range(heads.start, heads.stop)
    assert owned == list(range(kv_heads * group))


def test_fewer_key_value_heads_than_ranks_are_copied() -> None:
    assert [local_kv_heads(2, rank, 4).start for rank in range(4)] == [0, 0, 1, 1]


def test_query_heads_of_one_group_may_be_uneven() -> None:
    assert [local_heads(6, 2, rank, 4).size for rank in range(4)] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "expected"),
    [
        (25, 25, 2, [(12, 12), (13, 13)]),  # GPT-2 XL
        (24, 3, 2, [(8, 1), (16, 2)]),
        (71, 1, 8, [(8, 1)] + [(9, 1)] * 7),  # Falcon 7B
        (12, 2, 5, [(3, 1), (3, 1), (2, 1), (2, 1), (2, 1)]),
        (4, 2, 3, [(2, 1), (1, 1), (1, 1)]),
    ],
)
def test_heads_that_do_not_divide_are_shared_unevenly(
    heads: int, kv_heads: int, size: int, expected: list[tuple[int, int]]
) -> None:
    shares = [
        (local_heads(heads, kv_heads, rank, size).size, local_kv_heads(kv_heads, rank, size).size)
        for rank in range(size)
    ]
    assert sorted(shares) == sorted(expected)


def test_more_ranks_than_query_heads_are_refused_on_every_rank() -> None:
    for rank in range(4):
        with pytest.raises(
            ConfigError, match="2 query heads cannot be shared by tp_size=4; use a tp_size of at most 2"
        ):
            local_heads(2, 1, rank, 4)


@given(kv_heads=st.integers(1, 8), piece=st.integers(0, 7), size=st.integers(1, 16))
def test_copies_are_counted_as_ranks_hold_them(kv_heads: int, piece: int, size: int) -> None:
    assume(piece < kv_heads)
    for shard, extent in (
        (Shard(0, unit=3, groups=kv_heads, copy=True), 3 * kv_heads),
        (Shard(0, unit=3, groups=kv_heads, copy=True, start=piece, whole=kv_heads), 3),
    ):
        spans = [shard.span(extent, rank, size) for rank in range(size)]
        counts = [sum(span.start <= row < span.stop for span in spans) for row in range(extent)]
        assert shard.copies(extent, size) == {number: counts.count(number) for number in set(counts)}


@given(vocab=st.integers(1, 5000), size=st.integers(1, 8))
def test_vocabulary_is_padded_to_equal_parts(vocab: int, size: int) -> None:
    spans = [Shard(0, pad_to=16).span(vocab, rank, size) for rank in range(size)]
    assert len({span.size for span in spans}) == 1
    assert spans[0].size % 16 == 0
    assert [row for span in spans for row in range(span.start, span.stop)] == list(range(vocab))
    assert all(span.start == min(rank * span.size, vocab) for rank, span in enumerate(spans))


@given(layers=st.integers(1, 90), stages=st.integers(1, 12))
def test_stages_cover_all_layers_in_order(layers: int, stages: int) -> None:
    assume(layers >= stages)
    parts = stage_layers([1] * layers, 0, stages)
    assert [layer for part in parts for layer in part] == list(range(layers))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=9), head=st.integers(0, 20), stages=st.integers(1, 4))
def test_no_other_division_has_a_faster_slowest_stage(costs: list[int], head: int, stages: int) -> None:
    assume(len(costs) >= stages)

    def slowest(cuts: tuple[int, ...]) -> int:
        bounds = (0, *cuts, len(costs))
        return max(
            sum(costs[low:high]) + head * (high == len(costs))
            for low, high in zip(bounds[:-1], bounds[1:], strict=True)
        )

    parts = stage_layers(costs, head, stages)
    assert all(parts)
    assert [layer for part in parts for layer in part] == list(range(len(costs)))
    every = [slowest(cuts) for cuts in itertools.combinations(range(1, len(costs)), stages - 1)]
    assert slowest(tuple(part.start for part in parts[1:])) == min(every)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_layers=3 cannot fill pp_size=4"):
        stage_layers([1, 1, 1], 0, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("copy", [False, True])
def test_pieces_of_a_whole_are_split_as_the_whole_is(size: int, copy: bool) -> None:
    groups = {4: 4, 6: 2}.get(size, 6)  # two groups on six ranks, else whole groups
    units, unit = 12, 5
    whole = Shard(0, unit=unit, groups=groups, copy=copy)
    for rank in range(size):
        expected = whole.span(units * unit, rank, size)
        held = [
            index * unit + row
            for index in range(units)
            for piece in [
                Shard(0, unit=unit, groups=groups, copy=copy, start=index, whole=units).span(unit, rank, size)
            ]
            for row in range(piece.start, piece.stop)
        ]
        assert held == list(range(expected.start, expected.stop))
