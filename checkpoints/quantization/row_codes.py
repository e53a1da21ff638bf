"""8-bit codes with one scale for each row of a weight, multiplied by inputs that are quantised row by row as they come.

``value[o, i] = codes[o, i] * scale[o]``. Merged weights (q, k and v) keep the scales of their own rows, and tensor-parallel
ranks cut rows and columns anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from phalanx.checkpoints.formats import Format, FormatPlan
from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from phalanx.checkpoints.quantization.numbers import CodeKind
    from phalanx.checkpoints.source import Array

__all__ = ["FP8_ROWS", "RowCodes", "held_formats", "quantized_while_loading"]


@dataclass(frozen=True, slots=True)
class RowCodes:
    """Codes ``[out, in]`` and float32 scales ``[out]``; inputs get codes of the same kind with a scale for each token."""

    kind: CodeKind

    @property
    def name(self) -> str:
        """``fp8 rows x tokens``."""
        return f"{self.kind} rows x tokens"

    def units(self, part: Part) -> tuple[int, ...]:
        """Any cut."""
        return (1,) * len(part.shape)

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        """``codes`` and ``scale``, as they are held after quantising a float weight."""
        rows = tuple(_rows_of(part) for part in spec.parts)
        stored = {"fp8": "F8_E4M3", "int8": "I8"}[self.kind]
        return (
            WeightSpec(f"{spec.owner}.codes", spec.parts, dtype=stored),
            WeightSpec(f"{spec.owner}.scale", rows, dtype="F32"),
        )

    def quantize(self, weight: Array) -> dict[str, Array]:
        """Components of float values ``[out, in]``, which may be one rank's share."""
        from phalanx.checkpoints.quantization.numbers import quantize_rows

        codes = quantize_rows(weight, self.kind)
        return {"codes": codes.codes, "scale": codes.scale[:, 0]}

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        """``[out, in]`` float32."""
        from phalanx.checkpoints.quantization.numbers import Codes, dequantize

        return dequantize(Codes(components["codes"], components["scale"][:, None]))

    def round_input(self, x: Array) -> Array:
        """The float32 values that the codes of ``x`` ``[T, in]`` stand for."""
        from phalanx.checkpoints.quantization.numbers import dequantize, quantize_rows

        return dequantize(quantize_rows(x, self.kind))


FP8_ROWS = RowCodes("fp8")


def quantized_while_loading(spec: WeightSpec) -> bool:
    """Whether ``--quantize`` applies: matrices of layers that are split over ranks.

    Embeddings, the head, and small replicated matrices (routers) stay as they are.
    """
    return len(spec.parts[0].shape) == 2 and spec.owner.startswith("layers.") and all(part.shard for part in spec.parts)


def held_formats(stored: FormatPlan, quantize: Literal["none", "fp8"]) -> FormatPlan:
    """Formats in memory of a checkpoint whose formats are ``stored``, after ``--quantize``; for planning memory."""
    if quantize == "none":
        return stored

    def choose(spec: WeightSpec) -> Format:
        return FP8_ROWS if quantized_while_loading(spec) else stored.choose(spec)

    return FormatPlan(choose, stored.ignored_tensors)


def _rows_of(part: Part) -> Part:
    if part.shard is not None and part.shard.axis > 1:
        raise ConfigError(f"{part.source} is split along axis {part.shard.axis}; rows have two")
    shard = part.shard if part.shard is not None and part.shard.axis == 0 else None
    return Part(part.source, part.shape[:1], shard, first_row=part.first_row, source_rows=part.source_rows)
