"""Operations of each executor over one step, for tests that compare them with float64 formulas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.parallel.communicator import SelfCommunicator
from phalanx.parallel.nccl_comm import SelfDeviceCommunicator
from phalanx.parallel.sharding import Span
from phalanx.runtime.attention import AttentionSpec
from phalanx.runtime.executors.numpy.attention import NumpyAttention
from phalanx.runtime.executors.numpy.ops import NumpyOps, NumpyStep
from phalanx.runtime.executors.numpy.threads import Threads
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.ops import Ops
from phalanx.runtime.step import BatchState, StepPlan
from tests.support.fake_cupy import install_fake_device

__all__ = ["EXECUTORS", "Executor", "open_executor"]

Array = np.ndarray[Any, Any]
Compute = Callable[..., Any]
"""Called with the operations and the tensors; returns one tensor or several."""

BLOCK_SIZE, MOST_TOKENS, MOST_SEQS, BLOCKS_PER_SEQ = 16, 64, 4, 4
EXECUTORS = ("numpy", "cuda", "tensorrt")


class Executor(ABC):
    """One executor's operations on one rank, in float32."""

    @abstractmethod
    def run(
        self, compute: Compute, weights: Mapping[str, Array], tensors: Sequence[Array], poisons: bool = False,
        positions: Sequence[int] = (),
    ) -> list[Array]:  # fmt: skip
        """Results of ``compute(ops, *tensors)``; with ``poisons``, the tensors are NaN once it has returned.

        ``positions`` are those of the step's tokens, whose ids they are, too.
        """


class NumpyExecutor(Executor):
    """The reference."""

    def run(
        self, compute: Compute, weights: Mapping[str, Array], tensors: Sequence[Array], poisons: bool = False,
        positions: Sequence[int] = (),
    ) -> list[Array]:  # fmt: skip
        threads, ids = Threads(1), np.array(positions, np.int32)
        attention = NumpyAttention({}, 1, 1, 0, 1, 1, threads)
        ops = NumpyOps(Weights.dense(dict(weights)), Span(0, 1000, 1000), SelfCommunicator(), attention, threads)
        ops.bind(NumpyStep(ids, ids))
        own = [tensor.copy() for tensor in tensors]
        results = _listed(compute(ops, *own))
        _poison(own, results, poisons)
        return [np.array(result) for result in results]


