"""Repetition, presence and frequency penalties: what they do to the choice, the same in every layout, batch and after a preemption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.parallel.communicator import SelfCommunicator
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import Request, SamplingParams
from phalanx.runtime.sampling.adjust import adjust_logits
from phalanx.runtime.sampling.biases import MAX_TOKEN_BIASES
from phalanx.runtime.sampling.fields import adjusts_logits
from phalanx.runtime.step import ADMISSION, TOKEN_BIAS

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from ..support.records import admission
from ..support.reference import prompt_token_ids
from ..support.thread_ranks import generate_on_threads, tokens_of

CASE = CASES_BY_NAME["llama-grouped-heads"]
PROMPT = prompt_token_ids(CASE)
PROMPTS = [PROMPT, PROMPT[:7], PROMPT[5:], PROMPT[2:9], PROMPT[3:4]]
GREEDY = SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True)
PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.1, "frequency_penalty": -0.3},
    {"repetition_penalty": 0.8, "frequency_penalty": 2.0, "temperature": 0.9, "seed": 4, "top_p": 0.9},
    {"repetition_penalty": 1.2, "presence_penalty": -0.5, "temperature": 1.1, "seed": 3, "logit_bias": {5: 4.0}},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("penalties"))


@pytest.mark.parametrize("seed", range(4))
def test_penalised_logits_equal_float64(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, 50).astype(np.float32)
    tokens = rng.integers(0, 12, 31)
    num_prompt = int(rng.integers(1, 31))
    repetition, presence, frequency = (
        float(np.float32(value)) for value in (rng.uniform(0.5, 2), *rng.uniform(-2, 2, 2))
    )
    expected = []
    for token, logit in enumerate(logits.tolist()):
        if token in tokens:
            logit = logit / repetition if logit > 0 else logit * repetition
        count = tokens[num_prompt:].tolist().count(token)
        expected.append(logit - count * frequency - (presence if count else 0))
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, temperature=0.0
    )
    record = admission(params, 50, num_prompt=num_prompt)
    biases = np.zeros((1, MAX_TOKEN_BIASES), TOKEN_BIAS)
    adjusted = adjust_logits(logits[None], record, np.array([31], np.int32), biases, lambda _, length: tokens[:length])
    np.testing.assert_allclose(adjusted[0], expected, rtol=1e-6, atol=1e-6)


def test_neutral_penalties_leave_a_sequence_out() -> None:
    neutral = SamplingParams(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=-0.0)
    records = admission(neutral, 50, num_prompt=3)
    assert not adjusts_logits(records).any()
    assert not adjusts_logits(np.zeros(2, ADMISSION)).any()


def test_the_output_counts_and_the_prompt_does_not(directory: Path) -> None:
    """Frequency and presence move logits by known amounts, so the choice follows from the model's log-probabilities."""
    params = dataclasses.replace(GREEDY, presence_penalty=0.7, frequency_penalty=0.9, logprobs=20)
    (output,) = generate_on_threads(directory, [PROMPT], params)
    assert output.logprobs is not None
    changed = 0
    for index, entry in enumerate(output.logprobs):
        before = output.token_ids[:index]
        scores = {token: value - 0.9 * before.count(token) - 0.7 * (token in before) for token, value in entry.top}
        assert max(scores, key=scores.__getitem__) == entry.token_id
        changed += entry.token_id != entry.top[0][0]
    assert changed


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_penalised_tokens_are_equal_in_every_layout(directory: Path, tp: int, pp: int) -> None:
    params = [dataclasses.replace(GREEDY, **fields) for fields in (*PENALTIES, {})]
    expected = tokens_of(generate_on_threads(directory, PROMPTS, params))
    assert expected != tokens_of(generate_on_threads(directory, PROMPTS, GREEDY))
    assert tokens_of(generate_on_threads(directory, PROMPTS, params, tp, pp)) == expected


@pytest.mark.parametrize("fields", PENALTIES, ids=str)
def test_neither_batches_nor_chunks_nor_preemptions_change_penalised_tokens(
    directory: Path, fields: dict[str, Any]
) -> None:
    params = dataclasses.replace(GREEDY, max_tokens=24, **fields)
    alone = [
        generate_on_threads(directory, [prompt], params, max_num_batched_tokens=64)[0].token_ids for prompt in PROMPTS
    ]
    for num_kv_blocks in (20, 12):
        outputs = generate_on_threads(directory, PROMPTS, params, block_size=4, num_kv_blocks=num_kv_blocks)
        assert tokens_of(outputs) == alone


def test_tokens_of_a_reused_or_forked_prefix_count(directory: Path) -> None:
    """The prompt's first blocks are not computed again, by a later request and by a second answer to the same prompt."""
    params = dataclasses.replace(GREEDY, **PENALTIES[0])
    (expected,) = tokens_of(generate_on_threads(directory, [PROMPT], params))
    with LLM(directory, comm=SelfCommunicator(), engine="numpy", block_size=4, max_num_seqs=3, num_kv_blocks=30) as llm:
        for _ in range(2):
            (output,) = llm.generate([PROMPT], params)
            assert output.token_ids == expected
        assert output.num_cached_tokens >= 8
        engine = llm._replica.engine
        assert engine is not None
        other = dataclasses.replace(params, presence_penalty=0.5)
        engine.submit(Request("first", PROMPT, other, cache_salt="new"))
        engine.submit(Request("second", PROMPT, params, fork_from="first", cache_salt="new"))
        deltas = []
        while engine.has_work:
            deltas += engine.step()
    assert sum((delta.token_ids for delta in deltas if delta.request_id == "second"), ()) == expected


@pytest.mark.torch
@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.5])
def test_greedy_tokens_with_a_repetition_penalty_are_those_of_transformers(directory: Path, penalty: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    known = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(20):
            scores = processors(known, model(known).logits[:, -1])
            known = torch.cat((known, scores.argmax(-1, keepdim=True)), dim=1)
    params = dataclasses.replace(GREEDY, max_tokens=20, repetition_penalty=penalty)
    (output,) = generate_on_threads(directory, [PROMPT], params)
    assert list(output.token_ids) == known[0, len(PROMPT) :].tolist()
