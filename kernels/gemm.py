# SPDX-License-Identifier: Apache-2.0
"""Matrix products by whichever kernel was fastest for the shape: a cuBLASLt algorithm or one of our own."""

from __future__ import annotations

from dataclasses import replace

from phalanx.kernels.activation_names import ActivationName
from phalanx.kernels.arrays import Array, ceil_div
from phalanx.kernels.block_probe import multiplies_blocks
from phalanx.kernels.compiler import cache_directory
from phalanx.kernels.cublaslt import Algorithm, CublasLt, GemmProblem
from phalanx.kernels.gemm8_tiles import TILE_SHAPES, TileShape, gemm8_tiles, gemm8_tiles_takes, tiles_fill_device
from phalanx.kernels.gemm_operands import Inputs, Operands, Weight, problem_of
from phalanx.kernels.gemv import CODES_SHAPE, GEMV_SHAPES, GemvShape, fits_block, gated_gemv, gemv, gemv_takes
from phalanx.kernels.gemv8 import GEMV8_SHAPES, MAX_GEMV8_TOKENS, gemv8, gemv8_takes
from phalanx.kernels.library import Library
from phalanx.kernels.packed import (
    GEMV_PACKED_SHAPES,
    MAX_PACKED_TOKENS,
    PackedWeight,
    gemv_packed,
    layout_suits_gemv,
    unpack_weight,
)
from phalanx.kernels.product_sizes import (
    CODE_ALIGNMENT,
    SUM_BYTES,
    packed_row_bytes,
    padded_tokens,
    unpacked_bytes,
)
from phalanx.kernels.quantize import QuantizedRows
from phalanx.kernels.quantize_groups import QuantizedGroups
from phalanx.kernels.rows import add_bias
from phalanx.kernels.scale_sums import scale_sums
from phalanx.kernels.tuning import GemmChoice, GemmTimings, Kernel, timings_path
from phalanx.parallel.errors import ExecutorError

__all__ = ["MAX_GATED_TOKENS", "WORKSPACE_BYTES", "Gemm", "open_gemm"]

WORKSPACE_BYTES = 64 << 20
"""Device memory for cuBLASLt's split-k partial sums; more than its algorithms ask for at model shapes."""

MOST_BORROWED_TOKENS = 256
"""Up to here a problem that was not timed takes the timing of the next larger number of tokens."""


MAX_GATED_TOKENS = MAX_PACKED_TOKENS
"""Up to here a kernel may compute a product of values and the gated activation after it in one; products of codes have no such limit."""

_MOST_GUESSED_TOKENS = 8
_SCALES_ROWS, _FIRST_TO_SCALE_ROWS = "sm_90a", 12_09_00
"""Where, and since which version, cuBLASLt multiplies fp8 sums by scales of rows itself (OUTER_VEC_32F)."""


