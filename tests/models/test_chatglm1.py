"""ChatGLM-6B's prompts: a prefix whose tokens see one another, which is computed in one step and shared whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phalanx.parallel.errors import ConfigError, RequestError
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.scheduler.harness import make_prompt, make_request, make_scheduler
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

CASE = CASES_BY_NAME["chatglm1-prefix"]
GMASK, START = CASE.prefix_end
PREFIX = make_prompt(14)
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("chatglm1"))


def generate(directory: Path, prompts: Sequence[tuple[int, ...]], **options: Any) -> list[RequestOutput]:
    with LLM(directory, engine="numpy", block_size=4, **options) as llm:
        return [output for prompt in prompts for output in llm.generate([prompt], PARAMS)]


def test_prompts_share_a_prefix_only_if_it_is_the_same_to_its_end(directory: Path) -> None:
    first, other = ((*PREFIX, last, GMASK, START) for last in (40, 41))
    alone = [generate(directory, [prompt], prefix_caching=False)[0] for prompt in (first, other, first)]
    shared = generate(directory, [first, other, first])
    assert [output.token_ids for output in shared] == [output.token_ids for output in alone]
    assert [output.num_cached_tokens for output in shared] == [0, 0, 16]
    for one, two in zip(shared, alone, strict=True):
        assert one.logprobs is not None
        assert two.logprobs is not None
        assert [entry.logprob for entry in one.logprobs] == pytest.approx(
            [entry.logprob for entry in two.logprobs], abs=1e-5
        )


def test_answers_to_one_prompt_fork_from_its_prefix(directory: Path) -> None:
    prompt, beams = (*PREFIX, GMASK, START), SamplingParams(max_tokens=4, beam_width=2, ignore_eos=True)
    with LLM(directory, engine="numpy", block_size=4) as llm:
        wide = llm.generate([prompt, prompt], beams)
    with LLM(directory, engine="numpy", block_size=4, max_num_batched_tokens=20, max_num_seqs=5) as llm:
        narrow = llm.generate([prompt, prompt], beams)
    assert [output.token_ids for output in wide] == [output.token_ids for output in narrow]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (PREFIX, "the prompt lacks the tokens 0, 1, after which this model answers"),
        ((*PREFIX, START), "the prompt lacks the tokens 0, 1"),
        ((*PREFIX, GMASK, 5, START), "0, 1, after which this model answers, apart or more than once"),
        ((GMASK, *PREFIX, GMASK, START), "apart or more than once"),
        ((*PREFIX, *PREFIX, GMASK, START), "has 29 tokens before its answer, .* one step of at most 25; shorten the prompt"),
    ],
)  # fmt: skip
def test_prompts_without_one_end_of_their_prefix_are_refused(prompt: tuple[int, ...], message: str) -> None:
    scheduler = make_scheduler(prefix_end=(GMASK, START), max_num_batched_tokens=32)
    with pytest.raises(RequestError, match=message):
        scheduler.submit(make_request("a", prompt), 0.0)


def test_a_prefix_waits_until_a_step_has_room_for_all_of_it() -> None:
    scheduler = make_scheduler(prefix_end=(GMASK, START), max_num_batched_tokens=32)
    prompts = [(*make_prompt(19, first), GMASK, START) for first in (10, 30)]
    for name, prompt in zip("ab", prompts, strict=True):
        scheduler.submit(make_request(name, prompt), 0.0)
    first, second = (scheduler.plan(0.0) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.num_scheduled_tokens.tolist() == [21]
    assert second.num_scheduled_tokens.tolist() == [21]


def test_steps_that_no_prefix_fits_are_refused_at_start(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-num-batched-tokens=8 leaves no room .* next to --max-num-seqs=16"):
        generate(directory, [], max_num_batched_tokens=8, max_num_seqs=16)
