"""Token biases: what they do to the choice, the same in every layout, batch and after a preemption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.adjust import adjust_logits
from phalanx.runtime.sampling.biases import BAN, MAX_TOKEN_BIASES, token_biases
from phalanx.runtime.sampling.fields import SamplingParams
from phalanx.runtime.step import ADMISSION, TOKEN_BIAS

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from ..support.reference import prompt_token_ids
from ..support.thread_ranks import generate_on_threads

CASE = CASES_BY_NAME["llama-grouped-heads"]
PROMPT = prompt_token_ids(CASE)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=20)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("biases"))


def min_tokens_params(directory: Path) -> SamplingParams:
    ends = generate_on_threads(directory, [PROMPT], GREEDY)[0].token_ids
    return dataclasses.replace(GREEDY, min_tokens=6, stop_token_ids=ends)


def test_before_min_tokens_the_best_token_that_ends_nothing_is_chosen(directory: Path) -> None:
    params = min_tokens_params(directory)
    (output,) = generate_on_threads(directory, [PROMPT], params)
    assert output.logprobs is not None
    assert len(output.token_ids) >= params.min_tokens
    for entry in output.logprobs[: params.min_tokens]:
        assert entry.top[0][0] in params.stop_token_ids or entry.token_id == entry.top[0][0]
        best = next(pair for pair in entry.top if pair[0] not in params.stop_token_ids)
        assert (entry.token_id, entry.logprob) == best, "log-probabilities are the model's"
    assert any(entry.token_id != entry.top[0][0] for entry in output.logprobs), "some choice was changed"
    for entry in output.logprobs[params.min_tokens :]:
        assert entry.token_id == entry.top[0][0]


def test_logit_bias_moves_the_choice_to_what_the_biased_logits_say(directory: Path) -> None:
    (plain,) = generate_on_threads(directory, [PROMPT], GREEDY)
    assert plain.logprobs is not None
    first = plain.logprobs[0]
    (best, highest), (second, lower) = first.top[:2]
    for bias, chosen in [(highest - lower + 0.01, second), (highest - lower - 0.01, best), (-100.0, best)]:
        (output,) = generate_on_threads(
            directory, [PROMPT], dataclasses.replace(GREEDY, logit_bias={str(second): bias})
        )
        assert output.logprobs is not None
        assert output.token_ids[0] == chosen
        assert output.logprobs[0].top == first.top, "log-probabilities are the model's"
    (banned,) = generate_on_threads(directory, [PROMPT], dataclasses.replace(GREEDY, logit_bias={best: -100}))
    assert best not in banned.token_ids


def test_logit_bias_beyond_the_vocabulary_is_refused(directory: Path) -> None:
    with pytest.raises(RequestError, match="logit_bias holds 101; ids of this model go from 0 to 100"):
        generate_on_threads(directory, [PROMPT], dataclasses.replace(GREEDY, logit_bias={101: 1}))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    "fields",
    [{}, {"logit_bias": {5: 3.5, 61: -100, 17: 2}}, {"logprobs": None}, {"temperature": 0.9, "seed": 4, "top_p": 0.9}],
    ids=str,
)
def test_biased_tokens_are_equal_in_every_layout(directory: Path, tp: int, pp: int, fields: dict[str, Any]) -> None:
    params = dataclasses.replace(min_tokens_params(directory), **fields)
    prompts = [PROMPT, PROMPT[:7], PROMPT[5:]]
    expected = [output.token_ids for output in generate_on_threads(directory, prompts, params)]
    assert [output.token_ids for output in generate_on_threads(directory, prompts, params, tp, pp)] == expected


def test_neither_batches_nor_preemptions_change_biased_tokens(directory: Path) -> None:
    params = dataclasses.replace(min_tokens_params(directory), max_tokens=24, min_tokens=24, logprobs=None)
    prompts = [PROMPT, PROMPT[:7], PROMPT[5:], PROMPT[2:9], PROMPT[3:4]]
    alone = [generate_on_threads(directory, [prompt], params)[0].token_ids for prompt in prompts]
    for num_kv_blocks in (20, 12):
        outputs = generate_on_threads(directory, prompts, params, block_size=4, num_kv_blocks=num_kv_blocks)
        assert [output.token_ids for output in outputs] == alone


def no_history(seq_index: int, length: int) -> NDArray[np.int32]:
    raise AssertionError("biases need no history")


def test_a_row_without_biases_in_force_keeps_its_logits() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 9)).astype(np.float32)
    records, biases = np.zeros(3, ADMISSION), np.zeros((2, MAX_TOKEN_BIASES), TOKEN_BIAS)
    assert adjust_logits(logits, records, np.zeros(3, np.int32), biases, no_history) is logits
    records["seq_index"], records["num_biases"] = [0, 1, 1], [0, 2, 2]
    biases[1, :2] = [(4, BAN, 5, 0), (4, 3.0, 9, 0)]
    biased = adjust_logits(logits, records, np.array([1, 5, 9], np.int32), biases, no_history)
    expected = logits.copy()
    expected[1, 4] += 3
    np.testing.assert_array_equal(biased, expected)


def test_a_ban_ends_at_min_tokens_and_each_end_token_is_listed_once() -> None:
    assert token_biases(SamplingParams(max_tokens=5, min_tokens=2), 10, (7, 3, 7)) == [(7, BAN, 12, 0), (3, BAN, 12, 0)]
    assert token_biases(SamplingParams(max_tokens=5), 10, (7, 3)) == []


def test_more_biases_than_a_sequence_may_have_are_refused() -> None:
    with pytest.raises(RequestError, match=f"need {MAX_TOKEN_BIASES + 1} .* use at most {MAX_TOKEN_BIASES}") as caught:
        token_biases(SamplingParams(min_tokens=2), 1, tuple(range(MAX_TOKEN_BIASES + 1)))
    assert caught.value.param == "min_tokens"
