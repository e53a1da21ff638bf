# SPDX-License-Identifier: Apache-2.0
"""Seeded random weights without a checkpoint: every element is a function of where it stands, so any slice of any layout can
be made alone, on the host or in a kernel, and all layouts get the same weights.

The formula, for the element at flat index ``i`` (C order, 64 bit) of the *stored* source tensor, in unsigned 32-bit arithmetic:

    h  = low32(i) ^ key0
    h  = mix(h) + (high32(i) ^ key1)
    h  = mix(h)
    u  = float32(int32(h >> 8) - 2**23) * 2**-23                    in [-1, 1), exact
    value = round_to_stored_dtype(mean + width * u)                 float32, product rounded before the sum

    mix(h): h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h *= 0x846ca68b;  h ^= h >> 16

``mix`` is Chris Wellons' lowbias32 integer hash. In CUDA write ``__fadd_rn(mean, __fmul_rn(width, u))``, which the compiler
may not contract into one rounding, and convert with round-to-nearest-even. ``key0, key1``, ``mean`` and ``width`` come with
every `DummySlice`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.dtypes import NUMPY_DTYPES
from phalanx.checkpoints.source import Array, Buffer, Index, TensorInfo, index_shape, result_array
from phalanx.checkpoints.spec import WeightSpec

__all__ = ["DummySlice", "DummySource", "decoded"]

_BLOCK = 1 << 16
"""Elements made at once: the temporaries stay in the second-level cache."""


@dataclass(frozen=True, slots=True)
class DummySlice:
    """A slice of one dummy tensor, in numbers that a kernel can take.

    Attributes:
        key0, key1: 32-bit keys, from seed and tensor name.
        mean, width: values lie in ``[mean - width, mean + width)``; float32.
        dtype: stored format that values are rounded to, safetensors name.
        shape: of the whole stored tensor.
        index: the slice, in stored orientation.
        transposed: the destination is the transpose of the slice (Conv1D).
    """

    key0: int
    key1: int
    mean: float
    width: float
    dtype: str
    shape: tuple[int, ...]
    index: Index
    transposed: bool = False

    def values(self, buffer: Buffer | None = None) -> Array:
        """The slice as a host array in stored orientation and format; aliases ``buffer`` if given."""
        out = result_array(index_shape(self.index), NUMPY_DTYPES[self.dtype], buffer)
        rows = out.reshape(math.prod(out.shape[:-1]), out.shape[-1])
        starts = self._row_starts()
        for low in range(0, rows.shape[1], _BLOCK):
            columns = np.arange(low, min(low + _BLOCK, rows.shape[1]), dtype=np.uint64)
            step = max(1, _BLOCK // len(columns))
            for top in range(0, len(rows), step):
                flat = starts[top : top + step, None] + columns
                rows[top : top + step, low : low + len(columns)] = self._uniform(flat)
        return out

    def _row_starts(self) -> NDArray[np.uint64]:
        """Flat index in the whole tensor at which each row of the slice begins."""
        starts = np.zeros(1, np.uint64)
        for axis, part in enumerate(self.index[:-1]):
            offsets = np.arange(part.start, part.stop, dtype=np.uint64) * np.uint64(math.prod(self.shape[axis + 1 :]))
            starts = (starts[:, None] + offsets).reshape(-1)
        return starts + np.uint64(self.index[-1].start)

    def _uniform(self, flat: NDArray[np.uint64]) -> NDArray[np.float32]:
        h = _mix(flat.astype(np.uint32) ^ np.uint32(self.key0))
        h += (flat >> np.uint64(32)).astype(np.uint32) ^ np.uint32(self.key1)
        h = _mix(h)
        h >>= np.uint32(8)
        u = (h.view(np.int32) - np.int32(1 << 23)).astype(np.float32)
        u *= np.float32(2.0**-23)
        u *= np.float32(self.width)
        u += np.float32(self.mean)
        return u


@dataclass(frozen=True, slots=True)
class DummySource:
    """A `TensorSource` of random weights with the shapes of a declaration; `declared` binds it to one.

    Matrices are uniform with standard deviation 0.02, the usual initialisation; biases lie in +-0.02; one-dimensional
    ``*.weight`` tensors (norms) in 0.5 +- 0.25, which keeps activations sane both where the weight is the factor
    (Llama) and where the factor is one more (Gemma).
    """

    seed: int
    dtype: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    components: Mapping[str, WeightSpec] = field(default_factory=dict)

    def declared(self, specs: Sequence[WeightSpec]) -> DummySource:
        """The same source with exactly the tensors that ``specs`` name, those with a `DummyRange` as decoded values."""
        specs = [decoded(spec) for spec in specs]
        shapes = {part.source: part.stored_shape for spec in specs for part in spec.parts}
        components = {part.source: spec for spec in specs if spec.dummy for part in spec.parts}
        return DummySource(self.seed, self.dtype, shapes, components)

    def names(self) -> Collection[str]:
        """Names of all declared tensors."""
        return self.shapes.keys()

    def info(self, name: str) -> TensorInfo:
        """Declared shape; the format is the same for all but components that have their own."""
        return TensorInfo(self.shapes[name], self._dtype(name))

    def read(self, name: str, index: Index, buffer: Buffer | None = None) -> Array:
        """Generate one slice."""
        return self.slice(name, index).values(buffer)

    def slice(self, name: str, index: Index, transposed: bool = False) -> DummySlice:
        """The description of one slice, from which a kernel can generate it."""
        shape = self.shapes[name]
        key0, key1 = np.frombuffer(hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=8).digest(), "<u4")
        mean, width = self._distribution(name, shape)
        return DummySlice(int(key0), int(key1), mean, width, self._dtype(name), shape, index, transposed)

    def _dtype(self, name: str) -> str:
        component = self.components.get(name)
        return self.dtype if component is None or component.dtype is None else component.dtype

    def _distribution(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        component = self.components.get(name)
        if component is None or component.dummy is None:
            return _distribution(name, shape)
        low, high = component.dummy
        return float(np.float32((low + high) / 2)), float(np.float32((high - low) / 2))


def decoded(spec: WeightSpec) -> WeightSpec:
    """``spec`` as dummy weights stand for it: a component with a `DummyRange` holds plain values in its own format."""
    if spec.dummy is None:
        return spec
    parts = tuple(replace(part, encoding=None, transposed=False) for part in spec.parts)
    return replace(spec, parts=parts)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if len(shape) > 1:
        return 0.0, float(np.float32(0.02 * math.sqrt(3.0)))
    return (0.0, 0.02) if name.endswith("bias") else (0.5, 0.25)


def _mix(h: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """lowbias32, in place."""
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return h
