"""Step plans as passes through an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.tensorrt.engine_session import PassOutput, Wanted
from phalanx.runtime.executors.tensorrt.executor import TrtExecutor
from phalanx.runtime.executors.tensorrt.network import DECODE_PROFILE, PREFILL_PROFILE, NetworkShape
from phalanx.runtime.executors.tensorrt.passes import EnginePass, StepTranslator, slot_buckets
from phalanx.runtime.step import ADMISSION, RowKind, StepPlan, StepResult

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint

SHAPE = NetworkShape("float32", max_num_seqs=6, max_model_len=64, max_prefill_tokens=8)


def _plan(
    rows: list[tuple[int, int, int, int]], scored: list[int] | None = None, step_id: int = 0, vocab_size: int = 97,
    num_logprobs: int = 2, temperature: float | None = None,
) -> StepPlan:  # fmt: skip
    """A plan of (seq_index, start, count, samples), all of them admitted in step 0, with random tokens and targets.

    Without ``temperature`` sequences with odd numbers are greedy, the others sample.
    """
    seq_indices, starts, num_scheduled_tokens, samples = np.array(rows, np.int32).T
    random = np.random.default_rng(step_id)
    token_ids = random.integers(0, vocab_size, int(num_scheduled_tokens.sum())).astype(np.int32)
    sampled = num_scheduled_tokens.cumsum(dtype=np.int32)[samples > 0] - np.int32(1)
    all_rows = np.concatenate((sampled, np.array(scored or [], np.int32)))
    kinds = np.repeat(np.array([RowKind.SAMPLE, RowKind.SCORE], np.int32), (len(sampled), len(all_rows) - len(sampled)))
    targets = np.where(kinds == RowKind.SCORE, random.integers(0, vocab_size, len(kinds)), -1).astype(np.int32)
    zeros, admissions = np.zeros_like(seq_indices), np.zeros(len(seq_indices), ADMISSION)
    admissions["seq_index"] = admissions["seed"] = seq_indices
    admissions["num_logprobs"] = num_logprobs
    admissions["temperature"] = np.where(seq_indices % 2, 0.0, 0.8) if temperature is None else temperature
    new_blocks = np.stack((zeros, seq_indices, zeros, seq_indices), axis=1)
    num_new = len(rows) if step_id == 0 else 0
    return StepPlan.pack(
        step_id, seq_indices, starts, num_scheduled_tokens, token_ids, all_rows, kinds, targets,
        new_blocks=new_blocks[:num_new], admissions=admissions[:num_new], num_alternatives=3,
    )  # fmt: skip


def _passes(translator: StepTranslator, plan: StepPlan) -> list[EnginePass]:
    return list(translator.passes(plan))


class KnownLogits:
    """A session whose logits say which of the engine's rows they are."""

    device = "nothing"

    def run(self, engine_pass: EnginePass, wanted: Wanted) -> PassOutput:
        tokens = engine_pass.token_ids.reshape(-1)[engine_pass.logit_rows[: len(engine_pass.rows)]]
        logits = tokens[:, None] + np.linspace(0, 0.5, 97, dtype=np.float32)
        return PassOutput(np.zeros(len(tokens), np.int32), logits if wanted == "logits" else None)

    def close(self) -> None:
        """Nothing to release."""


def test_logits_of_rows_that_score_are_shown_with_their_sequence_and_position() -> None:
    executor = TrtExecutor(KnownLogits(), SHAPE, Topology(Layout()), SelfCommunicator())
    shown: list[tuple[int, int, int, float]] = []

    def reader(seeds: Any, positions: Any, first_token: int, logits: Any) -> None:
        assert logits.shape == (len(seeds), 97)
        shown.extend(
            zip(seeds.tolist(), positions.tolist(), [first_token] * len(seeds), logits[:, 0].tolist(), strict=True)
        )

    plan = _plan([(3, 0, 1, 1), (1, 0, 9, 0), (4, 0, 3, 1)], scored=[2, 3, 9, 10])
    executor.execute(plan)
    executor.logits_reader = reader
    executor.execute(_plan([(3, 1, 1, 1), (1, 9, 9, 0), (4, 3, 3, 1)], scored=[2, 3, 9, 10], step_id=1))
    token_ids = np.random.default_rng(1).integers(0, 97, 13)
    places = [(1, 10, 2), (1, 11, 3), (1, 17, 9), (4, 3, 10)]
    assert sorted(shown) == [(seed, position, 0, float(token_ids[row])) for seed, position, row in places]


def test_decoding_takes_slots_from_the_first_and_rounds_up() -> None:
    assert slot_buckets(6) == [1, 2, 4, 6]
    assert slot_buckets(1) == [1]
    assert slot_buckets(8) == [1, 2, 4, 8]
    translator = StepTranslator(SHAPE)
    (decode,) = _passes(translator, _plan([(2, 5, 1, 1), (1, 9, 1, 1)]))
    assert (decode.profile, decode.first_slot, decode.token_ids.shape) == (DECODE_PROFILE, 0, (4, 1))
    assert decode.logit_rows.tolist()[:2] == [2, 1]
    assert sorted(decode.logit_rows.tolist()) == [0, 1, 2, 3]
    assert decode.rows.tolist() == [0, 1]


def test_idle_slots_compute_where_their_next_token_will_be_written() -> None:
    translator = StepTranslator(SHAPE)
    _passes(translator, _plan([(0, 0, 7, 1), (1, 0, 3, 0)]))
    (decode,) = _passes(translator, _plan([(2, 0, 1, 1)]))
    assert decode.write_indices.tolist() == [7, 3, 0, 0]
    assert decode.positions[:, 0].tolist() == [7, 3, 0, 0]


