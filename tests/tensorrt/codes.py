"""What NumPy has no types for: constants of fp8 and 4-bit codes, as the library keeps them, and e4m3 from its definition."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def constant_codes(weights: Any) -> Array:
    """Codes of a constant, as float64; the bindings hand out NumPy arrays for int8 only."""
    if isinstance(weights, np.ndarray):
        assert weights.dtype == np.int8, weights.dtype
        return weights.astype(np.float64)
    if weights.dtype.name == "FP8":
        return e4m3_values()[_memory(weights, weights.size)]
    assert weights.dtype.name == "INT4", weights.dtype
    packed = _memory(weights, -(-weights.size // 2)).astype(np.int64)
    codes = np.stack((packed & 15, packed >> 4), axis=1).ravel()[: weights.size]
    return np.where(codes > 7, codes - 16, codes).astype(np.float64)


def bfloat16_values(weights: Any) -> NDArray[np.float32]:
    """A constant of bfloat16, widened."""
    words = _memory(weights, 2 * weights.size).view(np.uint16)
    return (words.astype(np.uint32) << 16).view(np.float32)


class _Weights(ctypes.Structure):
    """``nvinfer1::Weights``."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def _memory(weights: Any, num_bytes: int) -> NDArray[np.uint8]:
    """What a ``Weights`` object points to. Its address follows the header of the Python object, as pybind11 lays out a simple type."""
    address = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    assert address is not None
    found = _Weights.from_address(address)
    assert (found.type, found.count) == (int(weights.dtype), weights.size), "the bindings' layout has changed"
    return np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(found.values), np.uint8).copy()


def e4m3_values() -> NDArray[np.float64]:
    """By code, ``[256]``: sign, four exponent bits with a bias of 7, three mantissa bits; no infinities, 127 and 255 are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    magnitude[[127, 255]] = np.nan
    return np.where(code >> 7, -magnitude, magnitude)


def to_e4m3(x: Array) -> NDArray[np.float64]:
    """The nearest value of e4m3, of two equally near ones that with the even code; beyond 448 that."""
    values = e4m3_values()[:127]
    magnitude = np.abs(x.astype(np.float64))
    above = np.searchsorted(values, np.where(np.isnan(x), 0, magnitude)).clip(1, 126)
    low, high = values[above - 1], values[above]
    is_high = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (above % 2 == 0))
    return np.where(np.isnan(x), np.nan, np.copysign(np.where(is_high, high, low), x))