class CudaExecutor(Executor):
    """CUDA's operations on a GPU if there is one, else on emulated kernels."""

    def __init__(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        from phalanx.kernels.device import gpu_is_available

        if not gpu_is_available():
            install_fake_device(patch, cache)
        import cupy

        from phalanx.runtime.executors.cuda import build

        self.cupy, self.library = cupy, build.KernelLibrary()
        self.gemm = build.open_gemm(self.library)

    def run(
        self, compute: Compute, weights: Mapping[str, Array], tensors: Sequence[Array], poisons: bool = False,
        positions: Sequence[int] = (),
    ) -> list[Array]:  # fmt: skip
        ops, arrays, _ = self.open(weights, {})
        ids = np.array(positions, np.int32)
        for array in (arrays.token_ids, arrays.positions):
            array[: len(ids)] = self.cupy.asarray(ids)
        ops.bind(len(positions) or len(tensors[0]), has_prefill=False, num_kept=0)
        rows = len(tensors[0]) if tensors else 1
        arrays.logit_rows[:rows] = self.cupy.asarray(np.arange(rows, dtype=np.int32))
        ops.bind_logits(range(rows))
        own = [self.cupy.asarray(tensor) for tensor in tensors]
        results = _listed(compute(ops, *own))
        host = [_host(result) for result in results]
        if poisons:
            for tensor in own:
                if not any(tensor.data.ptr == result.data.ptr for result in results):
                    tensor[...] = np.nan
            assert all(np.array_equal(_host(result), kept) for result, kept in zip(results, host, strict=True)), (
                "a result reads its argument later"
            )
        return host

    def open(self, weights: Mapping[str, Array], specs: Mapping[int, AttentionSpec]) -> tuple[Any, Any, Any]:
        """Operations, the step's arrays and the attention."""
        from phalanx.kernels.arena import Arena
        from phalanx.kernels.attention_shape import AttentionLimits
        from phalanx.kernels.step_update import StepArrays
        from phalanx.runtime.executors.cuda.activations import ActivationPool
        from phalanx.runtime.executors.cuda.attention import CacheLayout, CudaAttention
        from phalanx.runtime.executors.cuda.ops import CudaOps

        pool = ActivationPool(Arena(8 << 20).scratch("activations", 7 << 20))
        arrays = StepArrays.allocate(
            lambda _name, shape, dtype: self.cupy.zeros(shape, dtype), max_num_seqs=MOST_SEQS, max_num_tokens=MOST_TOKENS,
            max_logit_rows=MOST_TOKENS, max_blocks_per_seq=BLOCKS_PER_SEQ, max_plan_words=1024, admission_words=16,
            max_biases=4, block_size=BLOCK_SIZE,
        )  # fmt: skip
        layout = CacheLayout.of(specs, BLOCK_SIZE, "float32", 0, 1)
        limits = AttentionLimits(MOST_SEQS, MOST_TOKENS, BLOCK_SIZE * BLOCKS_PER_SEQ)
        attention = CudaAttention(self.library, layout, limits, arrays, pool)
        device_weights = Weights.dense({name: self.cupy.asarray(array) for name, array in weights.items()})
        group = SelfDeviceCommunicator()
        ops = CudaOps(100, self.library, self.gemm, device_weights, Span(0, 1000, 1000), group, arrays, pool, attention)
        return ops, arrays, attention


class TrtExecutor(Executor):
    """A network of the operations alone, interpreted."""

    def run(
        self, compute: Compute, weights: Mapping[str, Array], tensors: Sequence[Array], poisons: bool = False,
        positions: Sequence[int] = (),
    ) -> list[Array]:  # fmt: skip
        from phalanx.runtime.executors.tensorrt.graph import Graph
        from phalanx.runtime.executors.tensorrt.installed import load_tensorrt
        from phalanx.runtime.executors.tensorrt.ops import StepTensors, TrtOps
        from tests.tensorrt.interpreter import NetworkInterpreter

        library = load_tensorrt()
        builder = library.module.Builder(library.logger(lambda severity, message: None))
        graph, int32 = Graph(library, library.create_network(builder)), np.dtype(np.int32)
        names = ("token_ids", "positions")
        inputs = {name: graph.input(name, int32, (-1, -1)) for name in names}
        step = StepTensors(inputs["token_ids"], inputs["positions"], inputs["positions"], 64)
        ops = TrtOps(graph, Weights.dense(dict(weights)), np.dtype(np.float32), Span(0, 1000, 1000), {}, step, 0, 1)
        own = [
            graph.input(f"x{index}", np.dtype(np.float32), (-1, tensor.shape[1]))
            for index, tensor in enumerate(tensors)
        ]
        results = _listed(compute(ops, *own))
        for index, result in enumerate(results):
            graph.output(f"y{index}", result)
        ids = np.array(positions or range(len(tensors[0])), np.int32)[None]
        values = {f"x{index}": tensor for index, tensor in enumerate(tensors)}
        interpreter = NetworkInterpreter(library.module, graph.network, SelfCommunicator(), (graph, builder))
        outputs = interpreter.run({**dict.fromkeys(names, ids), **values})
        return [outputs[f"y{index}"] for index in range(len(results))]


def open_executor(name: str, patch: pytest.MonkeyPatch, cache: Path) -> Executor:
    """An executor by the name of its engine; skips the test if its library is missing."""
    if name == "tensorrt":
        pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
        return TrtExecutor()
    return CudaExecutor(patch, cache) if name == "cuda" else NumpyExecutor()


def _listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple) else [results]


def _host(array: Any) -> Array:
    return np.array(array.get() if hasattr(array, "get") else array)


def _poison(tensors: Sequence[Array], results: Sequence[Array], poisons: bool) -> None:
    for tensor in tensors if poisons else ():
        if not any(np.shares_memory(tensor, result) for result in results):
            tensor[...] = np.nan


def attend(
    executor: Executor, spec: AttentionSpec, weights: Mapping[str, Array], qkv: Sequence[Array], steps: Any,
    prefixes: Sequence[int] = (),
) -> list[Array]:  # fmt: skip
    """Outputs of sequences fed in ``steps`` of (sequence, tokens), those of one token first; ``prefixes``: lengths of theirs."""
    done, outputs = [0] * len(qkv), [[] for _ in qkv]  # type: ignore[var-annotated]
    tables = np.random.default_rng(0).permutation(MOST_SEQS * BLOCKS_PER_SEQ).reshape(MOST_SEQS, BLOCKS_PER_SEQ)
    match executor:
        case CudaExecutor():
            run = _cuda_steps(executor, spec, weights, tables, prefixes)
        case TrtExecutor():
            run = _trt_steps(spec, weights)
        case _:
            run = _numpy_steps(spec, weights, tables, prefixes)
    for step in steps:
        rows = np.concatenate([qkv[index][done[index] : done[index] + count] for index, count in step])
        result = run(rows, [(index, done[index], count) for index, count in step])
        ends = np.cumsum([count for _, count in step])[:-1]
        for (index, count), part in zip(step, np.split(result, ends), strict=True):
            outputs[index].append(part)
            done[index] += count
    return [np.concatenate(parts) for parts in outputs]


