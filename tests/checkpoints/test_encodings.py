"""Encoded parts at any cut: each rank gets the values of the whole tensor's decoding, and a split covers what is stored."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.checkpoints.boxes import copies
from phalanx.checkpoints.coverage import planned_copies
from phalanx.checkpoints.encoding import Block
from phalanx.checkpoints.formats import DENSE, FormatPlan, components_of, format_weights
from phalanx.checkpoints.loader import load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.checkpoints.source import Index, index_shape
from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.checkpoints.split_plan import SplitJob, plan_ranks
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard
from tests.support.memory_source import MemorySource

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Grid:
    """Value j of a block is 10 times an element of the block, plus j: distinguishes every place."""

    rows: Block
    columns: Block
    dtypes = frozenset({"I32"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        return self.rows, self.columns

    def decode(self, stored: Array) -> Array:
        for axis, block in enumerate((self.rows, self.columns)):
            stored = _expand(stored, axis, block)
        return stored


def _expand(stored: Array, axis: int, block: Block) -> Array:
    places = np.arange(stored.shape[axis] // block.stored * block.values)
    element = places // block.values * block.stored + places % block.values * block.stored // block.values
    offset = (places % block.values).astype(np.int32)
    shape = (-1, 1) if axis == 0 else (1, -1)
    return stored.take(element, axis=axis) * np.int32(10) + offset.reshape(shape)


blocks = st.sampled_from([Block(), Block(1, 4), Block(1, 8), Block(3, 8), Block(2, 2)])


@st.composite
def parts(draw: st.DrawFn) -> tuple[Part, ...]:
    """One to three ranges of rows of one source, split by rows, columns or not at all."""
    encoding = Grid(draw(blocks), draw(blocks))
    axis, unit = draw(st.sampled_from([0, 1, None])), draw(st.sampled_from([1, 4, 6, 8]))
    columns = unit * draw(st.integers(4, 9)) if axis == 1 else draw(st.integers(1, 30))
    each = [
        unit * draw(st.integers(4, 7)) if axis == 0 else draw(st.integers(1, 20))
        for _ in range(draw(st.integers(1, 3)))
    ]
    if len(each) > 1:
        each = [rows * encoding.rows.values for rows in each]  # ranges begin at a block
    shard = None if axis is None else Shard(axis, unit=unit)
    transposed = draw(st.booleans())
    return tuple(
        Part(
            "w",
            (rows, columns),
            shard,
            transposed=transposed,
            first_row=sum(each[:i]),
            source_rows=sum(each),
            encoding=encoding,
        )
        for i, rows in enumerate(each)
    )


def stored_tensor(part: Part) -> Array:
    return np.arange(math.prod(part.stored_shape), dtype=np.int32).reshape(part.stored_shape) % 97


@given(parts=parts(), size=st.integers(1, 4), chunk_bytes=st.sampled_from([1, 100, 1 << 20]))
def test_every_rank_gets_the_slices_of_the_decoded_whole(parts: tuple[Part, ...], size: int, chunk_bytes: int) -> None:
    first = parts[0]
    stored = stored_tensor(first)
    assert first.encoding is not None
    whole = first.encoding.decode(stored.T if first.transposed else stored)[: first.source_rows, : first.shape[1]]
    for rank in range(size):
        sink = NumpySink(rounding="BF16", chunk_bytes=chunk_bytes)
        load_weights(MemorySource({"w": stored}), [WeightSpec("x.codes", parts, "I32")], rank, size, sink)
        expected = []
        for part in parts:
            rows, columns = (part.span(axis, rank, size) for axis in (0, 1))
            values = whole[part.first_row : part.first_row + part.shape[0], : part.shape[1]]
            expected.append(values[rows.start : rows.stop, columns.start : columns.stop])
        np.testing.assert_array_equal(sink.weights["x.codes"], np.concatenate(expected))


@given(parts=parts(), size=st.integers(1, 4))
def test_a_split_holds_every_stored_element_as_often_as_planned(parts: tuple[Part, ...], size: int) -> None:
    stages = ([WeightSpec("x.codes", parts, "I32")],)
    source = MemorySource({"w": stored_tensor(parts[0])})
    _, ranks = plan_ranks(source, SplitJob("test", stages, size))
    boxes: dict[str, list[Index]] = defaultdict(list)
    for rank in ranks:
        for piece in rank.pieces:
            boxes[piece.source].append(piece.box)
    assert copies(source.tensors["w"].shape, boxes["w"]) == planned_copies(stages, size)["w"]


@given(parts=parts(), size=st.integers(1, 4), rank=st.integers(0, 3))
def test_a_rank_finds_all_it_reads_in_its_own_file_of_a_split(parts: tuple[Part, ...], size: int, rank: int) -> None:
    rank %= size
    stored = stored_tensor(parts[0])
    specs = [WeightSpec("x.codes", parts, "I32")]
    _, ranks = plan_ranks(MemorySource({"w": stored}), SplitJob("test", (specs,), size))
    held = np.full(stored.shape, -1, np.int32)
    for piece in ranks[rank].pieces:
        held[piece.box] = stored[piece.box]
    sinks = NumpySink(), NumpySink()
    for tensor, sink in zip((stored, held), sinks, strict=True):
        load_weights(MemorySource({"w": tensor}), specs, rank, size, sink)
    np.testing.assert_array_equal(sinks[1].weights["x.codes"], sinks[0].weights["x.codes"])


def test_shared_elements_are_planned_once() -> None:
    """q, k and v of one stored matrix with one scale: a file holds it once."""
    scale = Grid(Block(1, 24), Block())
    parts = tuple(Part("s", (8, 1), Shard(0), first_row=first, source_rows=24, encoding=scale) for first in (0, 8, 16))
    stages = ([WeightSpec("qkv.scale", parts, "I32")],)
    assert planned_copies(stages, 4) == {"s": {4: 1}}
    _, ranks = plan_ranks(MemorySource({"s": np.zeros((1, 1), np.int32)}), SplitJob("test", stages, 4))
    assert [[index_shape(piece.box) for piece in rank.pieces] for rank in ranks] == [[(1, 1)]] * 4


@dataclass(frozen=True, slots=True)
class Grouped:
    """Dense, but cut between groups of inputs."""

    group: int
    name = "grouped"

    def units(self, part: Part) -> tuple[int, ...]:
        return 1, self.group

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec,)

    dequantize = DENSE.dequantize


def mlp(inner: int, layer: int = 0) -> list[WeightSpec]:
    rows, columns = (Shard(axis, unit=8, what="feed-forward units") for axis in (0, 1))
    name = f"layers.{layer}"
    return [
        WeightSpec(
            f"{name}.gate_up.weight", (Part(f"{layer}g", (inner, 16), rows), Part(f"{layer}u", (inner, 16), rows))
        ),
        WeightSpec(f"{name}.down.weight", (Part(f"{layer}d", (16, inner), columns),)),
    ]


@pytest.mark.parametrize(("inner", "size"), [(688, 2), (688, 3), (11_008, 4), (13_696, 8), (18_944, 7), (29_568, 2)])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_inputs_decide_the_cuts_of_all_weights_that_share_the_dimension(
    inner: int, size: int, group: int
) -> None:
    """Sizes that other engines refuse: uneven shares of whole groups, the last one short where it must be."""
    plan = FormatPlan(lambda spec: Grouped(group) if "down" in spec.name else DENSE)
    gate_up, down = components_of(format_weights(mlp(inner), plan))
    stop = 0
    for rank in range(size):
        rows, columns = gate_up.parts[0].span(0, rank, size), down.parts[0].span(1, rank, size)
        assert rows == gate_up.parts[1].span(0, rank, size) == columns
        assert columns.start == stop
        assert columns.start % group == 0
        stop = columns.stop
        assert columns.size <= (math.ceil(math.ceil(inner / group) / size)) * group
    assert stop == inner


def test_layers_without_groups_keep_their_cuts() -> None:
    plan = FormatPlan(lambda spec: Grouped(64) if spec.name == "layers.1.down.weight" else DENSE)
    specs = mlp(688, 0) + mlp(688, 1)
    assert components_of(format_weights(specs, plan))[:2] == specs[:2]
    assert components_of(format_weights(specs, plan)) == components_of(
        [*format_weights(specs[:2], plan), *format_weights(specs[2:], plan)]
    )


def test_groups_that_cross_a_key_value_head_are_refused() -> None:
    shard = Shard(1, unit=16, groups=2, what="query heads")
    spec = WeightSpec("layers.0.output.weight", (Part("o", (32, 96), shard),))
    with pytest.raises(ConfigError, match=r"groups of 64 values do not divide the 48 of each of 2 query heads"):
        format_weights([spec], FormatPlan(lambda _: Grouped(64)))
