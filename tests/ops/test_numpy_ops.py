"""The NumPy operations against float64 formulas written here, on odd shapes, split over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.sharding import Shard, Span
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.alibi import alibi_slopes
from phalanx.runtime.config import ModelConfig, RopeConfig
from phalanx.runtime.executors.numpy.attention import NumpyAttention
from phalanx.runtime.executors.numpy.ops import NumpyOps, NumpyStep
from phalanx.runtime.executors.numpy.threads import Threads
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.ops import AttentionSpec
from phalanx.runtime.step import BatchState, StepPlan

ATOL = 2e-6
"""Relative to the largest magnitude: about 16 float32 roundings."""

NUM_ROWS = (1, 7, 37)
THREADS = Threads(2)


def close(actual: np.ndarray, expected: np.ndarray, factor: float = 1.0) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=factor * ATOL * max(1.0, np.abs(expected).max()))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def make_ops(
    weights: dict[str, np.ndarray], comm: Communicator | None = None, vocabulary: Span | None = None
) -> NumpyOps:
    attention = NumpyAttention({}, 1, 1, 0, 1, 1, THREADS)
    return NumpyOps(Weights.dense(weights), vocabulary or Span(0, 0, 0), comm or SelfCommunicator(), attention, THREADS)


def model_config(heads: int = 4, kv_heads: int = 2, head_dim: int = 6, rope: RopeConfig | None = None) -> ModelConfig:
    return ModelConfig("test", 11, 8, 1, heads, kv_heads, head_dim, 8, 64, 1e-5, "silu", rope, False)


@pytest.mark.parametrize("rows", NUM_ROWS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(rows: int, offset: float) -> None:
    x, weight = normal(rows, 13), normal(13)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-3) * (weight.astype(np.float64) + offset)
    close(make_ops({"n.weight": weight}).rms_norm(x, "n", 1e-3, offset), expected)


@pytest.mark.parametrize("rows", NUM_ROWS)
def test_layer_norm(rows: int) -> None:
    x, weight, bias = 3 + normal(rows, 13), normal(13), normal(13, seed=1)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-3) * weight + bias
    close(make_ops({"n.weight": weight, "n.bias": bias}).layer_norm(x, "n", 1e-3), expected, factor=4)


@pytest.mark.parametrize("rows", NUM_ROWS)
def test_linear_adds_its_bias(rows: int) -> None:
    x, weight, bias = normal(rows, 13), normal(17, 13), normal(17)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    close(make_ops({"l.weight": weight, "l.bias": bias}).column_linear(x, "l"), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_row_linear_sums_over_ranks_and_adds_bias_once(size: int) -> None:
    x, weight, bias = normal(5, 13), normal(17, 13), normal(17)

    def rank(comm: Communicator) -> np.ndarray:
        columns = slice(comm.rank * 13 // size, (comm.rank + 1) * 13 // size)
        local = {"l.weight": np.ascontiguousarray(weight[:, columns]), "l.bias": bias}
        return make_ops(local, comm).row_linear(np.ascontiguousarray(x[:, columns]), "l")

    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    for result in run_ranks(size, rank):
        close(result, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_embedding_takes_each_row_from_the_rank_that_holds_it(size: int) -> None:
    table, ids, shard = normal(101, 6), np.array([0, 100, 50, 31, 32, 33, 63, 64], np.int32), Shard(0, pad_to=16)

    def rank(comm: Communicator) -> np.ndarray:
        span = shard.span(101, comm.rank, size)
        local = np.zeros((span.size, 6), np.float32)
        local[: span.stop - span.start] = table[span.start : span.stop]
        ops = make_ops({"e.weight": local}, comm, span)
        ops.bind(NumpyStep(ids, ids))
        return ops.embedding("e", scale=2.5)

    for result in run_ranks(size, rank):
        close(result, table[ids].astype(np.float64) * 2.5)


def test_position_embedding() -> None:
    x, table, positions = normal(3, 6), normal(9, 6, seed=1), np.array([8, 0, 4], np.int32)
    ops = make_ops({"p.weight": table})
    ops.bind(NumpyStep(positions, positions))
    close(ops.position_embedding(x, "p"), x.astype(np.float64) + table[positions])


EXACT: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}


@pytest.mark.parametrize("kind", EXACT)
def test_activations_also_at_extremes(kind: str) -> None:
    x = np.concatenate((np.linspace(-12, 12, 1001), [-500.0, 500.0, -60.0, 0.0])).astype(np.float32)[None]
    expected = np.array([[EXACT[kind](float(value)) for value in x[0]]])
    close(make_ops({}).activation(x.copy(), kind), expected)  # type: ignore[arg-type]
    up = normal(1, x.shape[1])
    close(make_ops({}).gated_activation(np.concatenate((x, up), axis=1), kind), expected * up)  # type: ignore[arg-type]


class Sequences:
    """Sequences fed to `NumpyAttention` step by step over shuffled blocks, beside the plain float64 formula."""

    def __init__(
        self, config: ModelConfig, spec: AttentionSpec, lengths: list[int], block_size: int, max_len: int = 64
    ) -> None:
        self.config, self.spec, self.lengths, self.block_size = config, spec, lengths, block_size
        random = np.random.default_rng(0)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = [random.normal(size=(length, width)).astype(np.float32) for length in lengths]
        per_seq = -(-max_len // block_size)
        self.num_blocks = len(lengths) * per_seq
        self.state = BatchState.empty(len(lengths), per_seq)
        self.state.block_tables[0] = random.permutation(self.num_blocks).reshape(len(lengths), per_seq)

    def run(self, attention: NumpyAttention, chunks: list[list[tuple[int, int]]]) -> list[np.ndarray]:
        """``chunks``: steps of (sequence, tokens), one-token ones first. Returns each sequence's outputs."""
        done, outputs = [0] * len(self.lengths), [[] for _ in self.lengths]
        for step, chunk in enumerate(chunks):
            seq_indices, num_scheduled_tokens = (np.array(column, np.int32) for column in zip(*chunk, strict=True))
            starts = np.array([done[seq_index] for seq_index in seq_indices], np.int32)
            rows = [self.qkv[seq_index][done[seq_index] : done[seq_index] + count] for seq_index, count in chunk]
            plan = StepPlan.pack(
                step,
                seq_indices,
                starts,
                num_scheduled_tokens,
                np.zeros(sum(num_scheduled_tokens), np.int32),
                rows=np.empty(0, np.int32),
            )
            attention.bind(plan, self.state)
            result = attention(np.concatenate(rows), 0, self.spec)
            for (seq_index, count), part in zip(
                chunk, np.split(result, np.cumsum(num_scheduled_tokens)[:-1]), strict=True
            ):
                outputs[seq_index].append(part)
                done[seq_index] += count
        return [np.concatenate(parts) for parts in outputs]

    def expected(self, index: int) -> np.ndarray:
        heads, kv_heads, dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        packed = self.qkv[index].astype(np.float64).reshape(-1, heads + 2 * kv_heads, dim)
        q, k, v = np.split(packed, [heads, heads + kv_heads], axis=1)
        length = len(q)
        if self.spec.rope is not None:
            q, k = (self.rotated(x, self.spec.rope) for x in (q, k))
        out = np.empty((length, heads, dim))
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, group].T * self.spec.scale
            if self.spec.soft_cap:
                scores = self.spec.soft_cap * np.tanh(scores / self.spec.soft_cap)
            distance = np.arange(length)[:, None] - np.arange(length)[None]
            if self.spec.alibi_slopes:
                scores = scores - self.spec.alibi_slopes[head] * distance
            hidden = (distance < 0) | ((distance >= self.spec.window) if self.spec.window else False)
            scores = np.where(hidden, -np.inf, scores)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, group]
        return out.reshape(length, heads * dim)

    @staticmethod
    def rotated(x: np.ndarray, rope: RopeConfig) -> np.ndarray:
        """As complex numbers: pair (i, i + half) turns by position x theta^(-2 i / rotary_dim)."""
        half = rope.rotary_dim // 2
        turns = np.outer(np.arange(len(x)), rope.theta ** (-np.arange(half) * 2 / rope.rotary_dim))
        pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * turns)[:, None]
        return np.concatenate((pairs.real, pairs.imag, x[..., 2 * half :]), axis=-1)


