"""`LLM` from end to end on the NumPy executor: results do not depend on what else runs, nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phalanx import LLM, SamplingParams
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError, RequestError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.request import RequestOutput, TokenDelta
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path_factory.mktemp("llama"))


def mixed_requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    random = np.random.default_rng(3)
    prompts = [random.integers(3, 101, random.integers(1, 60)).tolist() for _ in range(count)]
    params = [
        SamplingParams(
            max_tokens=int(random.integers(1, 40)), temperature=[0.0, 0.8, 1.3][index % 3], top_k=[0, 7][index % 2],
            top_p=[1.0, 0.8][index % 2], seed=index, logprobs=[None, 0, 3][index % 3],
        )
        for index in range(count)
    ]  # fmt: skip
    return prompts, params


def test_64_mixed_requests_on_4_ranks_and_a_small_cache_equal_their_runs_alone(directory: Path) -> None:
    prompts, params = mixed_requests(64)
    with LLM(directory, engine="numpy", prefix_caching=False) as alone:
        expected = [alone.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
    # 16 running sequences of up to 100 tokens would need 400 blocks of 4.
    options = {
        "engine": "numpy",
        "max_num_seqs": 16,
        "max_num_batched_tokens": 48,
        "block_size": 4,
        "num_kv_blocks": 100,
    }

    def rank(comm: Communicator) -> tuple[list[RequestOutput], int]:
        with LLM(
            directory, comm=comm, tensor_parallel_size=2, pipeline_parallel_size=2, max_model_len=100, **options
        ) as llm:
            outputs = llm.generate(prompts, params)
            engine = llm._replica.engine
            used = engine.stats().kv_blocks_used if engine is not None else 0
            return outputs, used

    results = run_ranks(4, rank)
    assert all(outputs == results[0][0] for outputs, _ in results), "every rank gets every result"
    outputs, used = results[0]
    assert used == 0, "blocks leaked"
    for output, alone_output in zip(outputs, expected, strict=True):
        assert output.token_ids == alone_output.token_ids
        assert output.finish_reason == alone_output.finish_reason
        for mine, other in zip(output.logprobs or (), alone_output.logprobs or (), strict=True):
            assert mine.token_id == other.token_id
            assert abs(mine.logprob - other.logprob) < 1e-4


def test_prefix_sharing_changes_nothing_but_the_work(directory: Path) -> None:
    shared = list(range(3, 40))
    prompts = [[*shared, 50 + index] for index in range(6)]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with LLM(directory, engine="numpy", prefix_caching=False) as llm:
        expected = llm.generate(prompts, params)
    with LLM(directory, engine="numpy", block_size=4) as llm:
        first = llm.generate(prompts[:1], params)
        outputs = llm.generate(prompts, params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert first[0].num_cached_tokens == 0
    assert [output.num_cached_tokens for output in outputs[1:]] == [36] * 5


def test_chunked_prefill_equals_whole(directory: Path) -> None:
    prompt = list(range(3, 80))
    params = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=2)
    outputs = []
    for budget in (5, 16, 2048):
        with LLM(directory, engine="numpy", max_num_batched_tokens=budget, block_size=4) as llm:
            outputs.append(llm.generate(prompt, params)[0])
    for output in outputs[1:]:
        assert output.token_ids == outputs[0].token_ids
        for mine, other in zip(output.prompt_logprobs[1:], outputs[0].prompt_logprobs[1:], strict=True):
            assert abs(mine.logprob - other.logprob) < 1e-5


def test_scoring_only(directory: Path) -> None:
    with LLM(directory, engine="numpy") as llm:
        output = llm.generate([5, 6, 7], SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
    assert output.token_ids == ()
    assert output.finish_reason == "length"
    assert [entry is None for entry in output.prompt_logprobs] == [True, False, False]


def test_one_bad_prompt_does_not_cost_the_others(directory: Path) -> None:
    prompts = [[5, 6], [], [5, 101], list(range(3, 90)) * 2, "text"]
    with LLM(directory, engine="numpy") as llm:
        outputs = llm.run(prompts, [SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)] * 5)
        assert [output.finish_reason for output in outputs] == ["length", *["error"] * 4]
        assert len(outputs[0].token_ids) == 3
        for output, words in zip(
            outputs[1:], (["no tokens"], ["101", "100"], ["174", "128"], ["tokenizer.json"]), strict=True
        ):
            assert all(word in output.error for word in words), output.error
        with pytest.raises(RequestError, match="prompt 1"):
            llm.generate(prompts, SamplingParams(max_tokens=3))


def test_without_a_tokenizer_text_is_none(directory: Path) -> None:
    with LLM(directory, engine="numpy") as llm:
        assert llm.generate([5, 6], SamplingParams(max_tokens=2))[0].text is None


def test_a_crowd_of_ranks_that_does_not_fit_the_layout_is_refused(directory: Path) -> None:
    def rank(comm: Communicator) -> None:
        LLM(directory, comm=comm, tensor_parallel_size=2, pipeline_parallel_size=2)

    with pytest.raises(ConfigError, match="mpirun -n 4"):
        run_ranks(3, rank)


def test_stop_text_ends_the_text_before_it() -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0)
    with LLM(engine="numpy") as llm:
        whole = llm.generate("def main(", params)[0]
        assert '"Hello, world!"' in whole.text
        pieces: list[str] = []

        def progress(index: int, delta: TokenDelta, text: str) -> None:
            pieces.append(text)

        stopped = llm.run(["def main("], [SamplingParams(max_tokens=40, temperature=0.0, stop=("lo, wor",))], progress)[
            0
        ]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == "lo, wor"
    assert stopped.text == whole.text[: whole.text.index("lo, wor")]
    assert "".join(pieces) == stopped.text
    assert len(stopped.token_ids) < len(whole.token_ids)


def test_replicas_share_the_prompts(directory: Path) -> None:
    prompts, params = mixed_requests(9)
    with LLM(directory, engine="numpy") as alone:
        expected = alone.generate(prompts, params)

    def rank(comm: Communicator) -> list[RequestOutput]:
        with LLM(directory, comm=comm, data_parallel_size=2, engine="numpy") as llm:
            return llm.generate(prompts, params)

    for outputs in run_ranks(4, rank):
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
