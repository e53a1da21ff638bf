# SPDX-License-Identifier: Apache-2.0
"""8-bit codes with one scale for each row of a weight, multiplied by inputs that are quantised row by row as they come.

``value[o, i] = codes[o, i] * scale[o]``. Codes are stored ``[out, in]``, those of GPT-2's Conv1D, too. Merged weights (q, k and v) keep the scales of their own rows, and tensor-parallel
ranks cut rows and columns anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from phalanx.checkpoints.quantization.dummy_ranges import DUMMY_CODES, DUMMY_INPUT_SCALES, DUMMY_SCALES
from phalanx.checkpoints.quantization.encodings import INPUT_SCALE_NAMES, Scales, scale_names
from phalanx.checkpoints.quantization.prescale import common_prescale, prescale_component
from phalanx.checkpoints.spec import Part, WeightSpec

if TYPE_CHECKING:
    from phalanx.checkpoints.formats import Multiply
    from phalanx.checkpoints.quantization.numbers import CodeKind, Codes
    from phalanx.checkpoints.source import Array

__all__ = ["FP8_BOUNDED", "FP8_ROWS", "FP8_STATIC", "INT8_ROWS", "INT8_STATIC", "SMOOTHQUANT", "InputKind", "RowCodes"]

InputKind = Literal["tokens", "static", "plain"]
"""How inputs become codes: `RowCodes.input`."""


@dataclass(frozen=True, slots=True)
class RowCodes:
    """Codes ``[out, in]`` and float32 scales ``[out]``; inputs get codes of the same kind with a scale for each token.

    Attributes:
        kind: of codes, of weights and inputs.
        scale: suffix of the stored scale.
        scale_of: what a stored scale belongs to: each row, or the whole tensor.
        input: ``tokens``: a scale for each token as it comes; ``static``: the checkpoint's own for all of them;
            ``plain``: inputs are not quantised.
        input_ceiling: bound on the magnitudes that make a token's scale.
        prescale: suffix of stored factors of inputs, one for each column, which come before the scale; "" = none.
    """

    kind: CodeKind
    scale: str = "weight_scale"
    scale_of: Literal["row", "tensor"] = "row"
    input: InputKind = "tokens"
    input_ceiling: float = math.inf
    prescale: str = ""

    @property
    def name(self) -> str:
        """``fp8 rows x tokens``."""
        ceiling = "" if self.input_ceiling == math.inf else " up to a bound"
        inputs = "" if self.input == "plain" else f" x {self.input}{ceiling}"
        return f"{self.kind} rows{inputs}{' with scaled inputs' if self.prescale else ''}"

    @property
    def scheme(self) -> str:
        ceiling = "" if self.input_ceiling == math.inf else f" up to {self.input_ceiling:g}"
        inputs = {
            "tokens": f", activations by token{ceiling}",
            "static": ", activations by tensor, static",
            "plain": "",
        }
        scaled = ", inputs scaled by column" if self.prescale else ""
        return f"{self.kind} by {self.scale_of}{inputs[self.input]}{scaled}"

    def units(self, part: Part) -> tuple[int, ...]:
        """Any cut."""
        return (1,) * len(part.shape)

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        """``codes``, ``scale``, for static inputs ``input_scale`` ``[parts]``, and perhaps ``prescale``."""
        stored = {"fp8": "F8_E4M3", "int8": "I8"}[self.kind]
        codes = tuple(replace(part, transposed=False) for part in spec.parts)
        scales = tuple(map(self._scale_part, spec.parts))
        result = [
            WeightSpec(f"{spec.owner}.codes", codes, dtype=stored, dummy=DUMMY_CODES[self.kind]),
            WeightSpec(f"{spec.owner}.scale", scales, dtype="F32", dummy=DUMMY_SCALES[self.kind]),
        ]
        if self.input == "static":
            inputs, dummy = tuple(map(_input_scale, spec.parts)), DUMMY_INPUT_SCALES[self.kind]
            result.append(WeightSpec(f"{spec.owner}.input_scale", inputs, dtype="F32", dummy=dummy))
        if self.prescale:
            result.append(prescale_component(spec, self.prescale))
        return tuple(result)

    def with_prescale(self, suffix: str) -> RowCodes:
        """The same for inputs that are multiplied by stored factors first."""
        return replace(self, prescale=suffix)

    def _scale_part(self, part: Part) -> Part:
        shard = part.shard if part.shard is not None and part.shard.axis == 0 else None
        rows = part.source_extents[0] if self.scale_of == "tensor" else 1
        source, *aliases = part.siblings(*self.scale_names)
        return Part(
            source, part.shape[:1], shard, aliases=tuple(aliases),
            first_row=part.first_row, source_rows=part.source_rows, encoding=Scales(rows),
        )  # fmt: skip

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Suffixes that a stored scale may have."""
        return scale_names(self.scale)

    def quantize(self, weight: Array) -> dict[str, Array]:
        """Components of float values ``[out, in]``, which may be one rank's share."""
        from phalanx.checkpoints.quantization.numbers import quantize_rows

        codes = quantize_rows(weight, self.kind)
        return {"codes": codes.codes, "scale": codes.scale[:, 0]}

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        """``[out, in]`` float32."""
        from phalanx.checkpoints.quantization.numbers import Codes, dequantize

        values = dequantize(Codes(components["codes"], components["scale"][:, None]))
        if self.prescale:
            values *= common_prescale(components["prescale"])
        return values

    def operand(self, components: Mapping[str, Array]) -> Mapping[str, Array]:
        from phalanx.checkpoints.quantization.numbers import Codes, dequantize

        result = {name: array for name, array in components.items() if name == "input_scale"}
        if self.prescale:
            result["prescale"] = common_prescale(components["prescale"])
        codes, scale = components["codes"], components["scale"]
        if self._multiplies_integers:
            return {**result, "codes": codes.astype("float32"), "scale": scale}
        return {**result, "weight": dequantize(Codes(codes, scale[:, None]))}

    def product(self, x: Array, operand: Mapping[str, Array], multiply: Multiply) -> Array:
        from phalanx.checkpoints.quantization.numbers import dequantize, sums_of_codes

        if self.prescale:
            x = x * operand["prescale"]
        if self.input == "plain":
            return multiply(x, operand["weight"])
        inputs = self._input_codes(x, operand)
        if not self._multiplies_integers:
            return multiply(dequantize(inputs), operand["weight"])
        sums = sums_of_codes(inputs.codes, operand["codes"], multiply)
        scaled: Array = sums.astype("float32")
        scaled *= inputs.scale
        scaled *= operand["scale"]
        return scaled

    @property
    def _multiplies_integers(self) -> bool:
        return self.kind == "int8" and self.input != "plain"

    def _input_codes(self, x: Array, operand: Mapping[str, Array]) -> Codes:
        from phalanx.checkpoints.quantization.numbers import quantize_rows, quantize_static

        if self.input == "static":
            # Parts of a merged weight see one input: the largest of their scales keeps the range of all of them.
            return quantize_static(x, float(operand["input_scale"].max()), self.kind)
        return quantize_rows(x, self.kind, self.input_ceiling)


FP8_ROWS, INT8_ROWS = RowCodes("fp8"), RowCodes("int8")
"""What ``--quantize`` makes."""
FP8_STATIC, FP8_BOUNDED = RowCodes("fp8", input="static"), RowCodes("fp8", input_ceiling=1200.0)
"""What calibrated and FBGEMM's checkpoints hold besides; the bound is each one's own."""
INT8_STATIC = RowCodes("int8", input="static")
SMOOTHQUANT = INT8_STATIC.with_prescale("pre_quant_scale")
"""int8 with static inputs, and ModelOpt's W8A8_SQ, whose inputs are scaled by column first."""


def _input_scale(part: Part) -> Part:
    source, *aliases = part.siblings(*INPUT_SCALE_NAMES)
    return Part(source, (1,), aliases=tuple(aliases), encoding=Scales(of="inputs"))
