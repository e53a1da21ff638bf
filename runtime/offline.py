# SPDX-License-Identifier: Apache-2.0
"""One call of `LLM.run` on a leader: all prompts in, all results out, and an engine without requests however the call ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from phalanx.parallel.errors import CapacityError, RequestError
from phalanx.runtime.answer import Answer
from phalanx.runtime.engine import Engine
from phalanx.runtime.interrupts import HeldInterrupts
from phalanx.runtime.request import Request, RequestOutput, SamplingParams, TokenDelta
from phalanx.runtime.sampling.rules import TokenIds, shown
from phalanx.runtime.text import Tokenizer, with_word_tokens

__all__ = ["OfflineRun", "Progress", "Prompt", "as_prompts", "one_for_each"]

Prompt = str | Sequence[int]
"""Text, or token ids as they are."""

Progress = Callable[[int, TokenDelta, str], None]
"""Called on the leader as tokens arrive: index of the request, what was added, its text."""

_TOKEN_IDS = TokenIds(most=2**31 - 1)


class OfflineRun:
    """The requests of one call. When it returns the engine has none of them, so that the next call starts clean.

    Args:
        ids: request ids that no other call has used.

    Attributes:
        engine_failed: a step raised; the engine cannot go on.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        ids: Iterator[str],
        progress: Progress | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> None:
        self.engine_failed = False
        self._engine, self._tokenizer, self._ids, self._progress = engine, tokenizer, ids, progress
        self._on_output = on_output
        self._answers: list[Answer] = []
        self._open: dict[str, Answer] = {}

    def __call__(self, work: Iterable[tuple[int, Prompt, SamplingParams]]) -> list[RequestOutput]:
        """Generate (index, prompt, parameters); a prompt that cannot run ends with an error."""
        with HeldInterrupts() as interrupts:
            try:
                for index, prompt, params in work:
                    with interrupts.hold():
                        self._submit(index, prompt, params)
                while self._open:
                    with interrupts.hold():
                        deltas = self._step()
                    for delta in deltas:
                        self._take(delta)
            finally:
                with interrupts.hold():
                    self._close()
        return [answer.output() for answer in self._answers]

    def _close(self) -> None:
        """Cancel what is open and finish the steps in flight, which every rank has begun."""
        for request_id in self._open:
            self._engine.cancel(request_id)
        self._open.clear()
        while self._engine.has_work and not self.engine_failed:
            self._step()

    def _step(self) -> list[TokenDelta]:
        try:
            return self._engine.step()
        except BaseException:
            self.engine_failed = True
            raise

    def _submit(self, index: int, prompt: Prompt, params: SamplingParams) -> None:
        answer, request_id = Answer(index, (), params), next(self._ids)
        self._answers.append(answer)
        try:
            answer.prompt_token_ids = self._encode(prompt)
            if self._tokenizer is None and params.stop:
                raise RequestError(
                    "stop needs text, but the checkpoint has no tokenizer.json; use stop_token_ids", "stop"
                )
            params = with_word_tokens(params, self._tokenizer)
            self._engine.submit(Request(request_id, answer.prompt_token_ids, params))
        except (RequestError, CapacityError) as error:
            answer.fail(str(error))
            self._tell(answer)
            return
        self._open[request_id] = answer
        # Not before the scheduler has checked the token ids, which the tokenizer would not.
        answer.begin_text(self._tokenizer)

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return _TOKEN_IDS.check("prompt", prompt)
        if self._tokenizer is None:
            raise RequestError("the checkpoint has no tokenizer.json, so text cannot be read; give token ids", "prompt")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise RequestError("the prompt is not valid Unicode: it holds a lone surrogate", "prompt")
        return self._tokenizer.encode(prompt)

    def _take(self, delta: TokenDelta) -> None:
        answer = self._open.get(delta.request_id)
        if answer is None:  # ended by a stop text while a step was in flight
            return
        text = "".join(event.text for event in answer.collect(delta))
        if answer.finish_reason is not None:
            del self._open[delta.request_id]
            if delta.finish_reason is None:
                self._engine.cancel(delta.request_id)
        if self._progress is not None:
            self._progress(answer.index, dataclasses.replace(delta, finish_reason=answer.finish_reason), text)
        if answer.finish_reason is not None:
            self._tell(answer)

    def _tell(self, answer: Answer) -> None:
        if self._on_output is not None:
            self._on_output(answer.output())


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt, or many, as a list; a sequence of numbers is one prompt.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, dict)) or not isinstance(prompts, Iterable):
        raise RequestError(
            f"prompts={shown(prompts)} is neither a string, nor token ids, nor a list of prompts", "prompt"
        )
    listed: list[Any] = list(prompts)
    return [listed] if listed and all(isinstance(item, (int, float, np.number)) for item in listed) else listed


def one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, default: SamplingParams
) -> list[SamplingParams]:
    """Parameters for each of ``count`` prompts.

    Raises:
        RequestError: a value is not `SamplingParams`, or there are more or fewer than prompts.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or default] * count
    listed = list(params) if isinstance(params, Sequence) and not isinstance(params, str) else [params]
    if wrong := [one for one in listed if not isinstance(one, SamplingParams)]:
        raise RequestError(f"sampling_params holds {shown(wrong[0])}; use SamplingParams(...)", "sampling_params")
    if len(listed) != count:
        raise RequestError(f"{len(listed)} sampling_params for {count} prompts; give one, or one for each")
    return listed
