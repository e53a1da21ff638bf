"""Many mixed requests through one engine: nothing leaks, nothing drifts, every request ends as it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phalanx.runtime.llm import LLM
from phalanx.runtime.request import RequestOutput, SamplingParams

__all__ = ["Requests", "check_ends", "check_idle"]


@dataclass(frozen=True, slots=True)
class Requests:
    """Greedy, seeded, filtered and scored requests of all sizes; every fifth begins like another."""

    prompts: list[tuple[int, ...]]
    params: list[SamplingParams]

    @classmethod
    def mixed(cls, count: int, vocab_size: int = 101) -> Requests:
        random = np.random.default_rng(1)
        made = [_request(random, index, vocab_size) for index in range(count)]
        return cls([prompt for prompt, _ in made], [params for _, params in made])

    def __getitem__(self, some: slice) -> Requests:
        return Requests(self.prompts[some], self.params[some])

    def generate(self, llm: LLM) -> list[RequestOutput]:
        """All of them, together."""
        return llm.generate(self.prompts, self.params)

    def tokens(self, llm: LLM) -> list[tuple[int, ...]]:
        """Only the tokens that they were given."""
        return [tuple(output.token_ids) for output in self.generate(llm)]


def _request(random: np.random.Generator, index: int, vocab_size: int) -> tuple[tuple[int, ...], SamplingParams]:
    length = int(random.integers(1, 90))
    prompt = random.integers(3, vocab_size, length)
    if index % 5 == 0:
        prompt[: min(length, 40)] = np.arange(min(length, 40)) + 3
    kind = index % 4
    params = SamplingParams(
        max_tokens=int(random.integers(1, 38)),
        temperature=0.0 if kind == 0 else 0.9,
        seed=index,
        top_k=20 if kind == 2 else 0,
        top_p=0.9 if kind == 2 else 1.0,
        logprobs=2 if kind == 3 else None,
        ignore_eos=index % 3 > 0,
    )
    return tuple(prompt.tolist()), params


def check_idle(llm: LLM) -> None:
    """Assert that no request is left, and no block of the cache in use."""
    stats = llm._replica.engine.stats()
    assert stats.kv_blocks_used == 0
    assert (stats.num_running, stats.num_waiting) == (0, 0)


def check_ends(outputs: Sequence[RequestOutput], params: Sequence[SamplingParams], eos_token_id: int = 2) -> None:
    """Assert that each ended at its length, or with the end of sequence."""
    for output, param in zip(outputs, params, strict=True):
        if output.finish_reason == "length":
            assert len(output.token_ids) == param.max_tokens
        else:
            assert output.finish_reason == "stop"
            assert output.token_ids[-1] == eos_token_id
