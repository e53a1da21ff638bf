# SPDX-License-Identifier: Apache-2.0
"""The arrays of one matrix product, and the problem that they pose once their shapes and dtypes are checked."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.kernels.arrays import Array, ceil_div, require
from phalanx.kernels.cublaslt import GemmProblem
from phalanx.kernels.packed import PackedWeight
from phalanx.kernels.product_sizes import BLOCK, block_scale_shape, packed_row_bytes
from phalanx.kernels.quantize import QuantizedRows, require_product_of_codes
from phalanx.kernels.quantize_groups import QuantizedGroups
from phalanx.parallel.errors import ExecutorError

__all__ = ["Inputs", "Operands", "Weight", "problem_of"]

Weight = Array | QuantizedRows | PackedWeight
Inputs = Array | QuantizedRows | QuantizedGroups


@dataclass(frozen=True, slots=True)
class Operands:
    """The arrays of one product: x [T, I], weight [O, I], out [T, O], bias [O] or None. Codes with scales come on both sides or none.

    Codes of groups meet a packed weight with blocks (`Gemm.takes_groups`).
    ``scratch``: flat uint8 memory that a product of a packed weight (`unpacked_bytes`) or of codes (`SUM_BYTES`) may overwrite.
    """

    x: Inputs
    weight: Weight
    out: Array
    bias: Array | None = None
    scratch: Array | None = None


def problem_of(operands: Operands) -> GemmProblem:
    """The problem that ``operands`` pose. Raises ExecutorError when their shapes or dtypes do not fit together."""
    x, weight, out, bias = operands.x, operands.weight, operands.out, operands.bias
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    if isinstance(weight, QuantizedRows):
        return _scaled_problem(operands)
    if isinstance(x, QuantizedGroups):
        return _block_problem(operands)
    assert not isinstance(x, QuantizedRows), "codes need a quantised weight"
    packed = weight.layout if isinstance(weight, PackedWeight) else ""
    if isinstance(weight, PackedWeight):
        require("x", x, (num_tokens, weight.columns), x)
    else:
        require("weight", weight, (out_features, in_features), x)
    require("out", out, (num_tokens, out_features), out)
    if bias is not None:
        require("bias", bias, (out_features,), x)
    names = (x.dtype.name, out.dtype.name)
    return GemmProblem(num_tokens, out_features, in_features, *names, bias is not None, packed)


def _scaled_problem(operands: Operands) -> GemmProblem:
    x, weight, out, bias = operands.x, operands.weight, operands.out, operands.bias
    assert isinstance(weight, QuantizedRows)
    assert isinstance(x, QuantizedRows), "a quantised weight needs codes"
    if x.kind != weight.kind:
        raise ExecutorError(f"a product of {x.kind} and {weight.kind} codes is not available")
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    require_product_of_codes(x, weight, out, bias, out_features)
    return GemmProblem(num_tokens, out_features, in_features, x.kind, out.dtype.name, bias is not None)


def _block_problem(operands: Operands) -> GemmProblem:
    x, weight, out, bias = operands.x, operands.weight, operands.out, operands.bias
    assert isinstance(x, QuantizedGroups)
    assert isinstance(weight, PackedWeight), "codes of groups need a packed weight"
    assert weight.blocks is not None, "codes of groups need a weight with scales of blocks"
    (rows, columns), num_tokens = weight.shape, len(x)
    require("codes of x", x.codes, (num_tokens, packed_row_bytes(columns, "fp8")), "uint8")
    require("scale of x", x.scale, (ceil_div(columns, BLOCK), num_tokens), "float32")
    require("codes of weight", weight.codes, (rows, x.codes.shape[1]), "uint8")
    require("blocks", weight.blocks, block_scale_shape(rows, columns), "float32")
    require("out", out, (num_tokens, rows), out)
    if bias is not None:
        require("bias", bias, (rows,), out)
    # A bias is added afterwards.
    return GemmProblem(num_tokens, rows, x.codes.shape[1], "fp8", out.dtype.name, has_blocks=True)
