# SPDX-License-Identifier: Apache-2.0
"""In which format a GPU holds what a checkpoint stores in another: quantised while loading, or packed for its kernels."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from phalanx.checkpoints.formats import DENSE, Format, FormatPlan, Multiply
from phalanx.checkpoints.quantization.group_codes import GroupCodes
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from phalanx.checkpoints.source import Array

__all__ = [
    "INPUT_COMPONENTS",
    "ExpertCodes",
    "HeldValues",
    "PackedCodes",
    "QuantizeName",
    "check_not_quantized",
    "has_blocks",
    "held_formats",
    "is_ordered",
    "meets_codes",
    "packed_until_values",
    "quantized_while_loading",
    "whole_blocks",
]

BLOCK = 128
"""Rows and columns that share a scale where codes of weights meet codes of inputs; `phalanx.kernels.product_sizes` has it for kernels."""

EXPERT_COLUMNS = 32
"""Columns, and multiples of them, that share a scale where grouped products take codes of experts; `phalanx.kernels.packed` has it, too."""

CODE_ALIGNMENT = 16
"""Rows and columns of which a matrix has multiples where codes of whole rows meet codes of inputs; kernels of such products have it, too."""

QuantizeName = Literal["none", "fp8", "int8"]
"""What ``--quantize`` takes: the kind of codes."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A format that holds the values of another, ``stored``, in its own way."""

    stored: GroupCodes | RowCodes

    @property
    def name(self) -> str:
        """That of the stored format."""
        return self.stored.name

    @property
    def scheme(self) -> str:
        return self.stored.scheme


@dataclass(frozen=True, slots=True)
class PackedCodes(_Held):
    """A format whose products take inputs of the compute type, as a GPU holds it: codes of 4 or 8 bits in the order of its kernels.

    Inputs are as they are, or made what the scheme says of them first (`rounds_inputs`). Some products of fp8 blocks take codes of
    inputs instead (`has_blocks`).

    Attributes:
        stored: the format that the checkpoint declares; values are its own.
    """

    @property
    def kind(self) -> Literal["int4", "int8", "fp8"]:
        """What a code is."""
        return self.stored.kind

    @property
    def group(self) -> int:
        """Columns that share a scale in memory; 0 = the whole row."""
        return self.stored.cut if isinstance(self.stored, GroupCodes) else 0

    @property
    def input_group(self) -> int:
        """Columns of inputs that share a scale of fp8 codes, whose values are multiplied; 0 = inputs are no codes."""
        return self.stored.group if isinstance(self.stored, GroupCodes) and self.stored.input != "plain" else 0

    @property
    def has_power_of_two_inputs(self) -> bool:
        """Whether those scales are powers of two."""
        return isinstance(self.stored, GroupCodes) and self.stored.has_power_of_two_inputs

    @property
    def is_unpacked(self) -> bool:
        """Whether products of many tokens read plain values, for which there is a scratch region, unless cuBLASLt takes the codes (`has_blocks`)."""
        return True

    @property
    def has_blocks(self) -> bool:
        """Whether scales are those of 128 x 128 weights and of 128 columns of inputs: cuBLASLt can multiply such fp8 codes as they are."""
        stored = self.stored
        sizes = (stored.stored.block_rows, stored.group, stored.cut) if isinstance(stored, GroupCodes) else ()
        fits = sizes == (BLOCK,) * 3 and self.input_group == BLOCK and self.kind == "fp8" and not stored.prescale
        return fits and self.is_unpacked

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are multiplied by factors, or rounded to codes, before the product."""
        return self.stored.input != "plain" or bool(self.stored.prescale)

    def units(self, part: Part) -> tuple[int, ...]:
        """As stored."""
        return self.stored.units(part)

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        """As stored; how many bytes packed codes take follows from `kind` and `has_blocks`."""
        return self.stored.components(spec)

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        """As stored."""
        return self.stored.dequantize(components)

    def operand(self, components: Mapping[str, Array]) -> Mapping[str, Array]:
        return self.stored.operand(components)

    def product(self, x: Array, operand: Mapping[str, Array], multiply: Multiply) -> Array:
        return self.stored.product(x, operand, multiply)


@dataclass(frozen=True, slots=True)
class ExpertCodes(PackedCodes):
    """Packed codes of experts: grouped products of any number of tokens take them as they are, and nothing is unpacked.

    Codes of whole rows are packed, too, where their inputs are codes: the kernels multiply what those stand for.
    """

    @property
    def is_unpacked(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class HeldValues(_Held):
    """A format whose codes no kernel of those weights takes, and whose inputs are codes or scaled: values of the compute type on a GPU.

    Inputs become what the scheme says of them first, in values of the compute type, too.

    Attributes:
        stored: the format that the checkpoint declares.
    """

    def units(self, part: Part) -> tuple[int, ...]:
        """As stored."""
        return self.stored.units(part)

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        """``weight`` in the compute type, and what the stored format has for inputs."""
        stored = self.stored.components(spec)
        return (spec, *(one for one in stored if one.kind in INPUT_COMPONENTS))

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        """The values."""
        return components["weight"]

    def operand(self, components: Mapping[str, Array]) -> Mapping[str, Array]:
        return self.stored.operand(components)

    def product(self, x: Array, operand: Mapping[str, Array], multiply: Multiply) -> Array:
        return self.stored.product(x, operand, multiply)


INPUT_COMPONENTS = frozenset({"input_scale", "prescale"})
"""Components that say something of a product's inputs."""


