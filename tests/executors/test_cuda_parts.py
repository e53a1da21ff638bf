"""Parts of the CUDA executor that need no device: buckets, results, waiting, the activation pool."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.graph_capture import capture
from phalanx.parallel.errors import CommunicatorError
from phalanx.parallel.nccl_comm import SelfDeviceCommunicator, wait_for
from phalanx.runtime.executors.cuda.graphs import (
    DECODE_ROWS,
    MOST_GRAPHS,
    PREFILL_LOGIT_ROWS,
    PREFILL_ROWS,
    Buckets,
    GraphCache,
    StepKey,
)
from phalanx.runtime.executors.cuda.results import ResultLayout
from phalanx.runtime.executors.cuda.step_times import decoding_step, measured_sizes
from phalanx.runtime.step import BatchState
from phalanx.runtime.step.times import DeviceTimes
from tests.support.fake_cupy import install_fake_device


@pytest.mark.parametrize("limit", [1, 3, 8, 100, 1024, 8192])
@pytest.mark.parametrize(
    ("buckets", "padding"),
    [(DECODE_ROWS, 1 / 8), (PREFILL_ROWS, 1 / 8), (PREFILL_LOGIT_ROWS, 1 / 2)],
    ids=["decode", "prefill", "logits"],
)
def test_buckets_hold_every_count_with_little_padding(buckets: Buckets, padding: float, limit: int) -> None:
    sizes = buckets.sizes(limit)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == limit
    for count in range(1, limit + 1):
        size = buckets.size(count, limit)
        assert count <= size <= limit
        assert size in sizes
        assert size - count < max(buckets.step, count * padding)


def test_all_pairs_of_sizes_with_prompts_have_graphs_at_once() -> None:
    """With the defaults of the CUDA engine, 1,024 sequences and 2,048 tokens, and one kind of sampling."""
    pairs = {
        (rows, PREFILL_LOGIT_ROWS.size(count, min(1024, rows)))
        for rows in PREFILL_ROWS.sizes(2048)
        for count in range(1, min(1024, rows) + 1)
    }
    assert len(pairs) + len(PREFILL_ROWS.sizes(2048)) + 2 * len(DECODE_ROWS.sizes(1024)) < MOST_GRAPHS


@pytest.mark.parametrize("most", [1, 5, 100, 300, 1000, 1024])
def test_every_number_of_sequences_that_decode_has_the_graph_that_a_start_captured(most: int) -> None:
    captured = set(DECODE_ROWS.sizes(most))
    for count in range(1, most + 1):
        num_rows = DECODE_ROWS.size(count, most)
        assert num_rows in captured
        assert DECODE_ROWS.size(count, min(most, num_rows)) == num_rows


def test_steady_traffic_meets_few_pairs_of_sizes() -> None:
    """100 requests a second of varied lengths: each pair's first two steps run without a graph, and all streams wait for them."""
    random = np.random.default_rng(7)
    running, pairs = 0.0, set()
    for _ in range(20_000):  # steps of 5 ms
        prompts = np.clip(np.exp(random.normal(5.3, 1.0, random.poisson(0.5))), 1, 1900).astype(int)
        running += len(prompts) - random.binomial(int(running), 1 / 200)
        num_tokens, num_sampled = min(int(running) + int(prompts.sum()), 2048), int(running) + len(prompts)
        if len(prompts):
            rows = PREFILL_ROWS.size(num_tokens, 2048)
            pairs.add((rows, PREFILL_LOGIT_ROWS.size(min(num_sampled, rows), min(1024, rows))))
    assert len(pairs) < 150


def test_results_are_cut_without_their_padding_rows() -> None:
    layout = ResultLayout(num_rows=4, num_top=2)
    buffer = np.zeros(layout.num_words + 3, np.int32)
    views = layout.views(buffer)
    views.token_ids[:] = [7, 8, 9, -1]
    views.logprobs[:] = [-0.5, -1.5, -2.5, np.nan]
    views.top_ids[:] = np.arange(8).reshape(4, 2)
    views.top_logprobs[:] = -np.arange(8, dtype=np.float32).reshape(4, 2)
    result = layout.result(5, 3, buffer)
    buffer[:] = 0
    assert result.step_id == 5
    assert result.token_ids.tolist() == [7, 8, 9]
    assert result.logprobs.tolist() == [-0.5, -1.5, -2.5]
    assert result.top_ids.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert result.top_logprobs.tolist() == [[0, -1], [-2, -3], [-4, -5]]


