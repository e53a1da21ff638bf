# SPDX-License-Identifier: Apache-2.0
"""cuBLASLt behind three calls: list algorithms for a product, see whether one computes another product, run one.

Row-major ``out[T, O] = x[T, I] @ weight[O, I].T`` is column-major ``out^T[O, T] = weight^T^T @ x^T``: cuBLASLt's first
operand is the weight, transposed, its second is x. float32 accumulation, never TF32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.parallel.errors import ConfigError, ExecutorError

__all__ = ["Algorithm", "CublasLt", "Descriptors", "GemmProblem"]

_CUDA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14, "fp8": 28, "int8": 3, "int32": 10}  # cudaDataType
_ALIGNMENT_BYTES = 16
_ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "int8": 1}
_PACKED_SIZES = {"int4": 0.5, "int8": 1.0, "fp8": 1.0}
# cublasLtMatmulMatrixScale_t: OUTER_VEC_32F, one float32 for each row of an operand; VEC128_32F, one for 128 columns of a row, those of
# neighbouring rows side by side; BLK128x128_32F, one for 128 x 128, a row of blocks padded to a multiple of 4.
_OUTER_VECTOR_SCALES = 3
_GROUP_SCALES = 4
_BLOCK_SCALES = 5
_REDUCE_IN_FLOAT32 = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: split-k sums are never rounded to storage


@dataclass(frozen=True, slots=True)
class GemmProblem:
    """``out[T, O] = x[T, I] @ weight[O, I].T + bias``: everything that decides which algorithm is best.

    Attributes:
        dtype: of x and weight. ``fp8`` and ``int8`` are codes with a float32 scale for each row of x and of weight.
        out_dtype: of out and, for codes, of bias.
        packed: layout of a packed weight (``int4/128z``), whose values x is multiplied by; "" = weight is like x.
        has_bias: whether there is a bias.
        has_blocks: whether scales are those of 128 columns of x and of 128 x 128 of weight; for fp8.
        has_sums: whether out is what the tensor cores add up of codes, without scales: int32 of int8, float32 of fp8.
    """

    num_tokens: int
    out_features: int
    in_features: int
    dtype: str
    out_dtype: str
    has_bias: bool = False
    packed: str = ""
    has_blocks: bool = False
    has_sums: bool = False

    @property
    def key(self) -> str:
        """The problem as one word, for a cache file."""
        options = ("+blocks" if self.has_blocks else "") + ("+bias" if self.has_bias else "")
        dtypes = f"{self.dtype}{'*' if self.packed else ''}{self.packed}>{self.out_dtype}"
        return f"{self.num_tokens}x{self.out_features}x{self.in_features}:{dtypes}{options}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight matrix."""
        itemsize = _PACKED_SIZES[self.packed.partition("/")[0]] if self.packed else _ITEM_SIZES[self.dtype]
        return int(self.out_features * self.in_features * itemsize)

    @property
    def has_scales(self) -> bool:
        """Whether x and weight are codes with scales, of rows or of blocks."""
        return self.dtype in ("fp8", "int8") and not self.has_sums

    @property
    def has_narrow_results(self) -> bool:
        """Whether out is of 16 bits."""
        return _ITEM_SIZES.get(self.out_dtype) == 2

    @property
    def is_exact(self) -> bool:
        """Whether the tensor cores add up integers."""
        return self.out_dtype == "int32"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One of cuBLASLt's algorithms as its opaque words; valid for the library version and device it came from."""

    words: tuple[int, ...]
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class Descriptors:
    """cuBLASLt's handles for one problem."""

    operation: int
    weight: int
    x: int
    out: int


