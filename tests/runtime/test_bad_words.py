"""Bad words and stop words of one or several tokens: the same in every layout, batch and after a preemption."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from phalanx.parallel.errors import RequestError
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from phalanx.runtime.sampling.biases import BAN, token_biases
from phalanx.runtime.sampling.rules import MAX_INT32
from phalanx.runtime.text import Tokenizer
from phalanx.runtime.text.words import word_token_ids

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from ..support.launcher import ROOT
from ..support.reference import prompt_token_ids
from ..support.thread_ranks import generate_on_threads, tokens_of

CASE = CASES_BY_NAME["llama-grouped-heads"]
PROMPT = prompt_token_ids(CASE)
PROMPTS = [PROMPT, PROMPT[:7], PROMPT[5:], PROMPT[2:9], PROMPT[3:4]]
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, presence_penalty=2.0, frequency_penalty=2.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("words"))


def holds(token_ids: tuple[int, ...], word: tuple[int, ...]) -> bool:
    return any(token_ids[i : i + len(word)] == word for i in range(len(token_ids)))


def bad_words(directory: Path) -> tuple[tuple[int, ...], ...]:
    """Of one, two and three tokens, all of which greedy decoding would generate."""
    (plain,) = tokens_of(generate_on_threads(directory, [PROMPT], GREEDY))
    words = plain[2:5], plain[7:9], plain[11:12]
    assert len({token for word in words for token in word}) > 3, "words of different tokens"
    return words


def test_the_last_token_of_a_bad_word_is_not_chosen_after_the_others(directory: Path) -> None:
    words = bad_words(directory)
    params = dataclasses.replace(GREEDY, bad_token_ids=words, logprobs=20)
    (plain,), (output,) = (
        generate_on_threads(directory, [PROMPT], GREEDY),
        generate_on_threads(directory, [PROMPT], params),
    )
    assert output.logprobs is not None
    assert not any(holds(output.token_ids, word) for word in words)
    assert output.token_ids[:4] == plain.token_ids[:4], "nothing changes before the word would be complete"
    for index, entry in enumerate(output.logprobs):
        before = output.token_ids[:index]
        banned = {word[-1] for word in words if len(word) == 1 or before[-len(word) + 1 :] == word[:-1]}
        scores = {token: value - 2 * before.count(token) - 2 * (token in before) for token, value in entry.top}
        assert entry.token_id == max(scores.keys() - banned, key=scores.__getitem__)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_bad_words_are_equal_in_every_layout(directory: Path, tp: int, pp: int) -> None:
    params = [
        dataclasses.replace(GREEDY, bad_token_ids=bad_words(directory), **fields)
        for fields in (
            {},
            {"temperature": 0.9, "seed": 3},
            {"repetition_penalty": 1.3},
            {"top_k": 5, "temperature": 1.0},
            {},
        )
    ]
    params = [dataclasses.replace(one, seed=one.seed or 7) for one in params]
    expected = tokens_of(generate_on_threads(directory, PROMPTS, params))
    assert tokens_of(generate_on_threads(directory, PROMPTS, params, tp, pp)) == expected


def test_neither_batches_nor_preemptions_change_what_is_banned(directory: Path) -> None:
    params = dataclasses.replace(GREEDY, bad_token_ids=bad_words(directory), max_tokens=24)
    alone = [generate_on_threads(directory, [prompt], params)[0].token_ids for prompt in PROMPTS]
    for num_kv_blocks in (20, 12):
        outputs = generate_on_threads(directory, PROMPTS, params, block_size=4, num_kv_blocks=num_kv_blocks)
        assert tokens_of(outputs) == alone


def test_an_answer_ends_where_its_output_ends_in_a_stop_sequence(directory: Path) -> None:
    (plain,) = tokens_of(generate_on_threads(directory, [PROMPT], GREEDY))
    sequences = (plain[4:7], (99, 98, 97), (plain[9],))
    (output,) = generate_on_threads(directory, [PROMPT], dataclasses.replace(GREEDY, stop_token_sequences=sequences))
    assert (output.token_ids, output.finish_reason) == (plain[:7], "stop")
    late = dataclasses.replace(GREEDY, stop_token_sequences=sequences, min_tokens=8)
    (output,) = generate_on_threads(directory, [PROMPT], late)
    assert (output.token_ids, output.finish_reason) == (plain[:10], "stop")


def test_a_word_becomes_a_ban_and_the_tokens_before_it() -> None:
    entries = token_biases(SamplingParams(bad_token_ids=((5,), (7, 8, 9), (5,))), 10, ())
    assert entries == [(5, BAN, MAX_INT32, 0), (9, BAN, MAX_INT32, 2), (8, 0.0, 0, 0), (7, 0.0, 0, 0)]


def test_words_are_banned_with_and_without_a_space_before_them() -> None:
    tokenizer = Tokenizer.from_directory(ROOT / "checkpoints/demo")
    assert tokenizer is not None
    texts = {tokenizer.decode(token_ids) for token_ids in word_token_ids(tokenizer, ["import", " self"])}
    assert texts == {"import", " import", "self", " self"}


def test_text_is_generated_without_its_bad_words() -> None:
    with LLM(engine="numpy") as llm:
        plain = SamplingParams(max_tokens=24, temperature=0.0)
        (before,) = llm.generate(["import numpy as np\n\ndef "], plain)
        assert before.text is not None
        word = next(word for word in before.text.split() if word.isidentifier())
        (after,) = llm.generate(["import numpy as np\n\ndef "], dataclasses.replace(plain, bad_words=word))
        assert after.text is not None
        assert word not in after.text


def test_bad_words_without_a_tokenizer_are_refused_by_name(directory: Path) -> None:
    with pytest.raises(RequestError, match="bad_words are texts"):
        generate_on_threads(directory, [PROMPT], dataclasses.replace(GREEDY, bad_words=("x",)))
    for name in ("bad_token_ids", "stop_token_sequences"):
        with pytest.raises(RequestError, match=f"{name} holds 101"):
            generate_on_threads(directory, [PROMPT], dataclasses.replace(GREEDY, **{name: ((3, 101),)}))


@pytest.mark.torch
def test_tokens_are_those_of_transformers(directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, NoBadWordsLogitsProcessor

    words = bad_words(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=-1)
    known = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(20):
            output = known[:, len(PROMPT) :]
            counts = torch.bincount(output[0], minlength=101)
            logits = model(known).logits[:, -1] - 2 * counts - 2 * (counts > 0)
            scores = processor(output, logits)
            known = torch.cat((known, scores.argmax(-1, keepdim=True)), dim=1)
    (own,) = generate_on_threads(directory, [PROMPT], dataclasses.replace(GREEDY, bad_token_ids=words))
    assert list(own.token_ids) == known[0, len(PROMPT) :].tolist()
