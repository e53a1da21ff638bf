"""One `LLM`, many calls: however a call ends, the next one gives the answer that a fresh LLM gives, or says why it cannot."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx import LLM, SamplingParams
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError, ExecutorError, RequestError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.interrupts import HeldInterrupts
from phalanx.runtime.request import RequestOutput, TokenDelta
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

GREEDY = SamplingParams(max_tokens=3, temperature=0.0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(engine="numpy") as llm:
        yield llm


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected() -> RequestOutput:
    with LLM(engine="numpy") as fresh:
        return fresh.generate(["import"], GREEDY)[0]


def assert_still_good(llm: LLM, expected: RequestOutput) -> None:
    for _ in range(2):
        (output,) = llm.generate(["import"], GREEDY)
        assert (output.token_ids, output.text, output.finish_reason) == (
            expected.token_ids, expected.text, expected.finish_reason,
        )  # fmt: skip
    assert llm._replica.engine is not None
    assert llm._replica.engine.stats().kv_blocks_used == 0


class Given(Exception):
    pass


def raising(error: BaseException, at: int) -> Callable[[int, TokenDelta, str], None]:
    calls = iter(range(1000))

    def progress(index: int, delta: TokenDelta, text: str) -> None:
        if next(calls) == at:
            raise error

    return progress


@pytest.mark.parametrize(
    ("prompts", "fields"),
    [
        (["def main("], {"stop": "\n"}),
        (["def main("] * 5, {"stop": ("\n", "(")}),
        (["def main(", "import"], {"stop": "ma", "max_tokens": 1}),
        (["def main("], {"stop": "\n", "include_stop": True, "seed": 1, "temperature": 1.5}),
        (["def main("], {"stop": "t", "logprobs": 2, "prompt_logprobs": 1}),
        (["def main("], {"max_tokens": 0}),
        ([], {}),
        (["import", ""], {}),
    ],
)
def test_calls_that_end_in_any_way_leave_nothing_behind(
    llm: LLM, expected: RequestOutput, prompts: list[str], fields: dict[str, Any]
) -> None:
    llm.run(prompts, [SamplingParams(**{"max_tokens": 20, "temperature": 0.0, **fields})] * len(prompts))
    assert_still_good(llm, expected)


@pytest.mark.parametrize("error", [Given("why"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_exception_of_the_callback_comes_out_and_leaves_nothing_behind(
    llm: LLM, expected: RequestOutput, error: BaseException, at: int
) -> None:
    with pytest.raises(type(error)) as caught:
        llm.run(["def main("] * 3, [SamplingParams(max_tokens=30, ignore_eos=True)] * 3, raising(error, at))
    assert caught.value is error
    assert_still_good(llm, expected)


def test_ctrl_c_in_a_step_waits_for_its_end(llm: LLM, expected: RequestOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._replica.engine
    assert engine is not None
    execute, finished = engine.executor.execute, []

    def interrupted(plan: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        execute(plan)
        finished.append(plan)

    monkeypatch.setattr(engine.executor, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["def main("], SamplingParams(max_tokens=30))
    assert len(finished) == 1
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_still_good(llm, expected)


def test_a_second_ctrl_c_does_not_wait() -> None:
    def press_twice() -> None:
        with interrupts.hold():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("went on")

    with HeldInterrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        press_twice()


def test_somebody_elses_handler_of_ctrl_c_stays() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with HeldInterrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_after_a_broken_step_the_object_says_why_it_cannot_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(engine="numpy") as llm:
        engine = llm._replica.engine
        assert engine is not None

        def broken(plan: Any) -> None:
            raise ArithmeticError("a bit flipped")

        monkeypatch.setattr(engine.executor, "execute", broken)
        with pytest.raises(ArithmeticError, match="a bit flipped"):
            llm.generate("import", GREEDY)
        with pytest.raises(ExecutorError, match="ArithmeticError: a bit flipped; make a new one"):
            llm.generate("import", GREEDY)


def test_an_exception_on_the_leader_ends_the_call_on_every_rank_and_all_can_go_on(directory: Path) -> None:
    def rank(comm: Communicator) -> list[tuple[int, ...]]:
        with LLM(directory, comm=comm, tensor_parallel_size=2, data_parallel_size=2, engine="numpy") as llm:
            error = Given if comm.rank == 0 else ExecutorError
            with pytest.raises(error):
                llm.run(
                    [[5, 6]] * 4,
                    [SamplingParams(max_tokens=9)] * 4,
                    raising(Given("why"), 1) if not comm.rank else None,
                )
            return [output.token_ids for output in llm.generate([[5, 6], [7, 8]], GREEDY)]

    results = run_ranks(4, rank)
    with LLM(directory, engine="numpy") as fresh:
        assert all(
            result == [output.token_ids for output in fresh.generate([[5, 6], [7, 8]], GREEDY)] for result in results
        )


@pytest.mark.parametrize(
    "prompts", [b"import", {"prompt": "x"}, None, 5, 2.5, [5.5, 6], [True, False], [5, float("nan")], ["\ud800"], [None], [b"x"],
                [["x"]], [[2**31]], [[-1]], [[[1]]], ["x", 5], np.array([1.5]), [{}]],
    ids=repr,
)  # fmt: skip
def test_what_is_not_a_prompt_is_refused_by_name(llm: LLM, expected: RequestOutput, prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        llm.generate(prompts, GREEDY)
    assert_still_good(llm, expected)


@pytest.mark.parametrize(
    "prompts", [[5, 6], (5, 6), np.array([5, 6]), [np.int64(5), np.int32(6)], [5.0, 6], range(5, 7)], ids=repr
)
def test_token_ids_in_any_sequence_are_one_prompt(llm: LLM, prompts: Any) -> None:
    assert llm.generate(prompts, GREEDY)[0].prompt_token_ids == (5, 6)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [{}], 5, "x", [None], [GREEDY, GREEDY]], ids=repr)
def test_what_is_not_sampling_params_is_refused_by_name(llm: LLM, expected: RequestOutput, params: Any) -> None:
    with pytest.raises(RequestError, match="sampling_params"):
        llm.generate(["import"], params)
    assert_still_good(llm, expected)


def test_a_closed_llm_leaves_no_file_open() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    LLM(engine="numpy", num_kv_blocks=20).close()
    before = descriptors()
    LLM(engine="numpy", num_kv_blocks=20).close()
    with pytest.raises(ConfigError, match="max-model-len"):
        LLM(engine="numpy", num_kv_blocks=1, max_model_len=2048)
    assert descriptors() == before
