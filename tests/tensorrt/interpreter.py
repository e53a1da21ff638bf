"""Evaluates a TensorRT network definition in NumPy, from the library's own layer objects and nothing else.

Every layer is read back: its type, inputs, attributes and constants. Floating point types are computed in float32, so the
result is what the network means, free of the rounding that float16 would add. What this file has not got an answer for is
an error, so a network that uses a new layer or attribute cannot pass by accident.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from phalanx.parallel.communicator import Communicator

from .codes import bfloat16_values, constant_codes, to_e4m3

Array = np.ndarray[Any, Any]


class NetworkInterpreter:
    """A network and the communicator that its collectives use.

    Args:
        module: the TensorRT that made the network.
        owner: whatever keeps the network's weights alive.
    """

    def __init__(self, module: ModuleType, network: Any, comm: Communicator, owner: object) -> None:
        self._trt, self._network, self._comm, self._owner = module, network, comm, owner
        self._classes = {
            "ACTIVATION": module.IActivationLayer, "ATTENTION_INPUT": module.IAttentionInputLayer,
            "CAST": module.ICastLayer, "CONCATENATION": module.IConcatenationLayer, "CONSTANT": module.IConstantLayer,
            "DEQUANTIZE": module.IDequantizeLayer, "DIST_COLLECTIVE": module.IDistCollectiveLayer, "ELEMENTWISE": module.IElementWiseLayer,
            "GATHER": module.IGatherLayer, "KV_CACHE_UPDATE": module.IKVCacheUpdateLayer,
            "MATRIX_MULTIPLY": module.IMatrixMultiplyLayer, "NORMALIZATION": module.INormalizationLayer,
            "QUANTIZE": module.IQuantizeLayer, "REDUCE": module.IReduceLayer, "ROTARY_EMBEDDING": module.IRotaryEmbeddingLayer,
            "SELECT": module.ISelectLayer, "SHAPE": module.IShapeLayer, "SHUFFLE": module.IShuffleLayer,
            "SLICE": module.ISliceLayer, "TOPK": module.ITopKLayer, "UNARY": module.IUnaryLayer,
        }  # fmt: skip
        self._code_types = {module.DataType.FP8, module.DataType.INT8, module.DataType.INT4}

    @property
    def input_names(self) -> set[str]:
        """Names of the network's inputs."""
        return {self._network.get_input(index).name for index in range(self._network.num_inputs)}

    def layers(self) -> list[Any]:
        """All layers, each as an object of its own class, in the order of the network."""
        layers = [self._network.get_layer(index) for index in range(self._network.num_layers)]
        for layer in layers:
            kind = layer_kind(self._trt, layer)
            if kind != "ATTENTION_OUTPUT":
                layer.__class__ = self._classes[kind]
        return layers

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. *Collective, like the network.*"""
        assert inputs.keys() == self.input_names, (inputs.keys(), self.input_names)
        values: dict[str, Array] = {}
        for index in range(self._network.num_inputs):
            tensor = self._network.get_input(index)
            _check_shape(tensor, inputs[tensor.name])
            values[tensor.name] = inputs[tensor.name]
        for index in range(self._network.num_layers):
            self._evaluate(self._network.get_layer(index), values)
        names = [self._network.get_output(index).name for index in range(self._network.num_outputs)]
        return {name: values[name] for name in names}

    def _evaluate(self, layer: Any, values: dict[str, Array]) -> None:
        kind = layer_kind(self._trt, layer)
        if kind == "ATTENTION_OUTPUT":  # the second half of an attention: its input half holds the result
            values[layer.get_output(0).name] = values[layer.get_input(0).name]
            return
        layer.__class__ = self._classes[kind]
        operands = [
            None if (tensor := layer.get_input(index)) is None else values[tensor.name]
            for index in range(layer.num_inputs)
        ]
        results = getattr(self, "_" + kind.lower())(layer, operands)
        results = results if isinstance(results, tuple) else (results,)
        assert layer.num_outputs == len(results), (kind, layer.num_outputs)
        for index, result in enumerate(results):
            output = layer.get_output(index)
            _check_shape(output, result)
            values[output.name] = result

    # One method a layer type

    def _constant(self, layer: Any, operands: Sequence[Array]) -> Array:
        weights, shape, types = layer.weights, tuple(layer.shape), self._trt.DataType
        if layer.get_output(0).dtype in self._code_types:
            return constant_codes(weights).reshape(shape)
        if layer.get_output(0).dtype == types.BF16:
            return bfloat16_values(weights).reshape(shape)
        array = weights.reshape(shape)
        return array.astype(np.float32) if array.dtype.kind == "f" else array.copy()

    def _dequantize(self, layer: Any, operands: Sequence[Array]) -> Array:
        """``code * scale``, a scale for all, each index of the layer's axis, or blocks along one axis; there is no zero point."""
        codes, scale = operands
        assert layer.get_input(0).dtype in self._code_types
        assert (scale > 0).all(), "scales must be positive"
        assert layer.get_input(1).dtype == layer.get_output(0).dtype
        if scale.ndim == 1:
            assert len(scale) == codes.shape[layer.axis]
            scale = scale.reshape([-1 if axis == layer.axis else 1 for axis in range(codes.ndim)])
        elif scale.ndim:
            scale = _spread(scale, codes.shape)
        return (codes * scale.astype(np.float64)).astype(np.float32)

    def _quantize(self, layer: Any, operands: Sequence[Array]) -> Array:
        """``x / scale`` rounded to nearest even and clamped; values of codes."""
        x, scale = (operand.astype(np.float64) for operand in operands)
        assert scale.ndim == 0
        assert layer.get_input(0).dtype == layer.get_input(1).dtype
        if layer.get_output(0).dtype == self._trt.DataType.FP8:
            return to_e4m3(x / scale)
        assert layer.get_output(0).dtype == self._trt.DataType.INT8
        return np.clip(np.rint(x / scale), -128, 127)

    def _shape(self, layer: Any, operands: Sequence[Array]) -> Array:
        return np.array(operands[0].shape, np.int64)

    def _cast(self, layer: Any, operands: Sequence[Array]) -> Array:
        floats = (self._trt.DataType.FLOAT, self._trt.DataType.HALF, self._trt.DataType.BF16)
        assert {layer.to_type, layer.get_input(0).dtype} <= {*floats}
        return operands[0].astype(np.float32)

    def _concatenation(self, layer: Any, operands: Sequence[Array]) -> Array:
        return np.concatenate(operands, axis=layer.axis)

    def _gather(self, layer: Any, operands: Sequence[Array]) -> Array:
        assert layer.mode == self._trt.GatherMode.DEFAULT
        data, indices = operands
        assert indices.size == 0 or (indices.min() >= 0 and indices.max() < data.shape[layer.axis]), (
            "gather out of bounds"
        )
        return np.take(data, indices, axis=layer.axis)

    def _elementwise(self, layer: Any, operands: Sequence[Array]) -> Array:
        x, y = operands
        assert x.ndim == y.ndim, (x.shape, y.shape)
        assert x.dtype == y.dtype, (x.dtype, y.dtype)
        operations: dict[str, Callable[[Array, Array], Array]] = {
            "SUM": np.add, "SUB": np.subtract, "PROD": np.multiply, "DIV": np.divide, "LESS": np.less,
            "MIN": np.minimum, "MAX": np.maximum, "GREATER": np.greater, "AND": np.logical_and,
        }  # fmt: skip
        return operations[layer.op.name](x, y)

    def _unary(self, layer: Any, operands: Sequence[Array]) -> Array:
        operations: dict[str, Callable[[Array], Array]] = {
            "SQRT": np.sqrt,
            "NOT": np.logical_not,
            "ABS": np.abs,
            "ERF": lambda x: np.vectorize(math.erf)(x).astype(np.float32),
        }
        return operations[layer.op.name](operands[0])

    def _activation(self, layer: Any, operands: Sequence[Array]) -> Array:
        x = operands[0].astype(np.float64)
        operations: dict[str, Callable[[Array], Array]] = {
            "SIGMOID": lambda x: 1 / (1 + np.exp(-x)),
            "RELU": lambda x: np.maximum(x, 0),
            "TANH": np.tanh,
            "GELU_TANH": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
            "GELU_ERF": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        }
        return operations[layer.type.name](x).astype(np.float32)

    def _select(self, layer: Any, operands: Sequence[Array]) -> Array:
        return np.where(*operands)

    def _reduce(self, layer: Any, operands: Sequence[Array]) -> Array:
        operations: dict[str, Callable[..., Array]] = {"AVG": np.mean, "SUM": np.sum, "MAX": np.max}
        return operations[layer.op.name](operands[0], axis=_axes(layer.axes), keepdims=layer.keep_dims)

    def _topk(self, layer: Any, operands: Sequence[Array]) -> tuple[Array, Array]:
        assert (layer.op, layer.k) == (self._trt.TopKOperation.MAX, 1)
        (axis,) = _axes(layer.axes)
        indices = operands[0].argmax(axis=axis, keepdims=True).astype(np.int32)
        return np.take_along_axis(operands[0], indices, axis=axis), indices

    def _normalization(self, layer: Any, operands: Sequence[Array]) -> Array:
        assert layer.num_groups == 1
        x, scale, bias = operands
        axes = _axes(layer.axes)
        centred = x - x.mean(axis=axes, keepdims=True)
        variance = np.square(centred).mean(axis=axes, keepdims=True)
        return centred / np.sqrt(variance + np.float32(layer.epsilon)) * scale + bias

    def _matrix_multiply(self, layer: Any, operands: Sequence[Array]) -> Array:
        none, transpose = self._trt.MatrixOperation.NONE, self._trt.MatrixOperation.TRANSPOSE
        sides = []
        for operand, operation in zip(operands, (layer.op0, layer.op1), strict=True):
            assert operation in (none, transpose)
            sides.append(operand.swapaxes(-1, -2) if operation == transpose else operand)
            assert operand.dtype == np.float32
        return (sides[0].astype(np.float64) @ sides[1].astype(np.float64)).astype(np.float32)

    def _shuffle(self, layer: Any, operands: Sequence[Array]) -> Array:
        x = operands[0].transpose(_permutation(layer.first_transpose, operands[0].ndim))
        shape = tuple(operands[1].tolist()) if len(operands) > 1 else tuple(layer.reshape_dims)
        x = x.reshape(shape)
        return x.transpose(_permutation(layer.second_transpose, x.ndim))

    def _slice(self, layer: Any, operands: Sequence[Array]) -> Array:
        assert layer.mode == self._trt.SampleMode.STRICT_BOUNDS
        size = operands[2].tolist() if len(operands) > 2 else list(layer.shape)
        index = []
        for start, count, stride, extent in zip(layer.start, size, layer.stride, operands[0].shape, strict=True):
            assert start + (count - 1) * stride < extent, "slice out of bounds"
            index.append(slice(start, start + (count - 1) * stride + 1, stride))
        return operands[0][tuple(index)]

    def _rotary_embedding(self, layer: Any, operands: Sequence[Array]) -> Array:
        x, cos, sin, positions = operands
        dim = layer.rotary_embedding_dim or x.shape[-1]
        cos, sin = cos[positions][:, None], sin[positions][:, None]
        rotated, rest = x[..., :dim], x[..., dim:]
        if layer.interleaved:
            even, odd = rotated[..., 0::2], rotated[..., 1::2]
            pairs = np.stack((even * cos - odd * sin, odd * cos + even * sin), axis=-1)
            return np.concatenate((pairs.reshape(rotated.shape), rest), axis=-1)
        low, high = rotated[..., : dim // 2], rotated[..., dim // 2 :]
        return np.concatenate((low * cos - high * sin, high * cos + low * sin, rest), axis=-1)

    def _kv_cache_update(self, layer: Any, operands: Sequence[Array]) -> Array:
        assert layer.cache_mode == self._trt.KVCacheMode.LINEAR
        assert layer.update_form == self._trt.AttentionIOForm.PADDED_BHND
        cache, update, write_indices = operands[:3]
        result = cache.copy()
        for sequence, start in enumerate(write_indices.tolist()):
            assert 0 <= start <= cache.shape[2] - update.shape[2], "cache update out of bounds"
            result[sequence, :, start : start + update.shape[2]] = update[sequence]
        return result

    def _attention_input(self, layer: Any, operands: Sequence[Array]) -> Array:
        attention, (query, key, value, mask) = layer.attention, operands
        for form in (attention.query_form, attention.key_value_form):
            assert form == self._trt.AttentionIOForm.PADDED_BHND
        assert attention.key_value_lengths is None
        assert attention.causal_kind == self._trt.CausalMaskKind.NONE
        assert mask.dtype == np.float32
        groups = query.shape[1] // key.shape[1]
        scores = query @ np.repeat(key, groups, axis=1).swapaxes(-1, -2) + mask
        if attention.norm_op == self._trt.AttentionNormalizationOp.SOFTMAX:
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
        return scores @ np.repeat(value, groups, axis=1)

    def _dist_collective(self, layer: Any, operands: Sequence[Array]) -> Array:
        assert layer.num_ranks == self._comm.size, (layer.num_ranks, self._comm.size)
        if layer.metadata == "ALL_REDUCE":
            return self._comm.all_reduce(np.array(operands[0]))
        assert layer.metadata == "ALL_GATHER", layer.metadata
        gathered = self._comm.all_gather(np.ascontiguousarray(operands[0]))
        return gathered.reshape(-1, *operands[0].shape[1:])


def layer_kind(module: ModuleType, layer: Any) -> str:
    """Name of the layer's ``LayerType``, which an activation layer hides behind its own ``type``."""
    return str(module.ILayer.type.__get__(layer).name)


def _axes(mask: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(8) if mask >> axis & 1)


def _spread(scale: Array, shape: tuple[int, ...]) -> Array:
    """Scales of equal blocks along one axis, one for each value."""
    (axis,) = [axis for axis, extent in enumerate(shape) if scale.shape[axis] != extent]
    assert shape[axis] % scale.shape[axis] == 0, (scale.shape, shape)
    return np.repeat(scale, shape[axis] // scale.shape[axis], axis=axis)


def _permutation(permutation: Any, num_dims: int) -> tuple[int, ...]:
    return tuple(permutation)[:num_dims]


def _check_shape(tensor: Any, value: Array) -> None:
    """What the library inferred must be what was computed."""
    shape = tuple(tensor.shape)
    assert len(shape) == value.ndim, (tensor.name, shape, value.shape)
    assert all(known in (-1, found) for known, found in zip(shape, value.shape, strict=True)), (
        tensor.name,
        shape,
        value.shape,
    )
