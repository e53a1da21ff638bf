# SPDX-License-Identifier: Apache-2.0
"""Matrix products by whichever kernel was fastest for the shape: a cuBLASLt algorithm or the weight-streaming gemv."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.kernels.arrays import Array, require
from phalanx.kernels.compiler import cache_directory
from phalanx.kernels.cublaslt import Algorithm, CublasLt, GemmProblem
from phalanx.kernels.gemv import GemvShape, gemv, gemv_takes
from phalanx.kernels.gemv8 import gemv8, gemv8_takes
from phalanx.kernels.library import Library
from phalanx.kernels.quantize import QuantizedRows, require_codes
from phalanx.kernels.rows import add_bias
from phalanx.kernels.tuning import GemmChoice, GemmTimings, timings_path
from phalanx.parallel.errors import ExecutorError

__all__ = ["WORKSPACE_BYTES", "Gemm", "Operands", "open_gemm", "problem_of"]

WORKSPACE_BYTES = 64 << 20
"""Device memory for cuBLASLt's split-k partial sums; more than its algorithms ask for at model shapes."""

MOST_BORROWED_TOKENS = 256
"""Up to here a problem that was not timed takes the timing of the next larger number of tokens."""


_MOST_GUESSED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Operands:
    """The arrays of one product: x [T, I], weight [O, I], out [T, O], bias [O] or None. Codes come on both sides or none."""

    x: Array | QuantizedRows
    weight: Array | QuantizedRows
    out: Array
    bias: Array | None = None


def problem_of(operands: Operands, has_gelu: bool = False, accumulate: bool = False) -> GemmProblem:
    """The problem that ``operands`` pose. Raises ExecutorError when their shapes or dtypes do not fit together."""
    x, weight, out, bias = operands.x, operands.weight, operands.out, operands.bias
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    if isinstance(weight, QuantizedRows):
        return _scaled_problem(operands, has_gelu or accumulate)
    assert not isinstance(x, QuantizedRows), "codes need a quantised weight"
    require("x", x, (num_tokens, in_features), weight)
    require("weight", weight, (out_features, in_features), weight)
    require("out", out, (num_tokens, out_features), out)
    if bias is not None:
        require("bias", bias, (out_features,), weight)
    names = (weight.dtype.name, out.dtype.name)
    return GemmProblem(num_tokens, out_features, in_features, *names, bias is not None, has_gelu, accumulate)


def _scaled_problem(operands: Operands, has_more: bool) -> GemmProblem:
    x, weight, out, bias = operands.x, operands.weight, operands.out, operands.bias
    assert isinstance(x, QuantizedRows), "a quantised weight needs codes"
    assert isinstance(weight, QuantizedRows)
    if x.kind != weight.kind or has_more:
        raise ExecutorError(f"a product of {x.kind} and {weight.kind} codes with epilogues is not available")
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    require_codes(x, (num_tokens, in_features))
    require_codes(weight, (out_features, in_features))
    require("out", out, (num_tokens, out_features), out)
    if bias is not None:
        require("bias", bias, (out_features,), out)
    return GemmProblem(num_tokens, out_features, in_features, x.kind, out.dtype.name, bias is not None)