def test_idle_slot_that_is_full_stays_inside_its_memory() -> None:
    translator = StepTranslator(SHAPE)
    _passes(translator, _plan([(0, 60, 4, 1)]))
    (decode,) = _passes(translator, _plan([(1, 0, 1, 1)]))
    assert decode.write_indices.tolist() == [63, 0]


def test_prompt_chunks_are_bound_to_their_slot_and_cut_to_the_profile() -> None:
    plan = _plan([(3, 10, 19, 1)])
    passes = _passes(StepTranslator(SHAPE), plan)
    assert [one.token_ids.shape for one in passes] == [(1, 8), (1, 8), (1, 3)]
    assert [one.first_slot for one in passes] == [3, 3, 3]
    assert [one.write_indices.tolist() for one in passes] == [[10], [18], [26]]
    assert np.concatenate([one.token_ids[0] for one in passes]).tolist() == plan.token_ids.tolist()
    assert np.concatenate([one.positions[0] for one in passes]).tolist() == list(range(10, 29))
    assert [one.rows.tolist() for one in passes] == [[], [], [0]]
    assert [one.logit_rows.tolist() for one in passes] == [[0], [0], [2]]


def test_no_pass_asks_for_more_logits_than_fit() -> None:
    shape = NetworkShape("float32", 2, 2048, 1024)
    assert shape.max_prefill_logit_rows == 256
    passes = _passes(StepTranslator(shape), _plan([(0, 0, 1000, 1)], list(range(999))))
    assert max(len(one.logit_rows) for one in passes) <= 256
    assert sorted(np.concatenate([one.rows for one in passes]).tolist()) == list(range(1000))
    assert passes[-1].rows.tolist()[0] == 0, "rows that sample come first"


def test_prompts_of_one_token_decode_unless_their_log_probabilities_are_asked_for() -> None:
    rows = [(0, 3, 1, 1), (1, 0, 1, 1), (2, 0, 4, 1)]
    assert [one.profile for one in _passes(StepTranslator(SHAPE), _plan(rows))] == [DECODE_PROFILE, PREFILL_PROFILE]
    scored = _passes(StepTranslator(SHAPE), _plan(rows, [1, 3]))
    assert [one.profile for one in scored] == [DECODE_PROFILE, PREFILL_PROFILE, PREFILL_PROFILE]
    assert [one.rows.tolist() for one in scored] == [[0], [1, 3], [2, 4]]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=["one-rank", "tp2pp2"])
def test_results_are_the_numpy_executors(layout: Layout, tmp_path: Path) -> None:
    """Sampled tokens, log-probabilities and prompt log-probabilities, over mixed steps."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    from .networks import interpreted_executor
    from .steps import reference_executor, run

    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    steps = [
        _plan([(5, 0, 1, 1), (1, 0, 19, 0), (4, 0, 6, 1)], [1, 2, 9, 20, 23]),
        _plan([(5, 1, 1, 1), (4, 6, 1, 1), (1, 19, 11, 1)], step_id=1),
        _plan([(4, 7, 1, 1), (1, 30, 1, 1), (5, 2, 1, 1)], step_id=2),
        _plan([(1, 31, 1, 1), (5, 3, 3, 0)], step_id=3),
    ]

    def body(comm: Communicator) -> list[StepResult]:
        topology = Topology(layout, comm.rank)
        executor, _ = interpreted_executor(path, topology, SHAPE, comm)
        assert (executor.cache.num_blocks, executor.depth, executor.lookahead) == (6, layout.pp, 0)
        results = run(executor, steps, topology.is_leader)
        executor.close()
        return results

    expected = run(reference_executor(path, SHAPE), steps)
    found = run_ranks(layout.world_size, body)[0] if layout.world_size > 1 else body(SelfCommunicator())
    assert len(found[0].logprobs) == 2 + 5
    for one, other in zip(found, expected, strict=True):
        assert one.step_id == other.step_id
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.top_ids.tolist() == other.top_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
        np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, atol=2e-5)


def _one_rank(path: Path, steps: list[StepPlan]) -> tuple[list[StepResult], list[str]]:
    from .networks import interpreted_executor
    from .steps import run

    executor, session = interpreted_executor(path, Topology(Layout()), SHAPE, SelfCommunicator())
    return run(executor, steps), list(session.wanted)


def test_only_what_a_pass_needs_leaves_the_device(tmp_path: Path) -> None:
    """Greedy decoding takes tokens, sampling logits, and the middle of a prompt nothing."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    rows = [(0, 0, 1, 1), (1, 0, 19, 1)]
    assert _one_rank(path, [_plan(rows, num_logprobs=-1, temperature=0.0)])[1] == [
        "tokens",
        "nothing",
        "nothing",
        "tokens",
    ]
    assert _one_rank(path, [_plan(rows, num_logprobs=-1, temperature=0.5)])[1] == [
        "logits",
        "nothing",
        "nothing",
        "logits",
    ]
    assert _one_rank(path, [_plan(rows, [3])])[1] == ["logits", "logits", "nothing", "logits"]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_told(temperature: float, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    from safetensors.numpy import load_file, save_file

    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("ln_f.bias"))
    tensors[name][3] = np.nan
    save_file(tensors, path / "model.safetensors")
    results, _ = _one_rank(path, [_plan([(0, 0, 1, 1), (1, 0, 4, 1)], num_logprobs=-1, temperature=temperature)])
    assert results[0].token_ids.tolist() == [-1, -1]
