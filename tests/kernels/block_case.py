"""A product of fp8 blocks: operands whose scales differ a hundredfold between neighbours, its definition in float64, and how far cuBLASLt may be from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.quantization.numbers import E4M3, quantize_groups
from phalanx.kernels.packed import PackedWeight, pack_weight
from phalanx.kernels.product_sizes import BLOCK, block_scale_shape, packed_row_bytes

from .devices import KernelDevice
from .fp8_sums import sum_bound

__all__ = ["BlockCase", "BlockProduct"]

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BlockProduct:
    """What a product should be, and how far one that adds as tensor cores do may be from it."""

    expected: Float64Array
    sum_error: Float64Array


class BlockCase:
    """A weight ``[O, I]`` of random codes, and inputs for it.

    No pattern of scales is its own transpose, so that no layout but the right one gives the right sums.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.shape, self._random = (rows, columns), np.random.default_rng(rows + columns)
        self.codes = self._random.integers(0, 256, self.shape).astype(np.uint8)
        self.codes[self.codes & 0x7F == 0x7F] = 0  # NaN
        self.blocks = self._hundredfold(-(-rows // BLOCK), -(-columns // BLOCK)).astype(np.float32)

    def inputs(self, num_tokens: int, dtype: Any) -> np.ndarray:
        """``[T, I]``, each group of columns in a range of its own."""
        columns = self.shape[1]
        ranges = np.repeat(self._hundredfold(num_tokens, -(-columns // BLOCK)), BLOCK, 1)[:, :columns]
        x: np.ndarray = (self._random.standard_normal((num_tokens, columns)) * ranges).astype(dtype)
        return x

    def packed(self, device: KernelDevice) -> PackedWeight:
        """The weight on ``device``."""
        (rows, columns), groups = self.shape, self.blocks.shape[1]
        out = device.poisoned((rows, packed_row_bytes(columns, "fp8")), np.uint8)
        pack_weight(device.library, device.put(self.codes), out, "fp8")
        blocks = np.zeros(block_scale_shape(rows, columns), np.float32)
        blocks[:, :groups] = self.blocks
        scale = np.ascontiguousarray(np.repeat(self.blocks, BLOCK, 0)[:rows].T)
        return PackedWeight(out, device.put(scale), None, "fp8", columns, BLOCK, device.put(blocks))

    def product(self, x: np.ndarray) -> BlockProduct:
        """``sum over blocks of (sum q_x q_w) s_x s_w``: tensor cores add 128 columns, the rest is added in float32."""
        rows = self.shape[0]
        inputs = quantize_groups(x.astype(np.float32), BLOCK)
        left, right = (codes.view(E4M3).astype(np.float64) for codes in (inputs.codes, self.codes))
        expected, error, size = (np.zeros((len(x), rows)) for _ in range(3))
        for block in range(self.blocks.shape[1]):
            columns = np.s_[block * BLOCK : (block + 1) * BLOCK]
            of_rows = np.repeat(self.blocks[:, block].astype(np.float64), BLOCK)[:rows]
            scale = inputs.scale[:, block, None].astype(np.float64) * of_rows
            part = left[:, columns] @ right[:, columns].T * scale
            expected += part
            size += np.abs(part)
            error += sum_bound(left[:, columns], right[:, columns]) * scale
        return BlockProduct(expected, 1.01 * error + 2.0**-24 * (self.blocks.shape[1] + 2) * size)

    def _hundredfold(self, rows: int, columns: int) -> Float64Array:
        places = np.arange(rows)[:, None] + 2 * np.arange(columns)
        return 1e-4 * 100.0 ** (places % 3) * self._random.uniform(1, 2, (rows, columns))
