# SPDX-License-Identifier: Apache-2.0
"""Codes with a scale, and perhaps a zero point, for each row and group of columns: ``w = (code - zero) * scale``.

The canonical form of every weight-only format and of 8-bit blocks: codes ``[O, I]`` int8 or e4m3, scale ``[O, G]`` float32, zero
``[O, G]`` int8, G groups of columns, the last one possibly short. Whatever the file holds (packed words, blocks of rows, one scale
for everything) maps to it exactly, so merged weights and any cut of rows need no rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from phalanx.checkpoints.encoding import Encoding
from phalanx.checkpoints.quantization.dummy_ranges import DUMMY_CODES, DUMMY_SCALES
from phalanx.checkpoints.quantization.encodings import GroupIndex, NibbleRows, PackedWords, Scales, scale_names
from phalanx.checkpoints.quantization.prescale import common_prescale, prescale_component
from phalanx.checkpoints.spec import DummyRange, Part, WeightSpec
from phalanx.parallel.errors import CheckpointError

if TYPE_CHECKING:
    from phalanx.checkpoints.formats import Multiply
    from phalanx.checkpoints.source import Array

__all__ = ["GroupCodes", "InputScales", "Stored"]

InputScales = Literal["plain", "fp8 groups", "fp8 groups by powers of two"]

INDEXED_ROWS = 64
"""Maximum number of rows that share a row of the index of groups: it takes 4 / 64 bytes a weight then, 4 / 16 where cuts are multiples of 16 rows."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a file keeps the pieces of a module.

    Attributes:
        codes, scale, zero: suffixes of the tensors' names; ``zero`` "" = there is none, codes are symmetric.
        codes_encoding, zero_encoding: how they are packed; None = one element for each code.
        dtype: of codes in memory, I8 or F8_E4M3.
        transposed: tensors are ``[in, out]``.
        block_rows: rows that share a scale.
        group_index: suffix of each column's group; "" = consecutive columns make a group.
        prescale: suffix of the factors of inputs, one for each column; "" = none.
    """

    codes: str
    scale: str
    zero: str = ""
    codes_encoding: Encoding | None = None
    zero_encoding: PackedWords | None = None
    dtype: str = "I8"
    transposed: bool = False
    block_rows: int = 1
    group_index: str = ""
    prescale: str = ""


@dataclass(frozen=True, slots=True)
class GroupCodes:
    """One scheme.

    Attributes:
        label: what reports and refusals call it: ``int4``, ``fp8 blocks``.
        group: columns that share a scale in the file; 0 = the whole row.
        cut: columns that share a scale in memory, a divisor of ``group``: smaller where heads decide the cuts.
        indexed: rows that share a row of the index of groups in memory.
        input: how inputs are quantised: not at all, or in groups of as many columns as the file's, counted from a rank's first one, with
            any scales or with powers of two.
    """

    label: str
    stored: Stored
    group: int
    cut: int = 0
    indexed: int = 1
    input: InputScales = "plain"

    @property
    def name(self) -> str:
        """``int4 in groups of 128``."""
        order = " with activation order" if self.stored.group_index else ""
        scaled = " with scaled inputs" if self.prescale else ""
        groups = f"in groups of {self.group}{order}" if self.group else "by rows"
        powers = " by powers of two" if self.has_power_of_two_inputs else ""
        return f"{self.label} {groups}{powers}{scaled}"

    @property
    def scheme(self) -> str:
        return self.name if self.input == "plain" else f"{self.name}, activations likewise"

    @property
    def has_power_of_two_inputs(self) -> bool:
        """Whether scales of inputs are rounded up to a power of two."""
        return self.input == "fp8 groups by powers of two"

    @property
    def prescale(self) -> str:
        """Suffix of the factors of inputs; "" = none."""
        return self.stored.prescale

    @property
    def kind(self) -> Literal["int4", "int8", "fp8"]:
        """What a code is."""
        if self.stored.dtype == "F8_E4M3":
            return "fp8"
        encoding = self.stored.codes_encoding
        return "int4" if isinstance(encoding, PackedWords | NibbleRows) and encoding.bits == 4 else "int8"

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Suffixes that a stored scale may have."""
        return scale_names(self.stored.scale)

    def for_weight(self, spec: WeightSpec) -> GroupCodes:
        """The same with groups that the cuts of ``spec`` allow: heads of 64 columns halve groups of 128, and share a row of an index."""
        cut = self.group
        for part in () if self.stored.group_index else spec.parts:
            if part.shard is not None and part.shard.axis == 1 and part.shard.groups and self.group:
                cut = math.gcd(cut, part.shard.unit)
        return replace(self, cut=cut, indexed=math.gcd(*map(_common_rows, spec.parts)))

    def units(self, part: Part) -> tuple[int, ...]:
        """Columns in whole pieces of groups; where each column names its group any columns, and rows that share an index."""
        return (self.indexed, 1) if self.stored.group_index else (1, max(self.cut, 1))

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        """``codes``, ``scale``, unless symmetric ``zero``, with activation order ``group_index``, and perhaps ``prescale``.

        The index is ``[O / indexed, I]``, because q, k and v (gate and up) may have one each, and a rank any rows of them. With that
        order any column may belong to any group, so ranks that share columns all hold the scales of every group.
        """
        stored = self.stored
        codes = [self._part(part, stored.codes_encoding, stored.codes) for part in spec.parts]
        scales = [self._group_part(part, None, *self.scale_names) for part in spec.parts]
        result = [
            WeightSpec(f"{spec.owner}.codes", tuple(codes), dtype=stored.dtype, dummy=DUMMY_CODES[self.kind]),
            WeightSpec(f"{spec.owner}.scale", tuple(scales), dtype="F32", dummy=self._dummy_scales),
        ]
        if stored.zero:
            zeros = [self._group_part(part, stored.zero_encoding, stored.zero) for part in spec.parts]
            result.append(WeightSpec(f"{spec.owner}.zero", tuple(zeros), dtype="I8", dummy=DummyRange(-1.0, 2.0)))
        if stored.group_index:
            indices = tuple(map(self._index_part, spec.parts))
            result.append(WeightSpec(f"{spec.owner}.group_index", indices, dtype="I32", dummy=DummyRange(0.0, 1.0)))
        if stored.prescale:
            result.append(prescale_component(spec, stored.prescale))
        return tuple(result)

    @property
    def _dummy_scales(self) -> DummyRange:
        """Dummy weights are made as decoded values, row by row: where rows are to share a scale, all have the same."""
        low, high = DUMMY_SCALES[self.kind]
        return DummyRange(low, high) if self.stored.block_rows == 1 else DummyRange(high, high)

    def with_prescale(self, suffix: str) -> GroupCodes:
        """The same for inputs that are multiplied by stored factors first."""
        return replace(self, stored=replace(self.stored, prescale=suffix))

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        """``[O, I]`` float32; exact where scales are of 16 bits and inputs not scaled: codes and zero points have few digits."""
        values = self._matrix(components)
        if "prescale" in components:
            values *= common_prescale(components["prescale"])
        return values

    def _matrix(self, components: Mapping[str, Array]) -> Array:
        """What inputs are multiplied by after their own factors."""
        import numpy as np

        codes = components["codes"]
        values: Array = codes.astype(np.float32)
        if "zero" in components:
            values -= self._spread(components["zero"].astype(np.float32), components)
        values *= self._spread(components["scale"], components)
        return values

    def operand(self, components: Mapping[str, Array]) -> Mapping[str, Array]:
        scaled = {"prescale": common_prescale(components["prescale"])} if "prescale" in components else {}
        return {"weight": self._matrix(components), **scaled}

    def product(self, x: Array, operand: Mapping[str, Array], multiply: Multiply) -> Array:
        from phalanx.checkpoints.quantization.numbers import dequantize, quantize_groups

        inputs = x * operand["prescale"] if "prescale" in operand else x
        if self.input != "plain":
            codes = quantize_groups(inputs, self.group, powers_of_two=self.has_power_of_two_inputs)
            inputs = dequantize(codes, self.group)
        return multiply(inputs, operand["weight"])

    def column_groups(self, components: Mapping[str, Array]) -> Array | None:
        """The group of each column, for runs of rows: ``[O / rows of a run, I]``; None where columns are in order.

        Raises:
            CheckpointError: there is no such group.
        """
        index, groups = components.get("group_index"), components["scale"].shape[1]
        if index is not None and index.size and not 0 <= index.min() <= index.max() < groups:
            raise CheckpointError(
                f"a column of a weight is in group {index.min() if index.min() < 0 else index.max()} of {groups} "
                f"({self.stored.group_index}); copy the checkpoint again"
            )
        return index

    def _spread(self, groups: Array, components: Mapping[str, Array]) -> Array:
        """Values of groups ``[O, G]`` for the columns ``[O, I]``."""
        import numpy as np

        index = self.column_groups(components)
        if index is None:
            return np.repeat(groups, self.cut, axis=1)[:, : components["codes"].shape[1]] if self.cut else groups
        values, rows = np.empty(components["codes"].shape, groups.dtype), len(groups) // max(len(index), 1)
        for number, columns in enumerate(index):
            some = slice(number * rows, (number + 1) * rows)
            np.take(groups[some], columns, axis=1, out=values[some])
        return values

    def _part(self, part: Part, encoding: Encoding | None, *suffixes: str) -> Part:
        source, *aliases = part.siblings(*suffixes)
        return replace(
            part, source=source, aliases=tuple(aliases), encoding=encoding, transposed=self.stored.transposed
        )

    def _index_part(self, part: Part) -> Part:
        shared, shard = self.indexed, part.shard
        if shard is not None and shard.axis == 0:
            shard = replace(shard, unit=shard.unit // shared, pad_to=shard.pad_to // shared)
        rows = part.source_extents[0] // shared
        return replace(
            self._part(part, GroupIndex(rows, self.group), self.stored.group_index), shape=(part.shape[0] // shared, part.shape[1]),
            shard=shard, transposed=False, first_row=part.first_row // shared, source_rows=rows,
        )  # fmt: skip

    def _group_part(self, part: Part, encoding: PackedWords | None, *suffixes: str) -> Part:
        """Of ``[O, G]`` values; a stored one repeats for each piece of its group. Zero points are packed along rows and never repeat along them."""
        columns = -(-part.shape[1] // self.cut) if self.cut else 1
        shard = part.shard
        if shard is not None and shard.axis == 1 and self.stored.group_index:
            shard = None
        elif shard is not None and shard.axis == 1:
            unit = shard.unit // self.cut if self.cut else 0
            shard = replace(shard, unit=unit, has_short_last=bool(columns % unit)) if unit else None
        repeats = self.group // self.cut if self.cut else 1
        repeated = replace(encoding, columns=repeats) if encoding else Scales(self.stored.block_rows, repeats)
        return replace(self._part(part, repeated, *suffixes), shape=(part.shape[0], columns), shard=shard)


def _common_rows(part: Part) -> int:
    """A divisor of every number of rows at which a rank's share of ``part`` can begin or end; all rows where they are not split.

    Cuts stay where they are without an index: as many ranks can share the rows as those of a plain weight.
    """
    rows, shard = math.gcd(part.shape[0], part.first_row, part.source_extents[0]), part.shard
    if shard is None or shard.axis == 1:
        return rows
    cuts = [] if shard.pad_to else [shard.unit, *([part.shape[0] // shard.groups] if shard.groups else [])]
    return math.gcd(rows, INDEXED_ROWS, *cuts)
