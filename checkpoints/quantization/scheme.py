# SPDX-License-Identifier: Apache-2.0
"""What ``launch.quantize`` makes of a matrix, as compressed-tensors stores it.

Source of the format: compressed-tensors ``compressors/quantized_compressors/{naive,pack}_quantized.py``. Symmetric integer scales are
amax / (range / 2), so that codes reach -128 and -8, as its own observers have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.quantization.numbers import (
    E4M3_MAX,
    FP8_SMALLEST_SCALE,
    dequantize,
    quantize_rows,
    quantize_static,
)
from phalanx.checkpoints.source import TensorInfo
from phalanx.parallel.errors import ConfigError

__all__ = ["KV_CACHE_SCHEME", "Scheme", "SchemeName"]

KV_CACHE_SCHEME: Mapping[str, Any] = MappingProxyType(
    {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
)
"""``kv_cache_scheme`` of a checkpoint with a scale for the keys and one for the values of each layer."""

SchemeName = Literal["fp8", "fp8-static", "int8", "w8a16", "w4a16"]
Array = NDArray[Any]
_BITS = {"w8a16": 8, "w4a16": 4}


@dataclass(frozen=True, slots=True)
class Scheme:
    """What weights become. ``group_size`` columns share a scale in w8a16 and w4a16; 0 = the row.

    Raises:
        ConfigError: groups that the scheme does not have.
    """

    name: SchemeName
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 0:
            raise ConfigError(
                f"--group-size={self.group_size} is negative; give a number of columns, or 0 for whole rows"
            )
        if self.group_size and self.name not in _BITS:
            raise ConfigError(f"--group-size={self.group_size} does not fit --scheme={self.name}; leave it out")

    def tensors(self, rows: int, columns: int) -> dict[str, TensorInfo]:
        """What a module of ``[rows, columns]`` is stored as, by suffix."""
        if self.name not in _BITS:
            codes = TensorInfo((rows, columns), "F8_E4M3" if self.is_fp8 else "I8")
            inputs = {"input_scale": TensorInfo((1,), "F32")} if self.has_static_inputs else {}
            return {"weight": codes, "weight_scale": TensorInfo((rows, 1), "F32"), **inputs}
        words, groups = -(-columns * _BITS[self.name] // 32), columns // (self.group_size or columns)
        return {
            "weight_packed": TensorInfo((rows, words), "I32"),
            "weight_scale": TensorInfo((rows, groups), "F32"),
            "weight_shape": TensorInfo((2,), "I64"),
        }

    def quantize(self, weight: NDArray[np.float32]) -> tuple[dict[str, Array], NDArray[np.float32]]:
        """The tensors but for ``input_scale``, and the values that they stand for."""
        if self.is_fp8:
            codes = quantize_rows(weight)
            return {"weight": codes.codes, "weight_scale": codes.scale}, codes.codes.astype(np.float32) * codes.scale
        groups = weight.reshape(len(weight), -1, self.group_size or weight.shape[1])
        scale = self.integer_scale(groups)
        rounded = self.integers(groups, scale[:, :, None])
        return self.stored(rounded.reshape(weight.shape).astype(np.int8), scale), (rounded * scale[:, :, None]).reshape(
            weight.shape
        )

    @property
    def is_fp8(self) -> bool:
        """Whether codes are e4m3."""
        return self.name in ("fp8", "fp8-static")

    @property
    def has_static_inputs(self) -> bool:
        """Whether a product's inputs share one scale, which a calibration text gives."""
        return self.name == "fp8-static"

    @property
    def is_weight_only(self) -> bool:
        """Whether inputs stay as they are."""
        return self.name in _BITS

    @property
    def bits(self) -> int:
        """Of a code."""
        return _BITS.get(self.name, 8)

    def integer_scale(self, groups: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale of each group of values, ``[..., columns] -> [...]``, with which no value saturates."""
        largest: NDArray[np.float32] = np.abs(groups).max(axis=-1)
        largest /= np.float32((1 << (self.bits - 1)) - 0.5)
        return np.maximum(largest, np.float32(2.0**-40))

    def integers(self, values: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Codes of ``values``, as float32."""
        half = 1 << (self.bits - 1)
        codes: NDArray[np.float32] = np.clip(np.rint(values / scale), -half, half - 1)
        return codes

    def stored(self, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> dict[str, Array]:
        """The tensors of integer codes ``[out, in]`` and scales ``[out, groups]``, by suffix."""
        if not self.is_weight_only:
            return {"weight": codes, "weight_scale": scale}
        shape = np.array(codes.shape, np.int64)
        return {"weight_packed": _packed(codes, self.bits), "weight_scale": scale, "weight_shape": shape}

    def input_scale(self, largest: float) -> NDArray[np.float32]:
        """``[1]``: with which inputs up to the magnitude ``largest`` do not saturate."""
        scale: NDArray[np.float32] = np.array([largest], np.float32) / np.float32(E4M3_MAX)
        return np.maximum(scale, FP8_SMALLEST_SCALE)

    def round_input(self, x: NDArray[np.float32], largest: float) -> NDArray[np.float32]:
        """What a product sees of its input ``[T, in]``; ``largest`` magnitude that the calibration text gave it."""
        if self.is_weight_only:
            return x
        if self.has_static_inputs:
            return dequantize(quantize_static(x, float(self.input_scale(largest)[0])))
        return dequantize(quantize_rows(x, "fp8" if self.is_fp8 else "int8"))

    @property
    def section(self) -> dict[str, Any]:
        """``quantization_config``, less ``ignore``."""
        is_packed, kind = self.name in _BITS, "float" if self.is_fp8 else "int"
        weights: dict[str, Any] = {
            "num_bits": _BITS.get(self.name, 8), "type": kind, "symmetric": True, "dynamic": False,
            "strategy": "group" if self.group_size else "channel",
        }  # fmt: skip
        if self.group_size:
            weights["group_size"] = self.group_size
        strategy = "tensor" if self.has_static_inputs else "token"
        inputs = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True,
                  "dynamic": not self.has_static_inputs}  # fmt: skip
        layout = "pack-quantized" if is_packed else f"{kind}-quantized"
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None if is_packed else inputs,
                 "output_activations": None, "format": layout}  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
            "config_groups": {"group_0": group},
        }  # fmt: skip


def _packed(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """``[O, ceil(I * bits / 32)]``: code + 2^(bits - 1), element j of a word at bits ``bits * j``, zeros after the last."""
    each = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // each) * each), np.uint32)
    padded[:, : codes.shape[1]] = codes.astype(np.int16) + (1 << (bits - 1))
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words: NDArray[np.int32] = np.bitwise_or.reduce(padded.reshape(len(codes), -1, each) << shifts, axis=2).view(
        np.int32
    )
    return words
