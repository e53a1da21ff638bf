"""In which format a GPU holds what a checkpoint stores in another: quantised while loading, or turned into plain values."""

from __future__ import annotations

from typing import Literal

from phalanx.checkpoints.formats import DENSE, Format, FormatPlan
from phalanx.checkpoints.quantization.group_codes import GroupCodes
from phalanx.checkpoints.quantization.row_codes import FP8_ROWS, RowCodes
from phalanx.checkpoints.spec import WeightSpec

__all__ = ["held_formats", "is_weight_only", "quantized_while_loading"]


def is_weight_only(chosen: Format) -> bool:
    """Whether inputs of a product with such a weight stay as they are. GPUs hold these weights as plain values so far."""
    return isinstance(chosen, GroupCodes | RowCodes) and chosen.input == "plain"


def quantized_while_loading(spec: WeightSpec) -> bool:
    """Whether ``--quantize`` applies: matrices of layers that are split over ranks.

    Embeddings, the head, and small replicated matrices (routers) stay as they are.
    """
    return len(spec.parts[0].shape) == 2 and spec.owner.startswith("layers.") and all(part.shard for part in spec.parts)


def held_formats(stored: FormatPlan, quantize: Literal["none", "fp8"]) -> FormatPlan:
    """Formats in a GPU's memory of a checkpoint whose formats are ``stored``; for planning."""

    def choose(spec: WeightSpec) -> Format:
        if quantize == "fp8" and quantized_while_loading(spec):
            return FP8_ROWS
        chosen = stored.choose(spec)
        return DENSE if is_weight_only(chosen) else chosen

    return FormatPlan(choose, stored.ignored_tensors, stored.has_kv_scales)
