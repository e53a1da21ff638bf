# SPDX-License-Identifier: Apache-2.0
"""A small vocabulary over ``INetworkDefinition``: the layers that a decoder needs, one method each.

Activations are ``[T, D]``; extents that are known only at run time travel as int64 shape tensors. Constants are views of host
memory that the graph keeps alive until the engine is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import ExecutorError
from phalanx.runtime.executors.tensorrt.library import ITensor, TensorRT

__all__ = ["Graph"]


Array = NDArray[Any]


class Graph:
    """One network under construction.

    Args:
        library: adapter of the TensorRT in use.
        network: an empty strongly typed network.
        refittable: checkpoint weights are to be filled in when the engine is loaded.
    """

    def __init__(self, library: TensorRT, network: Any, refittable: bool = False) -> None:
        self.library = library
        self.network = network
        self._refittable = refittable
        self._trt: Any = library.module
        self._memory: list[Array] = []
        self._constants: dict[tuple[int, tuple[int, ...]], ITensor] = {}
        self._types: dict[str, Any] = {}  # by tensor: what its layer was told, which 8.6 may not repeat

    # Inputs, outputs, constants

    def dtype(self, dtype: np.dtype[Any]) -> Any:
        """The library's type for a NumPy type."""
        return self.library.data_type(dtype)

    def input(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> ITensor:
        """A network input; -1 = extent given at run time."""
        self._types[name] = self.dtype(dtype)
        return _made(self.network.add_input(name, self._types[name], shape), f"input {name}")

    def output(self, name: str, tensor: ITensor, dtype: np.dtype[Any] | None = None) -> None:
        """Make ``tensor`` a network output; ``dtype``: its type, where the network does not fix that."""
        self._types[name] = self._type(tensor)
        tensor.name = name
        self.network.mark_output(tensor)
        if dtype is not None:
            self.library.keep_output_type(tensor, self.dtype(dtype))

    def weight(self, name: str, array: Array, shape: tuple[int, ...] | None = None) -> ITensor:
        """A checkpoint weight. Tied weights share memory and become one constant, named after the first."""
        shape = array.shape if shape is None else shape
        key = (array.ctypes.data, shape)
        if key not in self._constants:
            layer, weights = self._constant(array, shape)
            layer.name = name
            if self._refittable:
                self._mark_refittable(weights, name)
            self._constants[key] = layer.get_output(0)
        return self._constants[key]

    def _mark_refittable(self, weights: Any, name: str) -> None:
        if not (self.network.set_weights_name(weights, name) and self.network.mark_weights_refittable(name)):
            raise ExecutorError(f"TensorRT does not take {name} as refittable; build without --stripped")

    def codes(self, name: str, array: Array) -> ITensor:
        """Quantised values ``[out, in]`` as the checkpoint has them, int8 or e4m3; only `dequantize` takes them."""
        layer, _ = self._constant(array, array.shape)
        layer.name = name
        return layer.get_output(0)

    def packed_codes(self, name: str, array: NDArray[np.int8]) -> ITensor:
        """As `codes`, for codes from -8 to 7 of which the engine holds two in each byte; an even number of columns."""
        low, high = array[:, 0::2], array[:, 1::2]
        packed = np.ascontiguousarray((low & 15) | (high << 4)).view(np.uint8)
        self._memory.append(packed)
        layer = _made(self.network.add_constant(array.shape, self.library.packed_weights(packed)), name)
        layer.name = name
        return layer.get_output(0)

    def constant(self, array: Array) -> ITensor:
        """A constant of the model's structure: a table, a scale, a shape."""
        layer, _ = self._constant(array, array.shape)
        return layer.get_output(0)

    def scalar(self, value: float, num_dims: int) -> ITensor:
        """A float32 constant that broadcasts against ``num_dims`` axes."""
        return self.constant(np.full((1,) * num_dims, value, np.float32))

    def _constant(self, array: Array, shape: tuple[int, ...]) -> tuple[Any, Any]:
        assert array.flags.c_contiguous
        self._memory.append(array)
        weights = self.library.weights(array)
        layer = _made(self.network.add_constant(shape, weights), "constant")
        self._types[layer.get_output(0).name] = self.dtype(array.dtype)
        return layer, weights

    # Shapes

    def shape(self, x: ITensor) -> ITensor:
        """Extents of ``x`` at run time."""
        return self.network.add_shape(x).get_output(0)

    def extents(self, *parts: ITensor | int) -> ITensor:
        """A shape tensor from one-element shape tensors and known extents."""
        tensors = [self._number(part) if isinstance(part, int) else part for part in parts]
        return self.network.add_concatenation(tensors).get_output(0)

    def _number(self, value: int) -> ITensor:
        return self.constant(np.array([value], self.library.shape_dtype))

    def extent(self, shape: ITensor, axis: int) -> ITensor:
        """One element of a shape tensor, as a shape tensor."""
        return self.network.add_gather(shape, self.constant(np.array([axis], np.int32)), 0).get_output(0)

    def reshape(self, x: ITensor, shape: ITensor | tuple[int, ...]) -> ITensor:
        """``x`` with other extents: known ones (-1 = what is left), or a shape tensor."""
        return self._shuffle(x, shape, None, None)

    def split_heads(self, x: ITensor, shape: ITensor) -> ITensor:
        """``[T, H C] -> [B, H, N, C]``; ``shape`` is ``B, N, H, C``."""
        return self._shuffle(x, shape, None, (0, 2, 1, 3))

    def merge_heads(self, x: ITensor, width: int) -> ITensor:
        """``[B, H, N, C] -> [T, H C]``."""
        return self._shuffle(x, (-1, width), (0, 2, 1, 3), None)

    def swap_outer(self, x: ITensor, width: int) -> ITensor:
        """``[R, B, V] -> [B, R V]``: what an all-gather leaves, as rows."""
        return self._shuffle(x, (-1, width), (1, 0, 2), None)

    def _shuffle(
        self,
        x: ITensor,
        shape: ITensor | tuple[int, ...],
        before: Sequence[int] | None,
        after: Sequence[int] | None,
    ) -> ITensor:
        layer = self.network.add_shuffle(x)
        if before is not None:
            layer.first_transpose = self._trt.Permutation(before)
        if isinstance(shape, tuple):
            layer.reshape_dims = shape
        else:
            layer.set_input(1, shape)
        if after is not None:
            layer.second_transpose = self._trt.Permutation(after)
        return self._result(layer, x)

    def joined(self, parts: Sequence[ITensor], axis: int) -> ITensor:
        """``[T, a], [T, b] -> [T, a + b]`` along axis 1, ``[a, D], [b, D] -> [a + b, D]`` along axis 0; one part as it is."""
        if len(parts) == 1:
            return parts[0]
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis
        return self._result(layer, parts[0])

    def columns(self, x: ITensor, start: int, shape: ITensor) -> ITensor:
        """``[T, D] -> [T, n]``: columns from ``start``; ``shape`` is ``T, n``."""
        layer = self.network.add_slice(x, (0, start), (0, 0), (1, 1))
        layer.set_input(2, shape)
        return self._result(layer, x)

    # Arithmetic

    def binary(self, operation: str, x: ITensor, y: ITensor) -> ITensor:
        """Element by element; ``operation`` names an ``ElementWiseOperation``."""
        kind = getattr(self._trt.ElementWiseOperation, operation)
        return self._result(_made(self.network.add_elementwise(x, y, kind), operation), x)

    def unary(self, operation: str, x: ITensor) -> ITensor:
        """Element by element; ``operation`` names a ``UnaryOperation``."""
        return self._result(self.network.add_unary(x, getattr(self._trt.UnaryOperation, operation)), x)

    def activation(self, operation: str, x: ITensor) -> ITensor:
        """Element by element; ``operation`` names an ``ActivationType``."""
        return self._result(self.network.add_activation(x, getattr(self._trt.ActivationType, operation)), x)

    def select(self, condition: ITensor, x: ITensor, y: ITensor) -> ITensor:
        """``x`` where ``condition``, else ``y``."""
        return self.network.add_select(condition, x, y).get_output(0)

    def cast(self, x: ITensor, dtype: np.dtype[Any]) -> ITensor:
        """``x`` in another type; ``x`` itself if it has it already."""
        target = self.dtype(dtype)
        return x if self._type(x) == target else self._cast(x, target)

    def _cast(self, x: ITensor, target: Any) -> ITensor:
        result = self.network.add_cast(x, target).get_output(0)
        self._types[result.name] = target
        return result

    def cast_like(self, x: ITensor, other: ITensor) -> ITensor:
        """``x`` in the type of ``other``; ``x`` itself if it has it already."""
        return x if self._type(x) == self._type(other) else self._cast(x, self._type(other))

    def matmul_transposed(self, x: ITensor, weight: ITensor) -> ITensor:
        """``x @ weight.T``: ``[T, in] x [out, in] -> [T, out]``."""
        none, transpose = self._trt.MatrixOperation.NONE, self._trt.MatrixOperation.TRANSPOSE
        layer = _made(self.network.add_matrix_multiply(x, none, weight, transpose), "matrix product")
        return self._result(layer, x)

    def dequantize(self, codes: ITensor, scale: Array) -> ITensor:
        """``code * scale`` in the type of ``scale``: one for all ``[]``, each row ``[O]``, or columns of each row in equal blocks ``[O, G]``."""
        layer = self.network.add_dequantize(codes, self.constant(scale), self.dtype(scale.dtype))
        layer = _made(layer, "dequantisation")
        if scale.ndim == 1:
            layer.axis = 0
        self._types[layer.get_output(0).name] = self.dtype(scale.dtype)
        return layer.get_output(0)

    def quantize(self, x: ITensor, dtype: np.dtype[Any]) -> ITensor:
        """``x``, in float32, as int8 or e4m3: rounded to nearest even, saturated; only `dequantize` takes the result."""
        one = self.constant(np.ones((), np.float32))
        return _made(self.network.add_quantize(x, one, self.dtype(dtype)), "quantisation").get_output(0)

    def largest_magnitudes(self, x: ITensor) -> ITensor:
        """Over the last axis: ``[T, D] -> [T, 1]``, ``[T, G, g] -> [T, G, 1]``."""
        axes = 1 << (len(x.shape) - 1)
        return self._result(self.network.add_reduce(self.unary("ABS", x), self._trt.ReduceOperation.MAX, axes, True), x)

    def mean(self, x: ITensor) -> ITensor:
        """Mean over the last axis: ``[T, D] -> [T, 1]``."""
        return self._result(self.network.add_reduce(x, self._trt.ReduceOperation.AVG, 1 << 1, True), x)

    def mean_square(self, x: ITensor) -> ITensor:
        """Mean of squares over the last axis: ``[T, D] -> [T, 1]``."""
        return self.mean(self.binary("PROD", x, x))

    def row_sums(self, x: ITensor) -> ITensor:
        """Sum over the last axis: ``[B, V] -> [B]``."""
        return self.network.add_reduce(x, self._trt.ReduceOperation.SUM, 1 << 1, False).get_output(0)

    def largest(self, x: ITensor) -> ITensor:
        """Index of each row's largest element: ``[B, V] -> [B]`` int32."""
        layer = _made(self.network.add_topk(x, self._trt.TopKOperation.MAX, 1, 1 << 1), "largest element")
        return self.reshape(layer.get_output(1), (-1,))

    def layer_norm(self, x: ITensor, scale: ITensor, bias: ITensor, eps: float) -> ITensor:
        """Normalise over the last axis of ``[T, D]``; scale and bias are ``[1, D]``."""
        layer = _made(self.network.add_normalization_v2(x, scale, bias, 1 << 1), "normalisation")
        layer.epsilon = eps
        return layer.get_output(0)

    def gather(self, x: ITensor, indices: ITensor, axis: int = 0) -> ITensor:
        """Rows of ``x``, or columns."""
        return self.network.add_gather(x, indices, axis).get_output(0)

    # Decoder layers

    def rotate(
        self, x: ITensor, cos: ITensor, sin: ITensor, positions: ITensor, rotary_dim: int, interleaved: bool
    ) -> ITensor:  # fmt: skip
        """Rotary embedding of ``[B, H, N, C]``, halves or neighbours paired; tables ``[positions, rotary_dim / 2]``."""
        layer = _made(self.network.add_rotary_embedding(x, cos, sin, interleaved, rotary_dim), "rotary embedding")
        layer.set_input(3, positions)
        return layer.get_output(0)

    def update_cache(self, cache: ITensor, update: ITensor, write_indices: ITensor) -> ITensor:
        """Write ``[B, K, N, C]`` into ``[B, K, P, C]`` at each sequence's index; the result must alias ``cache``."""
        mode = self._trt.KVCacheMode.LINEAR
        return _made(self.network.add_kv_cache_update(cache, update, write_indices, mode), "cache update").get_output(0)

    def attention(self, query: ITensor, key: ITensor, value: ITensor, mask: ITensor) -> ITensor:
        """Masked softmax attention; queries are scaled already: ``[B, H, N, C]``."""
        return self.library.attention(self.network, query, key, value, mask)

    def all_reduce(self, x: ITensor, num_ranks: int) -> ITensor:
        """Sum over ranks. *Collective at run time.*"""
        return self._collective("ALL_REDUCE", self._trt.ReduceOperation.SUM, x, num_ranks)

    def all_gather(self, x: ITensor, num_ranks: int) -> ITensor:
        """Concatenate the ranks' tensors along the first axis. *Collective at run time.*"""
        return self._collective("ALL_GATHER", self._trt.ReduceOperation.NONE, x, num_ranks)

    def _collective(self, operation: str, reduction: Any, x: ITensor, num_ranks: int) -> ITensor:
        kind = getattr(self._trt.CollectiveOperation, operation)
        layer = self.network.add_dist_collective(x, kind, reduction, -1, list(range(num_ranks)))
        layer = _made(layer, operation)
        layer.num_ranks = num_ranks
        layer.metadata = operation  # the layer does not expose its operation; readers of the network find it here
        return layer.get_output(0)

    def _result(self, layer: Any, like: ITensor) -> ITensor:
        """The output of ``layer``, in the type of ``like``."""
        dtype, result = self._type(like), layer.get_output(0)
        self.library.keep_type(layer, dtype)
        self._types[result.name] = dtype
        return result

    def _type(self, x: ITensor) -> Any:
        return self._types.get(x.name, x.dtype)


def _made(layer: Any, what: str) -> Any:
    """The library returns None for a layer that it refuses, and logs why."""
    if layer is None:
        raise ExecutorError(f"TensorRT refused a layer of the network: {what}")
    return layer