def _numpy_steps(
    spec: AttentionSpec, weights: Mapping[str, Array], tables: Array, prefixes: Sequence[int]
) -> Any:  # fmt: skip
    threads = Threads(1)
    attention = NumpyAttention({0: spec}, tables.size, BLOCK_SIZE, 0, 1, BLOCK_SIZE * BLOCKS_PER_SEQ, threads)
    ops = NumpyOps(Weights.dense(dict(weights)), Span(0, 0, 0), SelfCommunicator(), attention, threads)
    state = BatchState.empty(MOST_SEQS, BLOCKS_PER_SEQ)
    state.block_tables[0] = tables
    state.sampling["num_prefix"][: len(prefixes)] = prefixes

    def run(rows: Array, step: list[tuple[int, int, int]]) -> Array:
        columns = [np.array(column, np.int32) for column in zip(*step, strict=True)]
        plan = StepPlan.pack(0, *columns, np.zeros(len(rows), np.int32), rows=np.empty(0, np.int32))
        attention.bind(plan, state)
        return ops.attention(rows.copy(), "a", 0, spec)

    return run


def _cuda_steps(
    executor: CudaExecutor, spec: AttentionSpec, weights: Mapping[str, Array], tables: Array, prefixes: Sequence[int]
) -> Any:  # fmt: skip
    ops, arrays, attention = executor.open(weights, {0: spec})
    attention.allocate(tables.size)
    cupy: Ops[Any] | Any = executor.cupy
    arrays.block_tables[...] = cupy.asarray(tables.astype(np.int32))

    def put(array: Any, values: Any) -> None:
        values = np.array(values, np.int32)
        array[: len(values)] = cupy.asarray(values)

    def run(rows: Array, step: list[tuple[int, int, int]]) -> Array:
        counts = [count for _, _, count in step]
        positions = np.concatenate([np.arange(start, start + count) for _, start, count in step])
        owners = np.repeat([index for index, _, _ in step], counts)
        put(arrays.positions, positions)
        if prefixes:
            put(arrays.prefix_lens, np.array(prefixes)[owners])
        put(arrays.slot_mapping, tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
        put(arrays.cu_seqlens, [0, *np.cumsum(counts)])
        put(arrays.seq_lens, [start + count for _, start, count in step])
        put(arrays.seq_indices, [index for index, _, _ in step])
        put(arrays.num_seqs_and_decodes, [len(step), sum(count == 1 for count in counts)])
        ops.bind(len(rows), has_prefill=max(counts) > 1, num_kept=0)
        return _host(ops.attention(cupy.asarray(rows), "a", 0, spec))

    return run


def _trt_steps(spec: AttentionSpec, weights: Mapping[str, Array]) -> Any:
    """A network of attention alone, interpreted, with a slot for each sequence; the chunks of a step follow each other."""
    from phalanx.runtime.executors.tensorrt.graph import Graph
    from phalanx.runtime.executors.tensorrt.installed import load_tensorrt
    from phalanx.runtime.executors.tensorrt.ops import StepTensors, TrtOps
    from tests.tensorrt.interpreter import NetworkInterpreter

    library = load_tensorrt()
    builder = library.module.Builder(library.logger(lambda severity, message: None))
    graph, int32, float32 = Graph(library, library.create_network(builder)), np.dtype(np.int32), np.dtype(np.float32)
    length = BLOCK_SIZE * BLOCKS_PER_SEQ
    slots = (-1, spec.num_kv_heads, length, spec.head_dim)
    positions, write_indices = graph.input("positions", int32, (-1, -1)), graph.input("write_indices", int32, (-1,))
    cache = graph.input("keys", float32, slots), graph.input("values", float32, slots)
    qkv = graph.input("qkv", float32, (-1, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim))
    step = StepTensors(None, positions, write_indices, length)
    ops = TrtOps(graph, Weights.dense(dict(weights)), float32, Span(0, 0, 0), {0: cache}, step, 0, 1)
    graph.output("attended", ops.attention(qkv, "a", 0, spec))
    for name, tensor in zip(("keys.updated", "values.updated"), ops.updated_caches[0], strict=True):
        graph.output(name, tensor)
    interpreter = NetworkInterpreter(library.module, graph.network, SelfCommunicator(), (graph, builder))
    kept = [[np.zeros((1, *slots[1:]), np.float32)] * 2 for _ in range(MOST_SEQS)]

    def run(rows: Array, step: list[tuple[int, int, int]]) -> Array:
        outputs, first = [], 0
        for index, start, count in step:
            values = {
                "qkv": rows[first : first + count], "positions": np.arange(start, start + count, dtype=np.int32)[None],
                "write_indices": np.array([start], np.int32), "keys": kept[index][0], "values": kept[index][1],
            }  # fmt: skip
            results = interpreter.run(values)
            kept[index] = [results["keys.updated"], results["values.updated"]]
            outputs.append(results["attended"])
            first += count
        return np.concatenate(outputs)

    return run