def _held_by_experts(owner: str, chosen: Format) -> Format:
    """In which format a GPU holds the matrix ``owner`` of experts that is stored as ``chosen``.

    Routers, groups that are not multiples of `EXPERT_COLUMNS`, and groups in any order become plain values: their kernels take no others.
    """
    has_small_groups = isinstance(chosen, GroupCodes) and chosen.cut % EXPERT_COLUMNS
    is_taken = not (owner.endswith(".router") or has_small_groups or is_ordered(chosen))
    if is_taken and isinstance(chosen, GroupCodes | RowCodes):
        return ExpertCodes(chosen)
    return _as_values(chosen)


def _as_values(chosen: Format) -> Format:
    """The format of values that stand for codes, which say what their inputs become."""
    if not isinstance(chosen, GroupCodes | RowCodes) or is_ordered(chosen):
        return DENSE
    return DENSE if chosen.input == "plain" and not chosen.prescale else HeldValues(chosen)


def packed_until_values(chosen: GroupCodes | RowCodes) -> PackedCodes:
    """How codes are packed on the way to the values that they stand for."""
    return PackedCodes(replace(chosen, input="plain", prescale="") if isinstance(chosen, RowCodes) else chosen)


def _held_by_products(chosen: Format, takes_codes: bool) -> Format:
    """In which format a GPU holds a matrix that is stored as ``chosen``.

    Groups in any order become plain values. Codes are packed where inputs are plain or codes of groups, and where ``takes_codes`` says that
    no product of codes takes the matrix; else they stay as they are stored.
    """
    if is_ordered(chosen):
        return DENSE
    if isinstance(chosen, GroupCodes) and not chosen.stored.group_index:  # kernels take groups of consecutive columns
        return PackedCodes(chosen)
    if isinstance(chosen, RowCodes) and (chosen.input == "plain" or not takes_codes):
        return PackedCodes(chosen)
    return chosen


def _is_aligned(spec: WeightSpec, size: int) -> bool:
    """Whether products of codes take what each of ``size`` ranks holds of a matrix."""
    extents = (extent for rank in range(size) for extent in spec.local_shape(rank, size))
    return math.gcd(CODE_ALIGNMENT, *extents) == CODE_ALIGNMENT


def has_blocks(held: Format) -> bool:
    """Whether weights are fp8 blocks of which cuBLASLt can multiply the codes as they are (`PackedCodes.has_blocks`)."""
    return isinstance(held, PackedCodes) and held.has_blocks


def meets_codes(held: Format) -> bool:
    """Whether some product of such a weight takes inputs as codes."""
    return isinstance(held, RowCodes) or has_blocks(held)


def whole_blocks(parts: Sequence[Part], rank: int, size: int) -> bool:
    """Whether each of ``parts`` that a rank holds begins with a block of 128 rows, in the file and in the rank's matrix."""
    row = 0
    for part in parts:
        span = part.span(0, rank, size)
        if row % BLOCK or (part.first_row + span.start) % BLOCK:
            return False
        row += span.size
    return True


def is_ordered(chosen: Format) -> bool:
    """Whether columns belong to groups in any order and inputs are plain: a GPU then holds plain values, which no kernel has to sort."""
    return isinstance(chosen, GroupCodes) and bool(chosen.stored.group_index) and chosen.input == "plain"


def quantized_while_loading(spec: WeightSpec) -> bool:
    """Whether ``--quantize`` applies: matrices of layers that are split over ranks.

    Embeddings, the head, small replicated matrices (routers) and norms of each head stay as they are.
    """
    is_matrix = len(spec.parts[0].shape) == 2 and not spec.owner.endswith("norm")
    return is_matrix and spec.owner.startswith("layers.") and all(part.shard for part in spec.parts)


def check_not_quantized(formats: Iterable[Format], quantize: QuantizeName, flag: str = "--quantize") -> None:
    """Refuse ``--quantize``, or another ``flag`` that says it, of a checkpoint whose weights have such ``formats``.

    Raises:
        ConfigError: naming the first format that is not that of plain values.
    """
    found = next((one for one in formats if one != DENSE), None)
    if quantize != "none" and found is not None:
        raise ConfigError(f"{flag}={quantize}: the checkpoint holds {found.name} weights already; leave it out")


def held_formats(
    stored: FormatPlan, quantize: QuantizeName, experts: Container[str] = (), gates: Container[str] = (), tp_size: int = 1
) -> FormatPlan:  # fmt: skip
    """Formats in a GPU's memory of a checkpoint whose formats are ``stored``.

    Args:
        quantize: the kind of codes that matrices of floats become while they are loaded.
        experts: modules (``layers.3.mlp``) whose matrices are those of experts and their router.
        gates: matrices of one row that weigh others' results; their kernel takes values.
        tp_size: number of ranks that share a matrix.
    """

    def choose(spec: WeightSpec) -> Format:
        chosen = stored.choose(spec)
        if quantize != "none" and quantized_while_loading(spec):
            chosen = RowCodes(quantize)
        if spec.owner in gates:
            return _as_values(chosen)
        if spec.owner.rpartition(".")[0] in experts:
            return _held_by_experts(spec.owner, chosen)
        return _held_by_products(chosen, isinstance(chosen, RowCodes) and _is_aligned(spec, tp_size))

    return FormatPlan(choose, stored.ignored_tensors, stored.has_kv_scales)
