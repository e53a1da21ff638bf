"""The float64 Llama, keeping the ranges that a calibration looks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.float64_llama import Array, Float64Llama


class CalibratingLlama(Float64Llama):
    """``inputs[name]`` [T, in] of each product; ``cache_amax[layer]``: largest magnitudes of rotated keys and of values."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.inputs: dict[str, Array] = {}
        self._rotations: list[float] = []
        self._values: list[float] = []

    @property
    def cache_amax(self) -> Array:
        return np.stack((self._rotations[1::2], self._values), axis=1)  # queries are rotated before keys

    def _project(self, hidden: Array, name: str) -> Array:
        self.inputs[name] = hidden
        projected = super()._project(hidden, name)
        if name.endswith("v_proj"):
            self._values.append(float(np.abs(projected).max()))
        return projected

    def _rotated(self, heads: Array) -> Array:
        rotated = super()._rotated(heads)
        self._rotations.append(float(np.abs(rotated).max()))
        return rotated
