# SPDX-License-Identifier: Apache-2.0
"""Weights of one rank in device memory: the sink that the loader streams them into."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.dtypes import NUMPY_DTYPES, convert
from phalanx.checkpoints.dummy import DummySlice
from phalanx.checkpoints.formats import DENSE, Format
from phalanx.checkpoints.quantization.held import INPUT_COMPONENTS, PackedCodes
from phalanx.checkpoints.quantization.numbers import E4M3
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.checkpoints.source import Buffer, Index
from phalanx.kernels.dummy_weights import dummy_weights
from phalanx.kernels.library import Library
from phalanx.kernels.packed import PackedWeight, pack_weight, unpack_weight
from phalanx.kernels.product_sizes import BLOCK, block_scale_shape, packed_row_bytes
from phalanx.kernels.quantize import QuantizedRows, quantize_rows
from phalanx.kernels.unpack_ordered import unpack_ordered
from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.executors.cuda.memory import DeviceArray, device_dtype, pinned_array
from phalanx.runtime.executors.weights import Weight, Weights

__all__ = ["ConvertingSink", "CudaSink", "block_scales"]

_CHUNK_BYTES = 32 << 20


_BYTES = np.dtype(np.uint8)


class CudaSink:
    """Device memory for weights in the compute dtype; see `phalanx.checkpoints.loader.WeightSink`.

    Chunks are read from the page cache into two pinned buffers in turn, and copied from one while the other is filled.

    Attributes:
        weights: every name given to `allocate`; tied weights share one array.
    """

    chunk_bytes = _CHUNK_BYTES

    def __init__(self, dtype: str, library: Library) -> None:
        import cupy

        self.weights: dict[str, DeviceArray] = {}
        self._dtype = device_dtype(dtype)
        self._library = library
        self._stream = cupy.cuda.get_current_stream()
        self._staging: list[tuple[NDArray[np.uint8], Any]] = []
        self._turn = 0

    def allocate(self, names: tuple[str, ...], shape: tuple[int, ...], dtype: str | None = None) -> DeviceArray:
        """Zero-filled memory for one weight or component."""
        import cupy

        array = cupy.zeros(shape, self._held(dtype))
        self.weights.update(dict.fromkeys(names, array))
        return array

    def _held(self, dtype: str | None) -> np.dtype[Any]:
        """fp8 components are bytes on the device: CuPy has no such type, and kernels reinterpret them."""
        if dtype is None:
            return self._dtype
        return _BYTES if dtype == "F8_E4M3" else NUMPY_DTYPES[dtype]

    def staging(self, num_bytes: int) -> Buffer:
        """Pinned memory for the next chunk; waits until the device has taken what it held before."""
        import cupy

        if not self._staging:
            self._staging = [
                (pinned_array((max(num_bytes, _CHUNK_BYTES),), np.uint8), cupy.cuda.Event(disable_timing=True))
                for _ in range(2)
            ]
        self._turn = 1 - self._turn
        buffer, taken = self._staging[self._turn]
        taken.synchronize()
        if len(buffer) < num_bytes:
            self._staging[self._turn] = (buffer := pinned_array((num_bytes,), np.uint8), taken)
        return buffer[:num_bytes]

    def write(self, destination: DeviceArray, index: Index, array: NDArray[Any]) -> None:
        """Copy ``array`` to ``destination[index]``, in the compute dtype or the component's own."""
        from cupy.cuda import runtime

        is_fp8 = destination.dtype == _BYTES and array.dtype == E4M3
        values = np.ascontiguousarray(array.view(_BYTES) if is_fp8 else convert(array, destination.dtype, "weight"))
        region = destination[index]
        row_bytes = values.shape[-1] * values.itemsize
        runtime.memcpy2DAsync(
            region.data.ptr, region.strides[0] if region.ndim == 2 else row_bytes, values.ctypes.data, row_bytes,
            row_bytes, values.size // values.shape[-1], runtime.memcpyHostToDevice, self._stream.ptr,
        )  # fmt: skip
        if self._staging and np.may_share_memory(values, self._staging[self._turn][0]):
            self._staging[self._turn][1].record(self._stream)
        else:
            self._stream.synchronize()  # decoded or converted, so freed when this returns: it must outlive the copy

    def generate(self, destination: DeviceArray, index: Index, dummy: DummySlice) -> None:
        """Make dummy weights in place."""
        starts = [part.start for part in dummy.index]
        dummy_weights(
            self._library,
            destination[index],
            stored_dtype=dummy.dtype,
            stored_columns=dummy.shape[-1],
            origin=(starts[0] if len(starts) == 2 else 0, starts[-1]),
            transposed=dummy.transposed,
            keys=(dummy.key0, dummy.key1),
            mean=dummy.mean,
            width=dummy.width,
        )