SPECS = {
    "plain": {},
    "rope": {"rope": RopeConfig(theta=100.0, rotary_dim=6)},
    "partial rope": {"rope": RopeConfig(theta=100.0, rotary_dim=4)},
    "window": {"window": 5},
    "soft cap": {"soft_cap": 1.5},
    "alibi": {"alibi_slopes": alibi_slopes},
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_attention_in_mixed_chunks_equals_the_formula(name: str, heads: int, kv_heads: int, block_size: int) -> None:
    fields = dict(SPECS[name])
    if "alibi_slopes" in fields:
        fields["alibi_slopes"] = alibi_slopes(heads)
    config = model_config(heads, kv_heads, rope=fields.get("rope"))
    spec = AttentionSpec(heads, kv_heads, 6, 6**-0.5, **fields)
    sequences = Sequences(config, spec, [17, 16, 1, 23], block_size)
    attention = NumpyAttention({0: spec}, sequences.num_blocks, block_size, 0, 1, 64, THREADS)
    outputs = sequences.run(
        attention,
        [[(2, 1), (0, 5), (1, 16)], [(0, 1), (3, 20)], [(0, 11)], [(3, 1)], [(3, 2)]],
    )
    for index, output in enumerate(outputs):
        close(output, sequences.expected(index), factor=4)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_many_decodes_at_once_equal_the_formula(kv_heads: int) -> None:
    """From MIN_GATHERED_DECODES sequences on another path computes them."""
    config, spec = model_config(4, kv_heads), AttentionSpec(4, kv_heads, 6, 6**-0.5)
    lengths = [1 + (7 * index) % 40 for index in range(24)]
    sequences = Sequences(config, spec, lengths, 4)
    attention = NumpyAttention({0: spec}, sequences.num_blocks, 4, 0, 1, 64, THREADS)
    prefills = [[(index, length - 1) for index, length in enumerate(lengths) if length > 1]]
    prefills[0].sort(key=lambda chunk: chunk[1] > 1)
    outputs = sequences.run(attention, [*prefills, [(index, 1) for index in range(24)]])
    for index, output in enumerate(outputs):
        close(output, sequences.expected(index), factor=4)


def test_a_poisoned_sequence_does_not_reach_others_through_padding() -> None:
    config, spec = model_config(2, 2), AttentionSpec(2, 2, 6, 6**-0.5)
    sequences = Sequences(config, spec, [2 + index % 7 for index in range(20)], 4)
    sequences.qkv[0][:] = np.nan
    attention = NumpyAttention({0: spec}, sequences.num_blocks, 4, 0, 1, 64, THREADS)
    steps = [
        sorted(((i, n - 1) for i, n in enumerate(sequences.lengths)), key=lambda c: c[1] > 1),
        [(i, 1) for i in range(20)],
    ]
    outputs = sequences.run(attention, steps)
    assert np.isnan(outputs[0]).all()
    for index in range(1, 20):
        close(outputs[index], sequences.expected(index), factor=4)


@pytest.mark.parametrize("window", [0, 150])
def test_long_prompts_are_cut_into_tiles_that_see_all_their_history(window: int) -> None:
    config, spec = model_config(2, 1), AttentionSpec(2, 1, 6, 6**-0.5, window=window)
    sequences = Sequences(config, spec, [300, 129], 16, max_len=304)
    attention = NumpyAttention({0: spec}, sequences.num_blocks, 16, 0, 1, 304, THREADS)
    outputs = sequences.run(attention, [[(0, 17), (1, 129)], [(0, 283)]])
    for index, output in enumerate(outputs):
        close(output, sequences.expected(index), factor=4)