def test_results_without_log_probabilities_are_tokens_only() -> None:
    layout = ResultLayout(num_rows=8)
    result = layout.result(0, 3, np.arange(8, dtype=np.int32))
    assert layout.num_words == 8
    assert result.token_ids.tolist() == [0, 1, 2]
    assert result.logprobs.size == result.top_ids.size == 0


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 8, 9, 48, 1000, 1024, 2048, 4096])
@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_measured_sizes_are_few_warm_and_hold_the_micro_batches_of_all(max_num_seqs: int, num_stages: int) -> None:
    sizes = measured_sizes(max_num_seqs, num_stages, num_stages + 1)
    assert sizes[0] == 1
    assert set(sizes) <= set(DECODE_ROWS.sizes(max_num_seqs)), "these have graphs"
    assert all(DECODE_ROWS.size(size, 10_000) == size for size in sizes), "a plan of that many has the same one"
    assert sizes[-1] >= -(-max_num_seqs // num_stages)
    assert {DECODE_ROWS.size(-(-max_num_seqs // count), max_num_seqs) for count in (num_stages, num_stages + 1)} <= set(
        sizes
    )
    assert len(sizes) <= 21


def test_decoding_step_samples_a_token_of_each_sequence_and_wants_nothing_else() -> None:
    plan = decoding_step(5)
    state = BatchState.empty(8, 2)
    state.apply(plan)
    assert (plan.num_seqs, plan.num_tokens, plan.num_decodes, plan.num_sampled) == (5, 5, 5, 5)
    assert state.logprob_shape(plan) == (0, 0)
    assert not state.sampling["temperature"].any()
    assert plan.positions.tolist() == [0] * 5


class FakeGraph:
    def __init__(self) -> None:
        self.launches = 0

    def launch(self, stream: Any) -> None:
        self.launches += 1


class CapturingStream:
    """Records captures; `program` of the test counts what runs."""

    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []

    def begin_capture(self, mode: int) -> None: ...

    def end_capture(self) -> FakeGraph:
        self.graphs.append(FakeGraph())
        return self.graphs[-1]


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CuPy over NumPy; graphs are captured as ever."""
    capture = GraphCache._capture
    install_fake_device(monkeypatch, tmp_path)
    monkeypatch.setattr(GraphCache, "_capture", capture)


def test_a_step_shape_runs_eagerly_twice_is_captured_after_the_second_and_replayed_then(fake_cupy: None) -> None:
    stream, runs = CapturingStream(), []
    cache: GraphCache[str] = GraphCache(stream)

    def program(key: StepKey) -> str:
        runs.append(key)
        return f"outputs of {key.num_rows}"

    key = StepKey(8, 8, has_prefill=False)
    assert [cache.run(key, program) for _ in range(4)] == ["outputs of 8"] * 4
    assert len(runs) == 3  # the third records
    assert [graph.launches for graph in stream.graphs] == [2]
    assert cache.num_captured == 1
    cache.run(StepKey(8, 8, has_prefill=True), program)
    assert len(runs) == 4


def test_a_step_that_a_start_prepares_is_captured_after_its_first_run(fake_cupy: None) -> None:
    stream, runs = CapturingStream(), []
    cache: GraphCache[int] = GraphCache(stream)

    def program(key: StepKey) -> int:
        runs.append(key)
        return len(runs)

    key = StepKey(8, 8, has_prefill=False, filters=True)
    assert cache.run(key, program, at_once=True) == 1
    assert (len(runs), cache.num_captured) == (2, 1)
    assert cache.run(key, program) == 2
    assert [graph.launches for graph in stream.graphs] == [1]


def test_no_reference_cycle_is_collected_during_a_capture(fake_cupy: None) -> None:
    """What an engine leaves behind unloads its modules then, which a thread that captures must not."""
    unloaded: list[bool] = []

    class Engine:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            unloaded.append(True)

    def program() -> bool:
        Engine()
        objects: list[list[int]] = [[] for _ in range(100_000)]  # a collection waits for 700 or 2,000
        return bool(unloaded) and bool(objects)

    assert program(), "such a program has its cycles collected"
    unloaded.clear()
    _, was_unloaded = capture(CapturingStream(), program)
    assert not was_unloaded
    assert gc.isenabled()


def test_collections_go_on_after_a_capture_that_failed(fake_cupy: None) -> None:
    stream = CapturingStream()
    with pytest.raises(ZeroDivisionError):
        capture(stream, lambda: 1 // 0)
    assert stream.graphs, "the capture was ended"
    assert gc.isenabled()


class PassedEvent:
    done = True

    def synchronize(self) -> None: ...


class StuckEvent:
    done = False


class Group(SelfDeviceCommunicator):
    size = 2

    def __init__(self, lost: bool) -> None:
        self.lost, self.aborted = lost, False

    def check(self) -> None:
        if self.lost:
            raise CommunicatorError("NCCL lost a peer of rank 0 of 2")

    def abort(self) -> None:
        self.aborted = True


def ticking(seconds: float) -> Any:
    """A clock that moves on by ``seconds`` whenever it is read."""
    state = {"now": 0.0}

    def clock() -> float:
        state["now"] += seconds
        return state["now"]

    return clock


def test_waiting_ends_when_the_device_has_passed() -> None:
    wait_for(PassedEvent(), [Group(lost=False)], 1.0)


@pytest.mark.parametrize("lost", [True, False])
def test_waiting_for_a_lost_or_stuck_peer_aborts_every_group(lost: bool) -> None:
    groups = [Group(lost), Group(lost=False)]
    aborted_before = []
    with pytest.raises(
        CommunicatorError, match="lost a peer" if lost else r"not finished a step for \d+ s \(limit 3\)"
    ):
        wait_for(
            StuckEvent(), groups, 3.0, lambda: aborted_before.extend(g.aborted for g in groups), clock=ticking(0.2)
        )
    assert [group.aborted for group in groups] == [True, True]
    assert aborted_before == [False, False], "graphs go first: NCCL's abort waits for them"


HANGING_ABORT = """
import ctypes
from phalanx.parallel import nccl_comm
from tests.executors.test_cuda_parts import Group, StuckEvent

class Hangs(Group):
    def abort(self):
        ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock, as NCCL's abort does

nccl_comm._ABORT_SECONDS = 0.5
nccl_comm.wait_for(StuckEvent(), [Hangs(lost=True)], 3.0)
"""


def test_a_process_whose_abort_hangs_says_why_and_ends() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGING_ABORT], capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 1
    assert "phalanx: NCCL lost a peer of rank 0 of 2; ending what is in flight" in ended.stderr
    assert "Timeout" in ended.stderr


def test_idle_fraction_is_the_share_between_steps() -> None:
    earlier = DeviceTimes(2.0, 5.0)
    assert DeviceTimes().idle_fraction == 0.0
    assert (earlier + DeviceTimes(busy_seconds=3.0, idle_seconds=1.0) - earlier).idle_fraction == 0.25


def test_activations_return_to_the_pool_and_each_step_starts_at_the_same_address(fake_cupy: None) -> None:
    from phalanx.kernels.arena import Arena
    from phalanx.runtime.executors.cuda.activations import ActivationPool

    pool = ActivationPool(Arena(1 << 16).scratch("activations", 1 << 15))
    addresses = []
    for _ in range(2):
        pool.reset()
        first = pool.array((16, 8), np.float32)
        second = pool.array((16, 8), np.float32)
        addresses.append((first.data.ptr, second.data.ptr))
        assert first.data.ptr != second.data.ptr
        released = first.data.ptr
        del first
        assert pool.array((8, 16), np.float32).data.ptr == released
    assert addresses[0] == addresses[1]


def test_the_cuda_engine_runs_more_sequences_at_once_unless_told_otherwise() -> None:
    from phalanx.runtime.config import GPU_MAX_NUM_SEQS, EngineConfig
    from phalanx.runtime.executors.registry import with_default_sizes

    assert EngineConfig(**with_default_sizes({"engine": "cuda"})).max_num_seqs == GPU_MAX_NUM_SEQS
    assert EngineConfig(**with_default_sizes({"engine": "cuda", "max_num_seqs": 3})).max_num_seqs == 3
    assert with_default_sizes({"engine": "numpy"})["max_num_seqs"] == EngineConfig().max_num_seqs