_NONE: Mapping[str, Format] = MappingProxyType({})

Held = Callable[[DeviceArray], Any]
"""What a component becomes once it is complete."""


class ConvertingSink(CudaSink):
    """Converts some components as soon as they are complete, so that one at a time is held as it was loaded.

    The loader fills one component after the other: it is complete when the next one is allocated, or at the end.

    Args:
        quantize: what weights of floats become, by the names that models use: codes, packed or not.
        packing: weights whose codes are packed, likewise.
        plain: those of them that are unpacked again, because no product takes them packed, and the formats that they then have.
        ordered: weights whose columns belong to groups in any order, which become plain values.
        blocks: packed weights whose scales are also held as cuBLASLt takes them.
    """

    def __init__(
        self, dtype: str, library: Library, quantize: Mapping[str, Format], packing: Mapping[str, PackedCodes],
        plain: Mapping[str, Format] = _NONE, ordered: Collection[str] = (), blocks: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(dtype, library)
        assert packing.keys().isdisjoint(ordered), "each of them replaces the codes"
        self._formats: dict[str, Format] = {**packing, **quantize}
        self._conversions: dict[str, Held] = {f"{name}.weight": self._quantizer(one) for name, one in quantize.items()}
        self._conversions |= {f"{name}.codes": self._packer(one) for name, one in packing.items()}
        self._conversions |= {f"{name}.{kind}": _by_group for name in packing for kind in ("scale", "zero")}
        self._conversions |= {f"{name}.group_index": self._sorter(name) for name in ordered}
        self._plain, self._ordered, self._blocks = plain, ordered, blocks
        self._filling: tuple[tuple[str, ...], DeviceArray] | None = None
        self._owner = ""

    def allocate(self, names: tuple[str, ...], shape: tuple[int, ...], dtype: str | None = None) -> DeviceArray:
        """As `CudaSink.allocate`."""
        self._finish()
        owner = names[0].rpartition(".")[0]
        if owner != self._owner:
            self._unpack()
        self._owner = owner
        array = super().allocate(names, shape, dtype)
        if names[0] in self._conversions:
            self._filling = names, array
        return array

    def write(self, destination: DeviceArray, index: Index, array: NDArray[Any]) -> None:
        """As `CudaSink.write`.

        Raises:
            CheckpointError: a column is in a group that does not exist.
        """
        name = self._filling[0][0] if self._filling is not None else ""
        if name.endswith(".group_index"):
            groups = self.weights[f"{name.removesuffix('.group_index')}.scale"].shape[1]
            if array.size and not 0 <= array.min() <= array.max() < groups:
                wrong = array.min() if array.min() < 0 else array.max()
                raise CheckpointError(f"a column of {name} is in group {wrong} of {groups}; copy the checkpoint again")
        super().write(destination, index, array)

    def converted(self, weights: Weights[DeviceArray]) -> Weights[DeviceArray]:
        """``weights``, which were made from this sink's arrays, by their formats.

        A last component may not have been complete then.
        """
        self._finish()
        self._unpack()
        self._owner = ""
        return weights.converted(self._converted)

    def _converted(self, weight: Weight[DeviceArray]) -> Weight[DeviceArray]:
        if weight.name in self._ordered:
            return replace(weight, format=DENSE, components={"weight": self.weights[f"{weight.name}.group_index"]})
        chosen = self._formats.get(weight.name)
        if chosen is None:
            return weight
        if isinstance(chosen, RowCodes):
            rows = self.weights[f"{weight.name}.weight"]
            return replace(weight, format=chosen, components={"codes": rows.codes, "scale": rows.scale})
        assert isinstance(chosen, PackedCodes)
        inputs = {kind: array for kind, array in weight.components.items() if kind in INPUT_COMPONENTS}
        if weight.name in self._plain:
            values = self.weights[f"{weight.name}.codes"]
            return replace(weight, format=self._plain[weight.name], components={"weight": values, **inputs})
        held = self.weights.get(f"{weight.name}.weight")  # floats that were quantised
        packed = self._packed(weight.name, chosen) if held is None else held
        return replace(weight, format=chosen, components={"packed": packed, **inputs})

    def _packed(self, name: str, chosen: PackedCodes) -> PackedWeight:
        (codes, columns), scale = self.weights[f"{name}.codes"], self.weights[f"{name}.scale"]
        blocks = block_scales(scale.T, columns) if name in self._blocks else None
        return PackedWeight(
            codes, scale, self.weights.get(f"{name}.zero"), chosen.kind, columns, chosen.group, blocks
        )  # fmt: skip

    def _unpack(self) -> None:
        """Make plain values of the codes of the weight that was loaded last, if no product takes them, so that one at a time is held in both forms."""
        import cupy

        chosen = self._formats.get(self._owner)
        if self._owner in self._plain and isinstance(chosen, PackedCodes):
            packed = self._packed(self._owner, chosen)
            values = cupy.empty(packed.shape, self._dtype)
            unpack_weight(self._library, packed, values)
            self.weights[f"{self._owner}.codes"] = values

    def _finish(self) -> None:
        if self._filling is None:
            return
        names, array = self._filling
        self._filling = None
        self.weights.update(dict.fromkeys(names, self._conversions[names[0]](array)))

    def _quantizer(self, chosen: Format) -> Held:
        """What makes codes of floats: as they are, or packed."""
        if isinstance(chosen, PackedCodes):
            return self._quantizing_packer(chosen)
        assert isinstance(chosen, RowCodes)

        def quantize(array: DeviceArray) -> QuantizedRows:
            import cupy

            codes, scale = cupy.empty(array.shape, np.uint8), cupy.empty(array.shape[:1], np.float32)
            quantized = QuantizedRows(codes, scale, chosen.kind)
            quantize_rows(self._library, array, quantized)
            return quantized

        return quantize

    def _quantizing_packer(self, chosen: PackedCodes) -> Held:
        assert isinstance(chosen.stored, RowCodes)
        kind = chosen.stored.kind

        def quantize(array: DeviceArray) -> PackedWeight:
            """Some rows at a time: their codes are needed until they are packed only."""
            import cupy

            rows, columns = array.shape
            packed = cupy.empty((rows, packed_row_bytes(columns, kind)), np.uint8)
            scale = cupy.empty(rows, np.float32)
            most = max(1, _CHUNK_BYTES // columns)
            codes = cupy.empty((min(most, rows), columns), np.uint8)
            for start in range(0, rows, most):
                piece = slice(start, min(start + most, rows))
                some = codes[: piece.stop - start]
                quantize_rows(self._library, array[piece], QuantizedRows(some, scale[piece], kind))
                pack_weight(self._library, some if kind == "fp8" else some.view(np.int8), packed[piece], kind)
            return PackedWeight(packed, scale[None], None, kind, columns, 0)

        return quantize

    def _sorter(self, name: str) -> Held:
        def unpack(group_index: DeviceArray) -> DeviceArray:
            import cupy

            codes, scale = self.weights[f"{name}.codes"], self.weights[f"{name}.scale"]
            out = cupy.empty(codes.shape, self._dtype)
            unpack_ordered(self._library, codes, group_index, scale, self.weights.get(f"{name}.zero"), out)
            self.weights[f"{name}.codes"] = out  # the codes are not needed any more
            return out

        return unpack

    def _packer(self, chosen: PackedCodes) -> Held:
        def pack(array: DeviceArray) -> tuple[DeviceArray, int]:
            import cupy

            out = cupy.empty((len(array), packed_row_bytes(array.shape[1], chosen.kind)), np.uint8)
            pack_weight(self._library, array, out, chosen.kind)
            return out, array.shape[1]

        return pack


def block_scales(scale: DeviceArray, columns: int) -> DeviceArray:
    """`PackedWeight.blocks` of scales ``[O, ceil(I / 128)]`` float32 that are the same for each 128 rows."""
    import cupy

    rows, groups = scale.shape
    blocks = cupy.zeros(block_scale_shape(rows, columns), np.float32)
    blocks[:, :groups] = scale[::BLOCK]
    return blocks


def _by_group(array: DeviceArray) -> DeviceArray:
    """Scales or zero points ``[O, G]``, or ``[O]``, as ``[G, O]``: what neighbouring rows have lies side by side."""
    import cupy

    return cupy.ascontiguousarray(array.reshape(len(array), -1).T)