class Gemm:
    """Products of one device. Each call enqueues on the current stream and does not wait; safe under capture.

    Args:
        timings: what the tuner found on such a device.
        multiplies_blocks: what `block_probe` found on this one; without it products of fp8 blocks take values.
    """

    def __init__(
        self, library: Library, cublaslt: CublasLt, timings: GemmTimings, multiplies_blocks: bool = False
    ) -> None:
        self.cublaslt = cublaslt
        self.timings = timings
        self._library = library
        self._choices: dict[GemmProblem, GemmChoice] = {}
        self._takes_groups: dict[GemmProblem, bool] = {}
        self._suggestions: dict[GemmProblem, Algorithm] = {}
        self._scales_rows = library.architecture == _SCALES_ROWS and cublaslt.version >= _FIRST_TO_SCALE_ROWS
        self._multiplies_blocks = multiplies_blocks

    def __call__(
        self,
        x: Inputs,
        weight: Weight,
        out: Array,
        bias: Array | None = None,
        *,
        scratch: Array | None = None,
    ) -> None:
        """``out = x @ weight.T + bias``.

        x [T, I]; weight [O, I]; bias [O]; out [T, O], of the same dtype or float32. Codes are multiplied by their rows' scales.
        ``scratch``: see `Operands`.
        """
        operands = Operands(x, weight, out, bias, scratch)
        problem = problem_of(operands)
        self.run(problem, self.choice(problem), operands)

    def takes_groups(self, num_tokens: int, weight: PackedWeight, dtype: str, has_bias: bool) -> bool:
        """Whether the inputs ``[T, I]`` of a product of fp8 blocks are better given as `QuantizedGroups` than as their values in ``dtype``.

        cuBLASLt multiplies blocks on Hopper, from 12.9 on, and not in every shape. Where both products were timed, for so many tokens or else
        for the next larger number, the faster one is taken.
        """
        rows, columns = weight.shape
        if (
            not self._multiplies_blocks
            or weight.blocks is None
            or num_tokens <= MAX_PACKED_TOKENS
            or rows % CODE_ALIGNMENT
        ):
            return False
        values = GemmProblem(num_tokens, rows, columns, dtype, dtype, has_bias, weight.layout)
        if values not in self._takes_groups:
            self._takes_groups[values] = self._is_faster_as_codes(values, packed_row_bytes(columns, weight.kind))
        return self._takes_groups[values]

    def _is_faster_as_codes(self, values: GemmProblem, row_bytes: int) -> bool:
        """Whether blocks have an algorithm and take no longer than ``values``. Poses both problems, so that the tuner times them."""
        shape = padded_tokens(values.num_tokens), values.out_features, row_bytes
        blocks = GemmProblem(*shape, "fp8", values.dtype, has_blocks=True)
        try:
            self.choice(blocks)
        except ExecutorError:
            return False
        self.choice(values)
        for size in self.timings.sizes(values):
            of_values = self.timings.find(replace(values, num_tokens=size))
            of_codes = self.timings.find(replace(blocks, num_tokens=padded_tokens(size)))
            if of_values is not None and of_codes is not None:
                return of_codes.microseconds <= of_values.microseconds
        return True

    def gated(self, x: Array | QuantizedRows, weight: Weight, out: Array, activation: ActivationName) -> bool:
        """``out = f(x @ gate.T) * (x @ up.T)`` for weight = [gate; up], both rounded first, where the product's kernel does it.

        x [T, I]; weight [2F, I]; out [T, F]. False, and nothing done, where it does not.
        """
        if isinstance(weight, QuantizedRows):
            assert isinstance(x, QuantizedRows)
            return self._gated_codes(x, weight, out, activation)
        assert not isinstance(x, QuantizedRows)
        packed = weight.layout if isinstance(weight, PackedWeight) else ""
        out_features, in_features = weight.shape
        problem = GemmProblem(x.shape[0], out_features, in_features, x.dtype.name, out.dtype.name, packed=packed)
        shape = self.choice(problem).kernel
        if not isinstance(shape, GemvShape):
            return False
        if isinstance(weight, PackedWeight):
            gemv_packed(self._library, x, weight, out, gated=activation, shape=shape)
        else:
            gated_gemv(self._library, x, weight, out, activation, shape=shape)
        return True

    def _gated_codes(self, x: QuantizedRows, weight: QuantizedRows, out: Array, activation: ActivationName) -> bool:
        """By the tiles, where they are the fastest kernel of the product alone, too. After gemv8 the activation's own kernel makes codes at once."""
        out_features, in_features = weight.shape
        problem = GemmProblem(len(x), out_features, in_features, x.kind, out.dtype.name)
        shape = self.choice(problem).kernel
        if not isinstance(shape, TileShape) or not self._suits_tiles(problem, out.shape[1]):
            return False
        gemm8_tiles(self._library, x, weight, out, gated=activation, shape=shape)
        return True

    def choice(self, problem: GemmProblem) -> GemmChoice:
        """What the tuner found fastest for this problem or one much like it, else a good guess."""
        if problem not in self._choices:
            tuned = self.timings.find(problem) or self._neighbour(problem)
            self._choices[problem] = tuned or GemmChoice(self._guess(problem))
        return self._choices[problem]

    def _guess(self, problem: GemmProblem) -> Kernel:
        """For one token gemv, which on an H200 is up to 30 % faster and nowhere slower by more than 2 %.

        With scales for a few more tokens, where cuBLASLt's outer-vector kernels take twice the time of the weight's bytes; with packed
        weights, or a bias of fp8 codes, for as many as it takes. For int8 codes tiles where they fill the device, which are faster from there on.
        """
        most = MAX_PACKED_TOKENS if problem.packed else _MOST_GUESSED_TOKENS if problem.has_scales else 1
        if _suits_gemv(problem) and (problem.num_tokens <= most or (problem.dtype == "fp8" and problem.has_bias)):
            return CODES_SHAPE if problem.packed or problem.has_scales else GemvShape()
        fills = tiles_fill_device(self._library, problem.num_tokens, problem.out_features)
        if problem.dtype == "int8" and fills and self._suits_tiles(problem, problem.out_features):
            return TileShape()
        return self.algorithms(problem, 1)[0]

    def _neighbour(self, problem: GemmProblem) -> GemmChoice | None:
        """The choice for a few more tokens: up to 256 it is often better than cuBLASLt's guess, above that seldom."""
        choice = self.timings.find_above(problem, MOST_BORROWED_TOKENS)
        if choice is None or isinstance(choice.kernel, GemvShape):
            return choice
        if isinstance(choice.kernel, TileShape):
            return choice if self._suits_tiles(problem, problem.out_features) else None
        return choice if self.cublaslt.accepts(self._library_problem(problem), choice.kernel) else None

    @property
    def problems(self) -> list[GemmProblem]:
        """Every problem posed since the start or the last `refresh`."""
        return list(self._choices)

    def refresh(self) -> None:
        """Forget choices, so that new timings take effect."""
        self._choices.clear()
        self._takes_groups.clear()

    def run(self, problem: GemmProblem, choice: GemmChoice, operands: Operands) -> None:
        """Enqueue the product by a given kernel."""
        import cupy

        x, weight, bias = operands.x, operands.weight, operands.bias
        if isinstance(weight, QuantizedRows):
            self._run_scaled(problem, choice, weight, operands)
            return
        if isinstance(x, QuantizedGroups):
            self._run_blocks(problem, choice, x, operands)
            return
        assert not isinstance(x, QuantizedRows)
        if isinstance(choice.kernel, GemvShape):
            if isinstance(weight, PackedWeight):
                gemv_packed(self._library, x, weight, operands.out, bias=bias, shape=choice.kernel)
            else:
                gemv(self._library, x, weight, operands.out, bias=bias, shape=choice.kernel)
            return
        assert isinstance(choice.kernel, Algorithm), "tiles are of codes"
        values = self._unpacked(weight, x, operands.scratch) if isinstance(weight, PackedWeight) else weight
        self.cublaslt.run(
            self._library_problem(problem), choice.kernel, x.data.ptr, values.data.ptr, operands.out.data.ptr,
            0 if bias is None else bias.data.ptr, cupy.cuda.get_current_stream().ptr,
        )  # fmt: skip

    def _unpacked(self, weight: PackedWeight, x: Array, scratch: Array | None) -> Array:
        """The values of ``weight`` in ``scratch``, in the type of ``x``."""
        num_bytes = unpacked_bytes(weight.shape, x.dtype.itemsize)
        if scratch is None or scratch.size < num_bytes:
            raise ExecutorError(
                f"a product of {x.shape[0]} tokens by {weight.layout} codes needs {num_bytes} bytes of scratch"
            )
        values: Array = scratch[:num_bytes].view(x.dtype).reshape(weight.shape)
        unpack_weight(self._library, weight, values)
        return values

    def _run_scaled(self, problem: GemmProblem, choice: GemmChoice, weight: QuantizedRows, operands: Operands) -> None:
        x, bias = operands.x, operands.bias
        assert isinstance(x, QuantizedRows)
        if isinstance(choice.kernel, GemvShape):
            gemv8(self._library, x, weight, operands.out, bias=bias, shape=choice.kernel)
            return
        if isinstance(choice.kernel, TileShape):
            gemm8_tiles(self._library, x, weight, operands.out, bias=bias, shape=choice.kernel)
            return
        if self._makes_sums(problem):
            self._run_sums(problem, choice.kernel, x, weight, operands)
            return
        self._run_codes(problem, choice.kernel, x, weight.codes, weight.scale, operands)

    def _run_blocks(self, problem: GemmProblem, choice: GemmChoice, x: QuantizedGroups, operands: Operands) -> None:
        weight = operands.weight
        assert isinstance(weight, PackedWeight)
        assert weight.blocks is not None
        assert isinstance(choice.kernel, Algorithm), "no other kernel multiplies blocks"
        self._run_codes(problem, choice.kernel, x, weight.codes, weight.blocks, operands)

    def _run_codes(
        self, problem: GemmProblem, algorithm: Algorithm, x: QuantizedRows | QuantizedGroups, codes: Array, scale: Array,
        operands: Operands,
    ) -> None:  # fmt: skip
        """cuBLASLt's product of fp8 codes by the weight's ``codes`` and ``scale``, then the bias."""
        import cupy

        self.cublaslt.run(
            self._library_problem(problem), algorithm, x.codes.data.ptr, codes.data.ptr, operands.out.data.ptr, 0,
            cupy.cuda.get_current_stream().ptr, (x.scale.data.ptr, scale.data.ptr),
        )  # fmt: skip
        if operands.bias is not None:
            add_bias(self._library, operands.out, operands.bias)

    def _makes_sums(self, problem: GemmProblem) -> bool:
        """Whether cuBLASLt makes sums of codes, which a kernel of ours scales."""
        return problem.dtype == "int8" or (problem.dtype == "fp8" and not problem.has_blocks and not self._scales_rows)

    def _run_sums(
        self, problem: GemmProblem, algorithm: Algorithm, x: QuantizedRows, weight: QuantizedRows, operands: Operands
    ) -> None:
        """Sums of a slab of outputs, which stay in the second-level cache, then the scales. Those of int8 are exact."""
        import cupy

        slabs = sum_slabs(problem.num_tokens, problem.out_features)
        scratch, most = operands.scratch, 4 * problem.num_tokens * len(slabs[0])
        if scratch is None or scratch.size < most:
            raise ExecutorError(
                f"a product of {problem.num_tokens} tokens by {x.kind} codes needs {most} bytes of scratch"
            )
        for slab in slabs:
            part = self._library_problem(problem, len(slab))
            chosen = algorithm if len(slab) == len(slabs[0]) else self._suggestion(part)
            shape = (problem.num_tokens, len(slab))
            sums = scratch[: 4 * shape[0] * shape[1]].view(part.out_dtype).reshape(shape)
            self.cublaslt.run(
                part, chosen, x.codes.data.ptr, weight.codes[slab.start : slab.stop].data.ptr, sums.data.ptr, 0,
                cupy.cuda.get_current_stream().ptr,
            )  # fmt: skip
            scale_sums(self._library, sums, x.scale, weight.scale, operands.bias, operands.out, slab.start)

    def _suggestion(self, part: GemmProblem) -> Algorithm:
        """cuBLASLt's first suggestion for a slab that is shorter than the others; looked up once, not in each step and capture."""
        if part not in self._suggestions:
            self._suggestions[part] = self.cublaslt.algorithms(part, 1)[0]
        return self._suggestions[part]

    def candidates(self, problem: GemmProblem) -> list[Kernel]:
        """Everything worth timing: cuBLASLt's suggestions, best guess first, then what our own kernels offer."""
        gemv_shapes = _gemv_shapes(problem) if _suits_gemv(problem) else ()
        tile_shapes = TILE_SHAPES if self._suits_tiles(problem, problem.out_features) else ()
        return [*self.algorithms(problem, 16), *gemv_shapes, *tile_shapes]

    def _suits_tiles(self, problem: GemmProblem, out_columns: int) -> bool:
        takes = gemm8_tiles_takes(self._library.architecture, out_columns, problem.in_features)
        has_rows = problem.has_scales and not problem.has_blocks
        return takes and problem.has_narrow_results and has_rows and problem.num_tokens > MAX_GEMV8_TOKENS

    def algorithms(self, problem: GemmProblem, count: int) -> list[Algorithm]:
        """cuBLASLt's suggestions alone. Raises ExecutorError when there is none."""
        return self.cublaslt.algorithms(self._library_problem(problem), count)

    def _library_problem(self, problem: GemmProblem, outputs: int = 0) -> GemmProblem:
        """What cuBLASLt computes of it: plain values where the weight is packed, sums of (the first) outputs where it does not scale codes.

        To scaled codes it adds a bias in some shapes only (not in 257 x 96 x 14336), so that follows.
        """
        if self._makes_sums(problem):
            size = outputs or len(sum_slabs(problem.num_tokens, problem.out_features)[0])
            sums = "int32" if problem.dtype == "int8" else "float32"
            return replace(problem, out_features=size, out_dtype=sums, has_bias=False, has_sums=True)
        return replace(problem, packed="", has_bias=problem.has_bias and problem.dtype != "fp8")

    def close(self) -> None:
        """Give cuBLASLt's handles back. Nothing may be in flight."""
        self.cublaslt.close()


