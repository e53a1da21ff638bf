"""Allowed tokens: a mask in each plan, the same in every layout, batch and after a preemption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.parallel.errors import RequestError
from phalanx.runtime.request import SamplingParams
from phalanx.runtime.sampling import mask_sizes
from phalanx.runtime.sampling.masks import apply_mask, pack_mask
from phalanx.runtime.scheduler import running_set

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from ..support.reference import prompt_token_ids
from ..support.thread_ranks import generate_on_threads, tokens_of

CASE = CASES_BY_NAME["llama-grouped-heads"]
PROMPT = prompt_token_ids(CASE)
PROMPTS = [PROMPT, PROMPT[:7], PROMPT[5:], PROMPT[2:9], PROMPT[3:4]]
ALLOWED = (0, 5, 31, 32, 64, 77, 100)
PARAMS = SamplingParams(max_tokens=16, temperature=1.1, seed=5, ignore_eos=True, allowed_token_ids=ALLOWED)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("allowed"))


def test_only_allowed_tokens_are_chosen_and_among_them_the_best(directory: Path) -> None:
    params = dataclasses.replace(PARAMS, temperature=0.0, allowed_token_ids=tuple(range(0, 101, 2)), logprobs=20)
    (output,) = generate_on_threads(directory, [PROMPT], params)
    assert output.logprobs is not None
    for entry in output.logprobs:
        assert entry.token_id == next(token for token, _ in entry.top if token % 2 == 0)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_tokens_are_equal_in_every_layout(directory: Path, tp: int, pp: int) -> None:
    params = [dataclasses.replace(PARAMS, seed=index) for index in range(4)] + [SamplingParams(temperature=0.0)]
    params[1] = dataclasses.replace(params[1], top_k=3, repetition_penalty=1.4, logit_bias={5: 3.0, 6: 90.0})
    expected = tokens_of(generate_on_threads(directory, PROMPTS, params))
    assert all(set(tokens) <= set(ALLOWED) for tokens in expected[:4])
    assert len({token for tokens in expected[:4] for token in tokens}) > 4
    assert tokens_of(generate_on_threads(directory, PROMPTS, params, tp, pp)) == expected


@pytest.mark.parametrize("most", [1, 2, 100])
def test_neither_batches_nor_preemptions_nor_the_room_for_masks_change_tokens(
    directory: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    params = [PARAMS, PARAMS, dataclasses.replace(PARAMS, allowed_token_ids=None), PARAMS, PARAMS]
    alone = [
        generate_on_threads(directory, [prompt], one)[0].token_ids for prompt, one in zip(PROMPTS, params, strict=True)
    ]  # fmt: skip
    monkeypatch.setattr(running_set, "most_masked_seqs", lambda _: most)
    for num_kv_blocks in (20, 12):
        assert (
            tokens_of(generate_on_threads(directory, PROMPTS, params, block_size=4, num_kv_blocks=num_kv_blocks))
            == alone
        )


@pytest.mark.parametrize(
    "others",
    [
        {"bad_token_ids": ((5,), (7,))},
        {"bad_token_ids": ((5,),), "stop_token_ids": (7,), "min_tokens": 1},
        {"stop_token_ids": (5, 7), "min_tokens": 1},
    ],
)
def test_allowed_tokens_that_are_all_banned_are_refused(directory: Path, others: dict[str, Any]) -> None:
    params = dataclasses.replace(PARAMS, allowed_token_ids=(5, 7), **others)
    with pytest.raises(
        RequestError, match="allowed_token_ids holds nothing but bad words and, before min_tokens, end tokens"
    ):
        generate_on_threads(directory, [PROMPT], params)
    one_more = dataclasses.replace(params, allowed_token_ids=(5, 7, 9), max_tokens=1)
    assert generate_on_threads(directory, [PROMPT], one_more)[0].token_ids == (9,)


def test_masks_hold_a_bit_for_each_token_and_show_logits_that_are_not_finite() -> None:
    logits = np.arange(70, dtype=np.float32)
    logits[[3, 4]] = np.nan, np.inf
    apply_mask(logits, pack_mask([0, 31, 32, 69], 70))
    assert np.flatnonzero(logits > -1e29).tolist() == [0, 4, 31, 32, 69]
    assert np.isnan(logits[3])


def test_a_plan_has_room_for_the_masks_of_one_sequence_at_least() -> None:
    assert mask_sizes.most_masked_seqs(256_000) == 262
    assert mask_sizes.most_masked_seqs(1 << 30) == 1
    assert mask_sizes.most_plan_mask_words(101, 3) == 12


def test_lists_that_allow_nothing_or_what_is_not_there_are_refused(directory: Path) -> None:
    with pytest.raises(RequestError, match="holds 0 tokens; use at least 1"):
        SamplingParams(allowed_token_ids=())
    with pytest.raises(RequestError, match="allowed_token_ids holds 101"):
        generate_on_threads(directory, [PROMPT], dataclasses.replace(PARAMS, allowed_token_ids=(3, 101)))
