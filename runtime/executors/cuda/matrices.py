# SPDX-License-Identifier: Apache-2.0
"""A rank's matrices as the kernels take them, and in which form their products take the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TypeAlias

from phalanx.checkpoints.quantization.held import HeldValues, PackedCodes, meets_codes
from phalanx.checkpoints.quantization.prescale import common_prescale
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.kernels.packed import PackedWeight
from phalanx.kernels.product_sizes import SUM_BYTES, unpacked_bytes
from phalanx.kernels.quantize import CodeRule, QuantizedRows
from phalanx.kernels.round_inputs import InputRule
from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.executors.cuda.memory import DeviceArray
from phalanx.runtime.executors.weights import Weights

__all__ = ["CudaMatrices", "Matrix"]

Matrix: TypeAlias = DeviceArray | QuantizedRows | PackedWeight


class CudaMatrices:
    """Looks matrices up by the names of their weights, each once.

    Args:
        weights: this rank's shard.

    Attributes:
        meet_codes: whether any of them is multiplied by codes of its inputs.
    """

    def __init__(self, weights: Weights[DeviceArray]) -> None:
        self._weights = weights
        self._found: dict[str, Matrix] = {}
        self._code_rules: dict[str, CodeRule] = {}
        self._factors: dict[str, DeviceArray | None] = {}
        self._input_rules: dict[str, InputRule | None] = {}
        packed = [
            one.components["packed"].shape
            for one in weights.values()
            if isinstance(one.format, PackedCodes) and one.format.is_unpacked
        ]
        self._largest_packed = max(packed, key=prod, default=(0, 0))
        self.meet_codes = any(meets_codes(weight.format) for weight in weights.values())

    def matrix(self, name: str) -> Matrix:
        """Return what the kernels multiply by."""
        if name not in self._found:
            weight = self._weights.linear(name)
            parts, chosen = weight.components, weight.format
            if isinstance(chosen, RowCodes):
                self._found[name] = QuantizedRows(parts["codes"].view("uint8"), parts["scale"], chosen.kind)
            elif isinstance(chosen, PackedCodes):
                self._found[name] = parts["packed"]
            else:
                self._found[name] = parts["weight"]
        return self._found[name]

    def stack(self, name: str) -> DeviceArray | PackedWeight:
        """Return the matrices of experts, one below the other."""
        matrix = self.matrix(name)
        assert not isinstance(matrix, QuantizedRows), "codes of experts are packed"
        return matrix

    def code_rule(self, name: str) -> CodeRule:
        """Return how the inputs of a product with codes are quantised."""
        if name not in self._code_rules:
            weight = self._weights.linear(name)
            assert isinstance(weight.format, RowCodes)
            self._code_rules[name] = _code_rule(weight.format, weight.components)
        return self._code_rules[name]

    def input_rule(self, name: str) -> InputRule | None:
        """Return which codes the inputs of a product of plain values stand for; None = they are none."""
        if name not in self._input_rules:
            weight = self._weights.linear(name)
            held, rule = weight.format, None
            if isinstance(held, PackedCodes | HeldValues):
                stored = held.stored
                if isinstance(stored, RowCodes):
                    rule = None if stored.input == "plain" else InputRule(_code_rule(stored, weight.components))
                elif stored.input != "plain":
                    rule = InputRule(CodeRule("fp8"), stored.group, stored.has_power_of_two_inputs)
            self._input_rules[name] = rule
        return self._input_rules[name]

    def factors(self, name: str) -> DeviceArray | None:
        """Return ``[I]`` what a product's inputs are multiplied by; None = nothing.

        Raises:
            CheckpointError: its parts have different factors.
        """
        if name not in self._factors:
            stored = self._weights.linear(name).components.get("prescale")
            try:
                self._factors[name] = None if stored is None else common_prescale(stored).reshape(-1)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from None
        return self._factors[name]

    def scratch_bytes(self, name: str, itemsize: int) -> int | None:
        """Return the size of what a product overwrites while it runs; None = nothing. One size, so that all weights share it."""
        matrix = self.matrix(name)
        if isinstance(matrix, PackedWeight):
            return unpacked_bytes(self._largest_packed, itemsize)
        return SUM_BYTES if isinstance(matrix, QuantizedRows) else None


def _code_rule(chosen: RowCodes, components: Mapping[str, DeviceArray]) -> CodeRule:
    """Parts of a merged weight see one input: the largest of their static scales keeps the range of all of them."""
    if chosen.input == "static":
        return CodeRule(chosen.kind, float(components["input_scale"].max()), is_static=True)
    return CodeRule(chosen.kind, chosen.input_ceiling)
