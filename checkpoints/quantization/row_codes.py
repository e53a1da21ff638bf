"""8-bit codes with one scale for each row of a weight, multiplied by inputs that are quantised row by row as they come.

``value[o, i] = codes[o, i] * scale[o]``. Merged weights (q, k and v) keep the scales of their own rows, and tensor-parallel
ranks cut rows and columns anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from phalanx.checkpoints.quantization.encodings import Scales
from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from phalanx.checkpoints.formats import Multiply
    from phalanx.checkpoints.quantization.numbers import CodeKind, Codes
    from phalanx.checkpoints.source import Array

__all__ = ["FP8_BOUNDED", "FP8_ROWS", "FP8_STATIC", "INT8_ROWS", "RowCodes"]


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
    """

    kind: CodeKind
    scale: str = "weight_scale"
    scale_of: Literal["row", "tensor"] = "row"
    input: Literal["tokens", "static", "plain"] = "tokens"
    input_ceiling: float = math.inf

    @property
    def name(self) -> str:
        """``fp8 rows x tokens``."""
        ceiling = "" if self.input_ceiling == math.inf else " up to a bound"
        return f"{self.kind} rows" if self.input == "plain" else f"{self.kind} rows x {self.input}{ceiling}"

    @property
    def scheme(self) -> str:
        inputs = {"tokens": ", activations by token", "static": ", activations by tensor, static", "plain": ""}
        return f"{self.kind} by {self.scale_of}{inputs[self.input]}"

    def units(self, part: Part) -> tuple[int, ...]:
        """Any cut."""
        return (1,) * len(part.shape)

    def components(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        """``codes``, ``scale`` and, for static inputs, ``input_scale`` ``[parts]``."""
        stored = {"fp8": "F8_E4M3", "int8": "I8"}[self.kind]
        result = [
            WeightSpec(f"{spec.owner}.codes", spec.parts, dtype=stored),
            WeightSpec(f"{spec.owner}.scale", tuple(map(self._scale_part, spec.parts)), dtype="F32"),
        ]
        if self.input == "static":
            inputs = tuple(
                Part(
                    f"{_module(part)}.input_scale",
                    (1,),
                    aliases=(f"{_module(part)}.activation_scale",),
                    encoding=Scales(),
                )
                for part in spec.parts
            )
            result.append(WeightSpec(f"{spec.owner}.input_scale", inputs, dtype="F32"))
        return tuple(result)

    def _scale_part(self, part: Part) -> Part:
        if part.transposed:
            raise ConfigError(f"{part.source} is stored [in, out]; {self.name} weights of such a module cannot be read")
        shard = part.shard if part.shard is not None and part.shard.axis == 0 else None
        rows = part.source_extents[0] if self.scale_of == "tensor" else 1
        return Part(
            f"{_module(part)}.{self.scale}", part.shape[:1], shard, aliases=(f"{_module(part)}.{self.scale}_inv",),
            first_row=part.first_row, source_rows=part.source_rows, encoding=Scales(rows),
        )  # fmt: skip

    def quantize(self, weight: Array) -> dict[str, Array]:
        """Components of float values ``[out, in]``, which may be one rank's share."""
        from phalanx.checkpoints.quantization.numbers import quantize_rows

        codes = quantize_rows(weight, self.kind)
        return {"codes": codes.codes, "scale": codes.scale[:, 0]}

    def dequantize(self, components: Mapping[str, Array]) -> Array:
        """``[out, in]`` float32."""
        from phalanx.checkpoints.quantization.numbers import Codes, dequantize

        return dequantize(Codes(components["codes"], components["scale"][:, None]))

    def operand(self, components: Mapping[str, Array]) -> Mapping[str, Array]:
        if not self._multiplies_integers:
            inputs = {name: array for name, array in components.items() if name == "input_scale"}
            return {**inputs, "weight": self.dequantize(components)}
        return {**components, "codes": components["codes"].astype("float32")}

    def product(self, x: Array, operand: Mapping[str, Array], multiply: Multiply) -> Array:
        from phalanx.checkpoints.quantization.numbers import dequantize, sums_of_codes

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


def _module(part: Part) -> str:
    return part.source.removesuffix(".weight")
