# SPDX-License-Identifier: Apache-2.0
"""How a rank multiplies fp8 blocks, in words for reports."""

from __future__ import annotations

from phalanx.checkpoints.quantization.held import has_blocks
from phalanx.kernels.gemm import Gemm
from phalanx.kernels.packed import MAX_PACKED_TOKENS
from phalanx.runtime.executors.cuda.memory import DeviceArray
from phalanx.runtime.executors.weights import Weights

__all__ = ["block_products_in_words"]


def block_products_in_words(gemm: Gemm, weights: Weights[DeviceArray], num_tokens: int, dtype: str) -> str:
    """``fp8 blocks as codes above 64 tokens, gate_up as values``; "" without such weights.

    Args:
        num_tokens: of the largest step, whose products are asked for.
        dtype: of activations.
    """
    as_codes: dict[str, bool] = {}
    for weight in weights.values():
        if has_blocks(weight.format):
            matrix = weight.name.rpartition(".")[2]
            takes = gemm.takes_groups(num_tokens, weight.components["packed"], dtype, weight.bias is not None)
            as_codes[matrix] = as_codes.get(matrix, True) and takes
    others = ", ".join(matrix for matrix, takes in as_codes.items() if not takes)
    if not any(as_codes.values()):
        return "fp8 blocks as values" if as_codes else ""
    return f"fp8 blocks as codes above {MAX_PACKED_TOKENS} tokens" + (f", {others} as values" if others else "")