def sum_slabs(num_tokens: int, out_features: int) -> list[range]:
    """Outputs whose sums of codes are made at a time: as many as `SUM_BYTES` hold, evenly, in multiples of 16."""
    most = max(SUM_BYTES // (4 * num_tokens) // CODE_ALIGNMENT, 1) * CODE_ALIGNMENT
    count = ceil_div(out_features, most)
    size = ceil_div(ceil_div(out_features, count), CODE_ALIGNMENT) * CODE_ALIGNMENT
    return [range(start, min(start + size, out_features)) for start in range(0, out_features, size)]


def _suits_gemv(problem: GemmProblem) -> bool:
    is_narrow = problem.has_narrow_results
    if problem.has_blocks:
        return False
    if problem.has_scales:
        return gemv8_takes(problem.num_tokens, problem.in_features) and is_narrow
    if problem.packed:
        return layout_suits_gemv(problem.num_tokens, problem.in_features, problem.packed) and is_narrow
    takes = gemv_takes(problem.num_tokens, problem.in_features, problem.dtype)
    return takes and problem.out_dtype == problem.dtype


def _gemv_shapes(problem: GemmProblem) -> tuple[GemvShape, ...]:
    if not (problem.packed or problem.has_scales):
        return GEMV_SHAPES
    shapes = GEMV_PACKED_SHAPES if problem.packed else GEMV8_SHAPES
    return tuple(shape for shape in shapes if fits_block(shape, problem.num_tokens))


def open_gemm(library: Library, workspace: Array | None = None, *, has_blocks: bool = False) -> Gemm:
    """Products of the current device with the timings that are on disk for its kind.

    ``workspace``: flat uint8 device array; None allocates ``WORKSPACE_BYTES``. ``has_blocks``: there will be products of fp8 blocks, so
    find out whether cuBLASLt multiplies them (`block_probe`), which waits for the device. Raises ConfigError when cuBLASLt is missing.
    """
    import cupy

    runtime = cupy.cuda.runtime
    device_name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
    cublaslt = CublasLt(cupy.empty(WORKSPACE_BYTES, "uint8") if workspace is None else workspace)
    timings = GemmTimings(timings_path(cache_directory(), device_name, cublaslt.version))
    return Gemm(library, cublaslt, timings, has_blocks and multiplies_blocks(cublaslt))