class CublasLt:
    """One cuBLASLt handle with a caller's workspace. Products enqueue on the current stream and do not wait."""

    def __init__(self, workspace: Any) -> None:
        """``workspace``: flat uint8 device array, 256-byte aligned, shared by all products of a stream.

        Raises ConfigError when nvmath-python or cuBLASLt is missing.
        """
        try:
            from nvmath.bindings import cublasLt
        except ImportError as error:
            raise ConfigError(
                f"cuBLASLt's bindings cannot be imported ({error}); pip install -e '.[cuda13]' or '.[cuda12]' in Phalanx's checkout"
            ) from error
        self._lt = cublasLt
        self._workspace = workspace
        with self._errors():
            self.version = int(cublasLt.get_version())
            self._handle = cublasLt.create()
        self._descriptors: dict[GemmProblem, Descriptors] = {}
        self._words: dict[Algorithm, np.ndarray] = {}
        self._factors = {kind: (np.zeros(1, kind), np.ones(1, kind)) for kind in (np.float32, np.int32)}

    def algorithms(self, problem: GemmProblem, count: int) -> list[Algorithm]:
        """Up to ``count`` algorithms that fit the workspace, most promising first by cuBLASLt's own estimate.

        Raises ExecutorError when there is none.
        """
        lt, handles = self._lt, self._described(problem)
        results = np.zeros(count, lt.matmul_heuristic_result_dtype)
        found = np.zeros(1, np.int32)
        with self._errors(problem), self._preference() as preference:
            layouts = (handles.weight, handles.x, handles.out, handles.out)
            arrays = (results.ctypes.data, found.ctypes.data)
            lt.matmul_algo_get_heuristic(self._handle, handles.operation, *layouts, preference, count, *arrays)
        suggested = [
            Algorithm(tuple(int(word) for word in np.ravel(result["algo"]["data_"])), int(result["workspace_size"]))
            for result in results[: int(found[0])]
            if result["state"] == 0
        ]
        if not suggested:
            raise ExecutorError(
                f"cuBLASLt {self.version} has no algorithm for {problem.key}; install a newer one, or use another --tp or --quantize"
            )
        return suggested

    @contextlib.contextmanager
    def _preference(self) -> Iterator[int]:
        """What algorithms have to keep to: the workspace, our alignment, sums in float32."""
        lt, preference = self._lt, self._lt.matmul_preference_create()
        try:
            attribute = lt.MatmulPreferenceAttribute
            limits: list[tuple[int, np.generic]] = [
                (attribute.MAX_WORKSPACE_BYTES, np.uint64(self._workspace.size)),
                (attribute.REDUCTION_SCHEME_MASK, np.uint32(_REDUCE_IN_FLOAT32)),
            ]
            for operand in ("A", "B", "C", "D"):
                limits.append((attribute[f"MIN_ALIGNMENT_{operand}_BYTES"], np.uint32(_ALIGNMENT_BYTES)))
            for name, value in limits:
                cell = np.array([value])
                lt.matmul_preference_set_attribute(preference, name, cell.ctypes.data, cell.nbytes)
            yield preference
        finally:
            lt.matmul_preference_destroy(preference)

    def accepts(self, problem: GemmProblem, algorithm: Algorithm) -> bool:
        """Whether an algorithm found for one problem computes another one within the workspace."""
        lt, handles = self._lt, self._described(problem)
        result, words = np.zeros(1, lt.matmul_heuristic_result_dtype), np.array(algorithm.words, np.uint64)
        layouts = (handles.weight, handles.x, handles.out, handles.out)
        try:
            lt.matmul_algo_check(self._handle, handles.operation, *layouts, words.ctypes.data, result.ctypes.data)
        except lt.cuBLASLtError:
            return False
        return bool(result["workspace_size"][0] <= algorithm.workspace_bytes)

    def run(
        self,
        problem: GemmProblem,
        algorithm: Algorithm,
        x: int,
        weight: int,
        out: int,
        bias: int,
        stream: int,
        scales: tuple[int, int] = (0, 0),
    ) -> None:
        """Enqueue the product.

        Operands are device addresses: ``bias`` 0 if there is none, ``scales`` those of x and weight for codes.
        """
        lt, handles = self._lt, self._described(problem)
        words = self._words.get(algorithm)
        if words is None:
            words = self._words[algorithm] = np.array(algorithm.words, np.uint64)
        if problem.has_bias:
            self._set(handles.operation, lt.MatmulDescAttribute.BIAS_POINTER, np.uint64(bias))
        if problem.has_scales:
            attribute = lt.MatmulDescAttribute
            self._set(handles.operation, attribute.A_SCALE_POINTER, np.uint64(scales[1]))
            self._set(handles.operation, attribute.B_SCALE_POINTER, np.uint64(scales[0]))
        factors = self._factors[np.int32 if problem.is_exact else np.float32]
        with self._errors(problem):
            lt.matmul(
                self._handle, handles.operation, factors[1].ctypes.data, weight, handles.weight, x, handles.x,
                factors[0].ctypes.data, out, handles.out, out, handles.out, words.ctypes.data,
                self._workspace.data.ptr, algorithm.workspace_bytes, stream,
            )  # fmt: skip

    def close(self) -> None:
        """Destroy the handle and every descriptor. Nothing may be in flight."""
        for handles in self._descriptors.values():
            for layout in (handles.weight, handles.x, handles.out):
                self._lt.matrix_layout_destroy(layout)
            self._lt.matmul_desc_destroy(handles.operation)
        self._descriptors.clear()
        self._lt.destroy(self._handle)

    def _described(self, problem: GemmProblem) -> Descriptors:
        if problem not in self._descriptors:
            with self._errors(problem):
                self._descriptors[problem] = self._describe(problem)
        return self._descriptors[problem]

    def _describe(self, problem: GemmProblem) -> Descriptors:
        from nvmath.bindings import cublas

        lt = self._lt
        compute = cublas.ComputeType.COMPUTE_32I if problem.is_exact else cublas.ComputeType.COMPUTE_32F
        operation = lt.matmul_desc_create(int(compute), _CUDA_TYPES["int32" if problem.is_exact else "float32"])
        attribute, epilogue = lt.MatmulDescAttribute, lt.Epilogue
        self._set(operation, attribute.TRANSA, np.int32(1))  # CUBLAS_OP_T
        self._set(operation, attribute.EPILOGUE, np.uint32(epilogue.BIAS if problem.has_bias else epilogue.DEFAULT))
        dtype, out_dtype = _CUDA_TYPES[problem.dtype], _CUDA_TYPES[problem.out_dtype]
        if problem.has_bias:
            self._set(operation, attribute.BIAS_DATA_TYPE, np.int32(dtype))
        if problem.has_scales:
            modes = (_BLOCK_SCALES, _GROUP_SCALES) if problem.has_blocks else (_OUTER_VECTOR_SCALES,) * 2
            for name, mode in zip((attribute.A_SCALE_MODE, attribute.B_SCALE_MODE), modes, strict=True):
                self._set(operation, name, np.int32(mode))
            # The heuristic answers only for pointers that could be read; `run` sets the operands' own.
            for pointer in (attribute.A_SCALE_POINTER, attribute.B_SCALE_POINTER):
                self._set(operation, pointer, np.uint64(self._workspace.data.ptr))
        if problem.dtype == "fp8":
            # Sums with the tensor cores' 13 bits: an order of magnitude below the codes' own noise, and 10-16 % faster. Those of
            # blocks leave the tensor cores after 128 columns in any case, to be scaled.
            self._set(operation, attribute.FAST_ACCUM, np.int8(not problem.has_blocks))
        t, o, i = problem.num_tokens, problem.out_features, problem.in_features
        weight = lt.matrix_layout_create(dtype, i, o, i)
        x = lt.matrix_layout_create(dtype, i, t, i)
        return Descriptors(operation, weight, x, lt.matrix_layout_create(out_dtype, o, t, o))

    def _set(self, operation: int, name: int, value: np.generic) -> None:
        cell = np.array([value])
        self._lt.matmul_desc_set_attribute(operation, name, cell.ctypes.data, cell.nbytes)

    @contextlib.contextmanager
    def _errors(self, problem: GemmProblem | None = None) -> Iterator[None]:
        try:
            yield
        except self._lt.cuBLASLtError as error:
            raise ExecutorError(f"cuBLASLt: {error} for {problem.key if problem else 'its handle'}") from error
