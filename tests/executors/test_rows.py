"""What a plan's rows and block copies ask of an executor: NumPy, and CUDA with its kernels emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.errors import ExecutorError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout
from phalanx.runtime.config import EngineConfig
from phalanx.runtime.executors.base import Executor
from phalanx.runtime.executors.cuda.results import ResultLayout
from phalanx.runtime.replica import build_replica
from phalanx.runtime.request import Request, SamplingParams
from phalanx.runtime.step import RowKind, StepPlan, StepResult
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.fake_cupy import install_fake_device
from tests.support.records import admission

CASE = CheckpointCase("gpt2-heads-of-8", {**CASES_BY_NAME["gpt2-plain"].config, "n_head": 6})
BLOCK_SIZE = 16
PROMPT = np.random.default_rng(3).integers(0, 90, 21).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("rows") / "model")


@pytest.fixture(params=["numpy", "cuda"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    return str(request.param)


@contextmanager
def executor_of(
    checkpoint: Path, engine: str, comm: Communicator | None = None, layout: Layout | None = None
) -> Iterator[Executor]:
    options = EngineConfig(
        layout=layout or Layout(), engine=engine, block_size=BLOCK_SIZE, max_num_seqs=4, max_num_batched_tokens=32,
        num_kv_blocks=12,
    )  # fmt: skip
    replica = build_replica(checkpoint, options, comm or SelfCommunicator())
    yield replica.executor
    replica.executor.close()


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def prefill(*rows: int, kinds: RowKind = RowKind.SAMPLE, num_logprobs: int = 2) -> StepPlan:
    """Sequence 0 computes `PROMPT` into blocks 5 and 3; random targets where a row is scored."""
    targets = np.random.default_rng(4).integers(0, 90, len(rows)).astype(np.int32)
    return StepPlan.pack(
        0, int32(0), int32(0), int32(len(PROMPT)), PROMPT, int32(*rows), np.full(len(rows), kinds, np.int32), targets,
        new_blocks=int32(0, 0, 0, 5, 0, 0, 1, 3).reshape(-1, 4),
        admissions=admission(num_logprobs=num_logprobs), num_alternatives=2,
    )  # fmt: skip


def run(executor: Executor, plan: StepPlan) -> StepResult:
    executor.execute(plan)
    return executor.collect()


def test_every_row_of_a_sequence_may_sample(checkpoint: Path, engine: str) -> None:
    rows = (2, 7, 20)
    with executor_of(checkpoint, engine) as executor:
        together = run(executor, prefill(*rows))
        alone = [run(executor, prefill(row)) for row in rows]
    assert together.token_ids.tolist() == [result.token_ids[0] for result in alone]
    np.testing.assert_allclose(together.logprobs, [result.logprobs[0] for result in alone], atol=1e-4)
    assert together.top_ids.tolist() == [result.top_ids[0].tolist() for result in alone]
    assert together.top_ids[:, 0].tolist() == together.token_ids.tolist(), "greedy"


def test_more_rows_than_sequences_fit_sample_at_once(checkpoint: Path, engine: str) -> None:
    with executor_of(checkpoint, engine) as executor:
        sampled = run(executor, prefill(*range(21)))
        scored = run(executor, prefill(*range(21), kinds=RowKind.SCORE))
    assert sampled.token_ids.tolist() == scored.top_ids[:, 0].tolist()
    assert scored.token_ids.tolist() == prefill(*range(21)).targets.tolist()


def test_a_copied_block_holds_what_its_source_held(checkpoint: Path, engine: str) -> None:
    """Sequence 1 shares the full block of sequence 0 and goes on in a copy of the other; both then go different ways."""
    with executor_of(checkpoint, engine) as executor:
        run(executor, prefill(20))
        fork = StepPlan.pack(
            1, int32(0, 1), int32(21, 21), int32(1, 1), int32(11, 12), int32(0, 1),
            new_blocks=int32(0, 1, 0, 5, 0, 1, 1, 7).reshape(-1, 4), copies=int32(0, 3, 7).reshape(-1, 3),
            admissions=admission(seq_index=1, num_logprobs=2),
        )  # fmt: skip
        forked = run(executor, fork)
        expected = []
        for token in (11, 12):
            run(executor, prefill(20))
            expected.append(run(executor, StepPlan.pack(1, int32(0), int32(21), int32(1), int32(token), int32(0))))
    assert forked.token_ids.tolist() == [result.token_ids[0] for result in expected]
    np.testing.assert_allclose(forked.logprobs, [result.logprobs[0] for result in expected], atol=1e-4)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=["one-rank", "tp2pp2"])
def test_hidden_states_are_what_the_output_projection_takes(checkpoint: Path, engine: str, layout: Layout) -> None:
    def results(comm: Communicator) -> list[StepResult]:
        with executor_of(checkpoint, engine, comm, layout) as executor:
            found = []
            for kinds in (RowKind.HIDDEN, RowKind.SCORE):
                executor.execute(prefill(0, 20, kinds=kinds))
                if comm.rank == 0:
                    found.append(executor.collect())
            return found

    hidden, scored = run_ranks(layout.world_size, results)[0]
    assert len(hidden.token_ids) == len(hidden.logprobs) == 0
    embedding = load_file(checkpoint / "model.safetensors")["transformer.wte.weight"].astype(np.float64)
    logits = hidden.hidden.astype(np.float64) @ embedding.T
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs[[0, 1], scored.token_ids], scored.logprobs, atol=1e-4)


def test_rows_of_all_kinds_in_one_step(checkpoint: Path, engine: str) -> None:
    kinds = int32(RowKind.SAMPLE, RowKind.SCORE, RowKind.SCORE, RowKind.HIDDEN)
    with executor_of(checkpoint, engine) as executor:
        sampled, hidden = run(executor, prefill(20)), run(executor, prefill(20, kinds=RowKind.HIDDEN))
        mixed = run(executor, change(rows=int32(20, 3, 5, 20), kinds=kinds, targets=int32(-1, 7, 8, -1))(prefill(20)))
    assert mixed.token_ids.tolist() == [sampled.token_ids[0], 7, 8]
    np.testing.assert_allclose(mixed.hidden, hidden.hidden, atol=1e-4)


def change(**changes: object) -> Callable[[StepPlan], StepPlan]:
    """The same step with other numbers."""
    names = ("seq_indices", "starts", "num_scheduled_tokens", "token_ids", "rows", "kinds", "targets")
    return lambda plan: StepPlan.pack(0, **{**{name: getattr(plan, name) for name in names}, **changes})  # type: ignore[arg-type]


def test_another_pass_is_refused(checkpoint: Path, engine: str) -> None:
    with executor_of(checkpoint, engine) as executor, pytest.raises(ExecutorError, match="step 0 is of pass 1"):
        executor.execute(change(pass_id=1)(prefill(20)))


def test_more_hidden_states_than_fit_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    monkeypatch.setattr(ResultLayout, "most_words", staticmethod(lambda max_rows: max_rows))
    with (
        executor_of(checkpoint, "cuda") as executor,
        pytest.raises(ExecutorError, match="asks for 3 hidden states of 48"),
    ):
        executor.execute(prefill(1, 2, 20, kinds=RowKind.HIDDEN))


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_answers_to_one_prompt_are_those_that_each_would_get_alone(
    checkpoint: Path, engine: str, max_tokens: int
) -> None:
    """The prompt is computed once; the tokens are those of requests that share nothing."""
    options = EngineConfig(
        engine=engine, block_size=BLOCK_SIZE, max_num_seqs=4, max_num_batched_tokens=32, num_kv_blocks=16
    )
    replica = build_replica(checkpoint, options, SelfCommunicator())
    assert replica.engine is not None

    def generate(forks: bool) -> dict[str, list[int]]:
        assert replica.engine is not None
        for index in range(3):
            params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=index, ignore_eos=True)
            first, salt = ("0", "") if forks and index else (None, "" if forks else f"salt {index}")
            replica.engine.submit(Request(str(index), tuple(PROMPT.tolist()), params, None, first, salt))
        tokens: dict[str, list[int]] = {str(index): [] for index in range(3)}
        while replica.engine.has_work:
            for delta in replica.engine.step():
                tokens[delta.request_id] += delta.token_ids
        return tokens

    alone = generate(forks=False)
    num_hits = replica.engine.stats().prefix_hit_tokens
    assert generate(forks=True) == alone
    assert replica.engine.stats().prefix_hit_tokens - num_hits == 2 * (len(PROMPT) - 1)
    replica.executor.close()