class Gemm:
    """Products of one device. Each call enqueues on the current stream and does not wait; safe under capture."""

    def __init__(self, library: Library, cublaslt: CublasLt, timings: GemmTimings) -> None:
        """``timings``: what the tuner found on such a device."""
        self.cublaslt = cublaslt
        self.timings = timings
        self._library = library
        self._choices: dict[GemmProblem, GemmChoice] = {}

    def __call__(
        self,
        x: Array | QuantizedRows,
        weight: Array | QuantizedRows,
        out: Array,
        bias: Array | None = None,
        *,
        has_gelu: bool = False,
        accumulate: bool = False,
    ) -> None:
        """``out = f(x @ weight.T + bias)``, plus ``out`` with ``accumulate``; f is GELU's tanh form with ``has_gelu``.

        x [T, I]; weight [O, I]; bias [O]; out [T, O], of the same dtype or float32. Some of cuBLASLt's algorithms round
        the product to out's dtype before they add ``out``. Codes are multiplied by their rows' scales.
        """
        operands = Operands(x, weight, out, bias)
        problem = problem_of(operands, has_gelu, accumulate)
        if bias is not None and problem.has_scales and not _suits_gemv(problem):
            # cuBLASLt adds a bias to scaled codes for some shapes only (not for 257 x 96 x 14336).
            self(x, weight, out)
            add_bias(self._library, out, bias)
            return
        self.run(problem, self.choice(problem), operands)

    def choice(self, problem: GemmProblem) -> GemmChoice:
        """What the tuner found fastest for this problem or one much like it, else a good guess."""
        if problem not in self._choices:
            tuned = self.timings.find(problem) or self._neighbour(problem)
            self._choices[problem] = tuned or GemmChoice(self._guess(problem))
        return self._choices[problem]

    def _guess(self, problem: GemmProblem) -> Algorithm | GemvShape:
        """For one token gemv, which on an H200 is up to 30 % faster and nowhere slower by more than 2 %.

        With scales for a few more tokens, where cuBLASLt's outer-vector kernels take twice the time of the weight's bytes.
        """
        most = _MOST_GUESSED_TOKENS if problem.has_scales else 1
        if _suits_gemv(problem) and (problem.num_tokens <= most or _needs_gemv(problem)):
            return GemvShape()
        return self.cublaslt.algorithms(problem, 1)[0]

    def _neighbour(self, problem: GemmProblem) -> GemmChoice | None:
        """The choice for a few more tokens: up to 256 it is often better than cuBLASLt's guess, above that seldom."""
        choice = self.timings.find_above(problem, MOST_BORROWED_TOKENS)
        if choice is None or isinstance(choice.kernel, GemvShape):
            return choice
        return choice if self.cublaslt.accepts(problem, choice.kernel) else None

    @property
    def problems(self) -> list[GemmProblem]:
        """Every problem posed since the start or the last `refresh`."""
        return list(self._choices)

    def refresh(self) -> None:
        """Forget choices, so that new timings take effect."""
        self._choices.clear()

    def run(self, problem: GemmProblem, choice: GemmChoice, operands: Operands) -> None:
        """Enqueue the product by a given kernel."""
        import cupy

        x, weight = operands.x, operands.weight
        if isinstance(x, QuantizedRows) and isinstance(weight, QuantizedRows):
            self._run_scaled(problem, choice, x, weight, operands)
            return
        assert not isinstance(x, QuantizedRows)
        assert not isinstance(weight, QuantizedRows)
        if isinstance(choice.kernel, GemvShape):
            gemv(
                self._library, x, weight, operands.out,
                bias=operands.bias, accumulate=problem.accumulate, shape=choice.kernel,
            )  # fmt: skip
            return
        bias = operands.bias
        self.cublaslt.run(
            problem, choice.kernel, x.data.ptr, weight.data.ptr, operands.out.data.ptr,
            0 if bias is None else bias.data.ptr, cupy.cuda.get_current_stream().ptr,
        )  # fmt: skip

    def _run_scaled(
        self, problem: GemmProblem, choice: GemmChoice, x: QuantizedRows, weight: QuantizedRows, operands: Operands
    ) -> None:
        import cupy

        bias = operands.bias
        if isinstance(choice.kernel, GemvShape):
            gemv8(self._library, x, weight, operands.out, bias=bias, shape=choice.kernel)
            return
        self.cublaslt.run(
            problem, choice.kernel, x.codes.data.ptr, weight.codes.data.ptr, operands.out.data.ptr,
            0 if bias is None else bias.data.ptr, cupy.cuda.get_current_stream().ptr,
            (x.scale.data.ptr, weight.scale.data.ptr),
        )  # fmt: skip

    def candidates(self, problem: GemmProblem, gemv_shapes: tuple[GemvShape, ...]) -> list[Algorithm | GemvShape]:
        """Everything worth timing: cuBLASLt's suggestions, best guess first, then gemv's shapes where they apply."""
        algorithms: list[Algorithm | GemvShape] = []
        if not _needs_gemv(problem):
            algorithms += self.cublaslt.algorithms(problem, 16)
        if _suits_gemv(problem):
            algorithms += gemv_shapes
        return algorithms

    def close(self) -> None:
        """Give cuBLASLt's handles back. Nothing may be in flight."""
        self.cublaslt.close()


def _needs_gemv(problem: GemmProblem) -> bool:
    """Whether cuBLASLt may have no kernel: scaled codes with a bias."""
    return problem.has_scales and problem.has_bias


def _suits_gemv(problem: GemmProblem) -> bool:
    if problem.has_scales:
        return gemv8_takes(problem.num_tokens, problem.in_features) and problem.out_dtype in ("float16", "bfloat16")
    takes = gemv_takes(problem.num_tokens, problem.in_features, problem.dtype)
    return takes and problem.out_dtype == problem.dtype and not problem.has_gelu


def open_gemm(library: Library, workspace: Array | None = None) -> Gemm:
    """Products of the current device with the timings that are on disk for its kind.

    ``workspace``: flat uint8 device array; None allocates ``WORKSPACE_BYTES``. Raises ConfigError when cuBLASLt is missing.
    """
    import cupy

    runtime = cupy.cuda.runtime
    device_name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
    cublaslt = CublasLt(cupy.empty(WORKSPACE_BYTES, "uint8") if workspace is None else workspace)
    return Gemm(library, cublaslt, GemmTimings(timings_path(cache_directory(), device_name, cublaslt.version)))
