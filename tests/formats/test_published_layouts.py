"""The layouts that published quantised checkpoints use are declarations: packed by hand here, loaded at any cut.

Each format below is 10 to 20 lines over the same three helpers; none needs anything of the loader or the splitter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.checkpoints.boxes import copies
from phalanx.checkpoints.coverage import planned_copies
from phalanx.checkpoints.encoding import Block
from phalanx.checkpoints.formats import Format, FormatPlan, components_of, format_weights
from phalanx.checkpoints.loader import load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.checkpoints.split_plan import SplitJob, plan_ranks
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard
from tests.support.memory_source import MemorySource

Array = np.ndarray[Any, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of AutoAWQ's word holds column 8c + AWQ_ORDER[i]."""


@dataclass(frozen=True, slots=True)
class Nibbles:
    """Eight codes in a word along ``axis``; nibble i is place ``order[i]``. Values are ``(code + offset) % 16``."""

    axis: int
    order: tuple[int, ...] = tuple(range(8))
    offset: int = 0
    dtypes = frozenset({"I32"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        return tuple(Block(1, 8) if axis == self.axis else Block() for axis in range(len(extents)))

    def decode(self, stored: Array) -> Array:
        nibbles = (np.moveaxis(stored, self.axis, -1)[..., None] >> np.arange(0, 32, 4, dtype=np.int32)) & 15
        codes = np.empty_like(nibbles)
        codes[..., list(self.order)] = (nibbles + self.offset) % 16
        return np.moveaxis(codes.reshape(*codes.shape[:-2], -1), -1, self.axis).astype(np.int8)


@dataclass(frozen=True, slots=True)
class RowPairs:
    """ModelOpt's bytes: row 2r in the low nibble, row 2r + 1 in the high one, two's complement."""

    dtypes = frozenset({"U8"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        return Block(1, 2), Block()

    def decode(self, stored: Array) -> Array:
        low, high = (stored << 4).view(np.int8) >> 4, stored.view(np.int8) >> 4
        return np.stack((low, high), axis=1).reshape(-1, stored.shape[1])


@dataclass(frozen=True, slots=True)
class Shared:
    """One float for ``rows`` rows."""

    rows: int = 1
    dtypes = frozenset({"F16", "F32"})

    def blocks(self, extents: tuple[int, ...]) -> tuple[Block, ...]:
        return (Block(1, self.rows), *(Block() for _ in extents[1:]))

    def decode(self, stored: Array) -> Array:
        return np.repeat(stored.astype(np.float32), self.rows, axis=0)


def component(spec: WeightSpec, name: str, dtype: str, group: int = 1, **changes: Any) -> WeightSpec:
    """A component with a row for each row of the weight and a column for ``group`` columns, read from ``<module>.<name>``."""
    parts = []
    for part in spec.parts:
        shape, shard = (part.shape[0], -(-part.shape[1] // group)), part.shard
        if shard is not None and shard.axis == 1 and group > 1:
            shard = replace(shard, unit=shard.unit // group, has_short_last=False)
        parts.append(replace(part, source=f"{part.source}.{name}", shape=shape, shard=shard, **changes))
    return WeightSpec(f"{spec.owner}.{name}", tuple(parts), dtype)


def by_groups(components: Mapping[str, Array], codes: str, scale: str, zero: str | None, group: int) -> Array:
    columns = np.arange(components[codes].shape[1]) // group
    zeros = 0 if zero is None else components[zero].astype(np.float32)[:, columns]
    return (components[codes].astype(np.float32) - zeros) * components[scale][:, columns]


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """DeepSeek: e4m3, a float32 factor for each 128 x 128 values, both extents with a short last block."""

    name = "fp8 blocks"

    def units(self, part: Part) -> tuple[int, ...]:
        return 1, 128

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return component(spec, "codes", "F8_E4M3"), component(spec, "scale", "F32", 128, encoding=Shared(128))

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        return by_groups(components, "codes", "scale", None, 128)


@dataclass(frozen=True, slots=True)
class Awq:
    """AutoAWQ: everything ``[in, out]``, eight columns of outputs in a word, interleaved."""

    group: int
    name = "awq"

    def units(self, part: Part) -> tuple[int, ...]:
        return 1, self.group

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        packed = Nibbles(0, AWQ_ORDER)
        return (
            component(spec, "codes", "I8", transposed=True, encoding=packed),
            component(spec, "zeros", "I8", self.group, transposed=True, encoding=packed),
            component(spec, "scale", "F32", self.group, transposed=True, encoding=Shared()),
        )

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        return by_groups(components, "codes", "scale", "zeros", self.group)


@dataclass(frozen=True, slots=True)
class Gptq:
    """GPTQ v1 with act-order: any column may belong to any group, so scales of all groups stay on every rank."""

    num_groups: int
    name = "gptq"

    def units(self, part: Part) -> tuple[int, ...]:
        return 1, 1

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        (part,) = spec.parts

        def groups(name: str, dtype: str, encoding: Any) -> WeightSpec:
            shape, shard = (part.shape[0], self.num_groups), part.shard if part.shard and part.shard.axis == 0 else None
            source = f"{part.source}.{name}"
            whole = replace(part, source=source, shape=shape, shard=shard, transposed=True, encoding=encoding)
            return WeightSpec(f"{spec.owner}.{name}", (whole,), dtype)

        columns = replace(part.shard, axis=0) if part.shard is not None and part.shard.axis == 1 else None
        order = Part(f"{part.source}.g_idx", part.shape[1:], columns)
        return (
            component(spec, "codes", "I8", transposed=True, encoding=Nibbles(1)),
            groups("zeros", "I8", Nibbles(0, offset=1)),
            groups("scale", "F32", Shared()),
            WeightSpec(f"{spec.owner}.g_idx", (order,), "I32"),
        )

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        zeros, scale = (components[name][:, components["g_idx"]] for name in ("zeros", "scale"))
        return (components["codes"].astype(np.float32) - zeros) * scale


@dataclass(frozen=True, slots=True)
class PackedRows:
    """ModelOpt W4A16: two rows in a byte, a float32 scale for each row and group."""

    group: int
    name = "w4a16"

    def units(self, part: Part) -> tuple[int, ...]:
        return 1, self.group

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        scale = component(spec, "scale", "F32", self.group, encoding=Shared())
        return component(spec, "codes", "I8", encoding=RowPairs()), scale

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        return by_groups(components, "codes", "scale", None, self.group)


@dataclass(frozen=True, slots=True)
class PerTensor:
    """ModelOpt FP8: one factor for a module; q, k and v keep their own."""

    name = "fp8"

    def units(self, part: Part) -> tuple[int, ...]:
        return 1, 1

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        def factor(part: Part) -> Part:
            shard = part.shard if part.shard is not None and part.shard.axis == 0 else None
            shape, encoding = (part.shape[0], 1), Shared(part.shape[0])
            return replace(part, source=f"{part.source}.scale", shape=shape, shard=shard, encoding=encoding)

        scale = WeightSpec(f"{spec.owner}.scale", tuple(map(factor, spec.parts)), "F32")
        return component(spec, "codes", "F8_E4M3"), scale

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        return components["codes"].astype(np.float32) * components["scale"]


def words(codes: Array, order: tuple[int, ...] = tuple(range(8))) -> Array:
    """Eight columns in a word, one element at a time."""
    packed = np.zeros((len(codes), -(-codes.shape[1] // 8)), np.uint32)
    for row, column in np.ndindex(*codes.shape):
        packed[row, column // 8] |= np.uint32(int(codes[row, column]) << 4 * order.index(column % 8))
    return packed.view(np.int32)


def values_of(codes: Array, zeros: Array, scale: Array, groups: Array) -> Array:
    return (codes.astype(np.float32) - zeros.astype(np.float32)[:, groups]) * scale.astype(np.float32)[:, groups]


def case(name: str, extents: tuple[int, int], random: np.random.Generator) -> tuple[Format, dict[str, Array], Array]:
    """A format, what is stored for the module ``w`` and the values that it stands for."""
    (rows, columns), group = extents, 16
    num_groups = -(-columns // group)
    codes, zeros = random.integers(0, 16, extents), random.integers(0, 16, (rows, num_groups))
    scale = random.uniform(0.01, 1, (rows, num_groups)).astype(np.float16)
    groups = np.arange(columns) // group
    if name == "blocks":
        low = random.normal(0, 50, extents).astype(ml_dtypes.float8_e4m3fn)
        factors = random.uniform(0.001, 9, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
        whole = np.kron(factors, np.ones((128, 128), np.float32))[:rows, :columns]
        return BlockFp8(), {"w.codes": low, "w.scale": factors}, low.astype(np.float32) * whole
    if name == "awq":
        stored = {"w.codes": words(codes.T, AWQ_ORDER), "w.zeros": words(zeros.T, AWQ_ORDER), "w.scale": scale.T.copy()}
        return Awq(group), stored, values_of(codes, zeros, scale, groups)
    if name == "gptq":
        order = random.permutation(groups).astype(np.int32)
        stored = {
            "w.codes": words(codes).T.copy(),
            "w.zeros": words((zeros.T - 1) % 16),
            "w.scale": scale.T.copy(),
            "w.g_idx": order,
        }
        return Gptq(num_groups), stored, values_of(codes, zeros, scale, order)
    if name == "tensor":
        low = random.normal(0, 50, extents).astype(ml_dtypes.float8_e4m3fn)
        return (
            PerTensor(),
            {"w.codes": low, "w.scale": np.array(0.25, np.float32)},
            low.astype(np.float32) * np.float32(0.25),
        )
    pairs = ((codes[0::2] - 8) & 15) | ((codes[1::2] - 8) & 15) << 4
    stored = {"w.codes": pairs.astype(np.uint8), "w.scale": scale.astype(np.float32)}
    return PackedRows(group), stored, values_of(codes - 8, np.zeros_like(zeros), scale, groups)


CASES = {
    "blocks": [(344, 688), (128, 256), (130, 129)],
    "awq": [(64, 96), (24, 176)],
    "gptq": [(64, 96), (40, 688)],
    "tensor": [(33, 20), (64, 64)],
    "pairs": [(34, 96), (64, 88)],
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize(("name", "extents"), [(name, extents) for name, each in CASES.items() for extents in each])
def test_every_rank_gets_its_values_and_a_split_is_covered(
    name: str, extents: tuple[int, int], axis: int | None, size: int
) -> None:
    chosen, stored, expected = case(name, extents, np.random.default_rng(len(name)))
    shard = None if axis is None else Shard(axis, what="units")
    (weight,) = format_weights([WeightSpec("x.weight", (Part("w", extents, shard),))], FormatPlan(lambda _: chosen))
    source = MemorySource(stored)
    if axis is not None and math.ceil(extents[axis] / chosen.units(weight.spec.parts[0])[axis]) < size:
        with pytest.raises(ConfigError, match=f"cannot be shared by tp_size={size}"):
            [load_weights(source, weight.components, rank, size, NumpySink()) for rank in range(size)]
        return
    for rank in range(size):
        sink = NumpySink(rounding="BF16", chunk_bytes=300)
        load_weights(source, weight.components, rank, size, sink)
        found = chosen.dequantize({one.kind: sink.weights[one.name] for one in weight.components})
        rows, columns = (weight.spec.parts[0].span(each, rank, size) for each in (0, 1))
        np.testing.assert_array_equal(found, expected[rows.start : rows.stop, columns.start : columns.stop])
    stages = (weight.components,)
    _, ranks = plan_ranks(source, SplitJob("test", stages, size))
    planned = planned_copies(stages, size)
    for tensor, info in ((tensor, source.info(tensor)) for tensor in stored):
        boxes = [piece.box for rank in ranks for piece in rank.pieces if piece.source == tensor]
        assert copies(info.shape, boxes) == planned[tensor]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_merged_parts_keep_their_own_scales(size: int) -> None:
    """q, k and v with factors 1, 10 and 100: requantising to the largest would lose the first two."""
    random, factors = np.random.default_rng(1), {"q": 1.0, "k": 10.0, "v": 100.0}
    codes = {name: random.normal(0, 50, (16, 24)).astype(ml_dtypes.float8_e4m3fn) for name in factors}
    stored = {f"{name}.codes": array for name, array in codes.items()}
    stored |= {f"{name}.scale": np.full(1, factor, np.float32) for name, factor in factors.items()}
    spec = WeightSpec("layers.0.qkv.weight", tuple(Part(name, (16, 24), Shard(0, unit=4)) for name in factors))
    weights = format_weights([spec], FormatPlan(lambda _: PerTensor()))
    for rank in range(size):
        sink = NumpySink()
        load_weights(MemorySource(stored), components_of(weights), rank, size, sink)
        rows = slice(rank * 16 // size, (rank + 1) * 16 // size)
        expected = np.concatenate(
            [codes[name][rows].astype(np.float32) * np.float32(factors[name]) for name in factors]
        )
        found = {name: sink.weights[f"layers.0.qkv.{name}"] for name in ("codes", "scale")}
        np.testing.assert_array_equal(PerTensor().dequantize(found), expected)
