# SPDX-License-Identifier: Apache-2.0
"""Times every candidate kernel of a matrix product in a CUDA graph and keeps the fastest.

The weight rotates over copies that together exceed the second-level cache several times, as the layers of a model do:
timing one matrix over and over would measure the cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from phalanx.kernels.cublaslt import GemmProblem
from phalanx.kernels.gemm import Gemm, open_gemm
from phalanx.kernels.gemm_operands import Operands
from phalanx.kernels.graph_capture import capture
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.packed import PackedWeight, parse_layout
from phalanx.kernels.product_sizes import BLOCK, SUM_BYTES, block_scale_shape, packed_row_bytes, unpacked_bytes
from phalanx.kernels.quantize import CodeKind, QuantizedRows
from phalanx.kernels.quantize_groups import QuantizedGroups
from phalanx.kernels.tuning import GemmChoice, GemmTimings

__all__ = ["GemmTuner", "TimedOperands", "open_tuner"]

_NOISE_SCALES = {"float8_e4m3fn": 80.0, "int8": 25.0}
_ROTATED_BYTES = 256 << 20
_TIMED_SECONDS = 1.5e-3
_NUM_REPLAYS = 5
_SLOWEST_CALL = 1.5  # a first replay this many times slower than the best so far needs no second one
_ASSUMED_FLOPS = 600e12
_ASSUMED_BYTES_PER_SECOND = 4e12
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_CODE_DTYPES: dict[CodeKind, np.dtype[Any]] = {"fp8": np.dtype(ml_dtypes.float8_e4m3fn), "int8": np.dtype(np.int8)}


@dataclass(frozen=True, slots=True)
class TimedOperands:
    """Operands to rotate over, and how many calls one replay makes."""

    operands: list[Operands]
    num_calls: int


class GemmTuner:
    """Measures products on the current device. Allocates its own operands, so run it before memory is handed out."""

    def __init__(self, gemm: Gemm, timings: GemmTimings) -> None:
        import cupy

        self._gemm = gemm
        self._timings = timings
        self._cupy = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._noise: dict[str, np.ndarray] = {}

    def tune(self, problems: Iterable[GemmProblem], again: bool = False) -> dict[GemmProblem, GemmChoice]:
        """Measure those of ``problems`` that have no timing yet (all of them with ``again``) and keep the results."""
        wanted = [problem for problem in problems if again or self._timings.find(problem) is None]
        found = {problem: self._fastest(problem) for problem in wanted}
        if found:
            self._timings.add(found)
            self._gemm.refresh()
        return found

    def _fastest(self, problem: GemmProblem) -> GemmChoice:
        timed = self.timed_operands(problem)
        choices: list[GemmChoice] = []
        best = float("inf")
        for kernel in self._gemm.candidates(problem):
            microseconds = self.measure(problem, GemmChoice(kernel), timed, best)
            best = min(best, microseconds)
            choices.append(GemmChoice(kernel, microseconds))
        fastest = min(choices, key=lambda choice: choice.microseconds)
        return GemmChoice(fastest.kernel, fastest.microseconds, choices[0].microseconds)

    def measure(
        self,
        problem: GemmProblem,
        choice: GemmChoice,
        timed: TimedOperands | None = None,
        best_microseconds: float = float("inf"),
    ) -> float:
        """Microseconds of one call: the median over replays of a graph of many."""
        cupy, timed = self._cupy, timed or self.timed_operands(problem)
        with self._stream:
            self._gemm.run(problem, choice, timed.operands[0])  # loads the kernel: not allowed under capture
            self._stream.synchronize()
            graph, _ = capture(self._stream, partial(self._run_all, problem, choice, timed))
        graph.launch(self._stream)
        samples: list[float] = []
        for _ in range(_NUM_REPLAYS):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(self._stream)
            graph.launch(self._stream)
            stop.record(self._stream)
            stop.synchronize()
            samples.append(1e3 * cupy.cuda.get_elapsed_time(start, stop) / timed.num_calls)
            if samples[0] > _SLOWEST_CALL * best_microseconds:
                break
        return statistics.median(samples)

    def _run_all(self, problem: GemmProblem, choice: GemmChoice, timed: TimedOperands) -> None:
        for call in range(timed.num_calls):
            self._gemm.run(problem, choice, timed.operands[call % len(timed.operands)])

    def timed_operands(self, problem: GemmProblem) -> TimedOperands:
        """Operands for ``measure``; make them once for several kernels."""
        t, o, i = problem.num_tokens, problem.out_features, problem.in_features
        out_dtype = _DTYPES[problem.out_dtype]
        seconds = max(2.0 * t * o * i / _ASSUMED_FLOPS, problem.weight_bytes / _ASSUMED_BYTES_PER_SECOND)
        num_calls = min(40, max(4, int(_TIMED_SECONDS / seconds)))
        num_copies = min(num_calls, max(1, -(-_ROTATED_BYTES // problem.weight_bytes)))
        make = self._blocks if problem.has_blocks else self._packed if problem.packed else self._rows
        weights = [make(problem) for _ in range(num_copies)]
        x, out = self._inputs(problem), self._random((t, o), out_dtype)
        bias = self._random((o,), out_dtype) if problem.has_bias else None
        scratch = self._scratch(problem)
        return TimedOperands([Operands(x, weight, out, bias, scratch) for weight in weights], num_calls)

    def _scratch(self, problem: GemmProblem) -> Any:
        if problem.packed:
            num_bytes = unpacked_bytes((problem.out_features, problem.in_features), _DTYPES[problem.dtype].itemsize)
            return self._cupy.empty(num_bytes, np.uint8)
        return self._cupy.empty(SUM_BYTES, np.uint8) if problem.has_scales else None

    def _packed(self, problem: GemmProblem) -> PackedWeight:
        """Codes of any bits, small positive scales, zero points of one."""
        rows, columns = problem.out_features, problem.in_features
        kind, group, has_zero = parse_layout(problem.packed)
        groups = -(-columns // group) if group else 1
        codes = self._random((rows, packed_row_bytes(columns, kind)), _CODE_DTYPES["int8"])
        scale = self._cupy.full((groups, rows), 1e-2, np.float32)
        zero = self._cupy.ones((groups, rows), np.int8) if has_zero else None
        return PackedWeight(codes, scale, zero, kind, columns, group)

    def _blocks(self, problem: GemmProblem) -> PackedWeight:
        rows, columns = problem.out_features, problem.in_features
        codes = self._random((rows, columns), _CODE_DTYPES["fp8"])
        scale = self._cupy.full((-(-columns // BLOCK), rows), 1e-2, np.float32)
        blocks = self._cupy.full(block_scale_shape(rows, columns), 1e-2, np.float32)
        return PackedWeight(codes, scale, None, "fp8", columns, BLOCK, blocks)

    def _rows(self, problem: GemmProblem) -> Any:
        return self._operand(problem, problem.out_features)

    def _inputs(self, problem: GemmProblem) -> Any:
        if not problem.has_blocks:
            return self._operand(problem, problem.num_tokens)
        t, i = problem.num_tokens, problem.in_features
        scale = self._cupy.full((-(-i // BLOCK), t), 1e-2, np.float32)
        return QuantizedGroups(self._random((t, i), _CODE_DTYPES["fp8"]), scale)

    def _operand(self, problem: GemmProblem, rows: int) -> Any:
        shape = (rows, problem.in_features)
        if problem.dtype not in ("fp8", "int8"):
            return self._random(shape, _DTYPES[problem.dtype])
        kind: CodeKind = "fp8" if problem.dtype == "fp8" else "int8"
        codes = self._random(shape, _CODE_DTYPES[kind])
        return QuantizedRows(codes, self._random((rows,), np.dtype(np.float32)), kind)

    def _random(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Normal values (zeros would run faster than any model), a few megabytes of them repeated."""
        cupy, num_bytes = self._cupy, int(np.prod(shape)) * dtype.itemsize
        if dtype.name not in self._noise:
            values = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
            # Codes fill their range: the largest of a million normal values is about 5.
            self._noise[dtype.name] = (_NOISE_SCALES.get(dtype.name, 0.02) * values).astype(dtype)
        noise = self._noise[dtype.name]
        memory = cupy.cuda.alloc(num_bytes)
        memory.copy_from_host(noise.ctypes.data, min(num_bytes, noise.nbytes))
        done = noise.nbytes
        while done < num_bytes:
            (memory + done).copy_from_device(memory, min(done, num_bytes - done))
            done *= 2
        return cupy.ndarray(shape, dtype=np.uint8 if dtype in _CODE_DTYPES.values() else dtype, memptr=memory)


def open_tuner() -> tuple[GemmTimings, GemmTuner]:
    """This device's timings and a tuner that adds to them.

    Raises ConfigError when cuBLASLt is missing.
    """
    gemm = open_gemm(KernelLibrary())
    return gemm.timings, GemmTuner(gemm, gemm.timings)
