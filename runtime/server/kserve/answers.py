# SPDX-License-Identifier: Apache-2.0
"""From answers to the output tensors of the models that generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.kserve.contract import ModelContract
from phalanx.runtime.server.kserve.parsing import Query
from phalanx.runtime.server.kserve.tensors import Tensor

__all__ = ["EventChunks", "event", "piece", "scalars", "whole"]


def whole(contract: ModelContract, query: Query, choices: Sequence[Answer]) -> list[Tensor]:
    """The outputs of finished answers: ``[rows x answers]`` texts, ``[rows, answers, ...]`` everything else."""
    n = query.n
    if contract.name == "tensorrt_llm":
        tokens = [
            [*(choice.prompt_token_ids if query.includes_prompt else ()), *_token_ids(choice.events)]
            for choice in choices
        ]
        outputs = [
            Tensor.of("output_ids", "INT32", _padded(tokens).reshape(len(choices) // n, n, -1)),
            Tensor.of("sequence_length", "INT32", np.reshape([len(row) for row in tokens], (-1, n))),
        ]
    else:
        prompts = [query.rows[choice.index // n].prompts[0] if query.includes_prompt else "" for choice in choices]
        texts = [f"{prompt}{_text(choice.events)}" for prompt, choice in zip(prompts, choices, strict=True)]
        outputs = [Tensor.of("text_output", "BYTES", texts)]
    indices = np.arange(len(choices), dtype=np.int32)
    outputs += _scores(query, [choice.events for choice in choices])
    outputs += [
        Tensor.of("batch_index", "INT32", (indices // n).reshape(-1, n)),
        Tensor.of("sequence_index", "INT32", (indices % n).reshape(-1, n)),
    ]
    return outputs + _counts(query, choices)


def piece(contract: ModelContract, query: Query, choice: Answer, events: Sequence[TokenEvent]) -> list[Tensor]:
    """The outputs of one response of a stream: what is new of one answer."""
    n = query.n
    if contract.name == "tensorrt_llm":
        token_ids = _token_ids(events)
        outputs = [
            Tensor.of("output_ids", "INT32", np.reshape(np.array(token_ids, np.int32), (1, 1, -1))),
            Tensor.of("sequence_length", "INT32", [[len(token_ids)]]),
        ]
    else:
        outputs = [Tensor.of("text_output", "BYTES", [_text(events)])]
    outputs += _scores(query, [events], 1)
    outputs += [
        Tensor.of("batch_index", "INT32", [[choice.index // n]]),
        Tensor.of("sequence_index", "INT32", [[choice.index % n]]),
    ]
    return outputs + _counts(query, [choice], 1)


def scalars(contract: ModelContract, outputs: Sequence[Tensor], request_id: str) -> dict[str, Any]:
    """A response of ``generate``: outputs of one element are scalars, others lists."""
    answer: dict[str, Any] = {"model_name": contract.name, "model_version": "1"}
    if request_id:
        answer["id"] = request_id
    answer |= {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
    answer |= {"context_logits": 0.0, "generation_logits": 0.0}
    for tensor in outputs:
        values = tensor.array.ravel().tolist()
        texts = [value.decode() if isinstance(value, bytes) else value for value in values]
        answer[tensor.name] = texts[0] if len(texts) == 1 else texts
    return answer


def event(value: dict[str, Any]) -> bytes:
    """One event of ``generate_stream``."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventChunks:
    """Events of ``generate_stream``; see `StreamChunks`."""

    done = b""

    def __init__(self, contract: ModelContract, query: Query, request_id: str) -> None:
        self._contract, self._query, self._id = contract, query, request_id

    def opening(self, choices: Sequence[Answer]) -> bytes:
        return b""

    def tokens(self, choice: Answer, events: Sequence[TokenEvent]) -> bytes:
        return event(scalars(self._contract, piece(self._contract, self._query, choice, events), self._id))

    def text_writer(self, choice: Answer) -> Callable[[str], bytes] | None:
        return None

    def usage(self) -> bytes:
        return b""

    def error(self, error: ApiError) -> bytes:
        return event({"error": str(error)})


def _text(events: Sequence[TokenEvent]) -> str:
    return "".join(item.text for item in events)


def _token_ids(events: Sequence[TokenEvent]) -> list[int]:
    return [item.token_id for item in events if item.token_id is not None]


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    padded = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _scores(query: Query, answers: Sequence[Sequence[TokenEvent]], n: int | None = None) -> list[Tensor]:
    """``cum_log_probs`` ``[rows, answers]`` and ``output_log_probs`` ``[rows, answers, tokens]``; zeros if not asked for."""
    n = query.n if n is None else n
    scores = [[item.logprob.logprob for item in events if item.logprob is not None] for events in answers]
    padded = np.zeros((len(scores), max(1, *map(len, scores))), np.float32)
    for target, row in zip(padded, scores, strict=True):
        target[: len(row)] = row
    return [
        Tensor.of("cum_log_probs", "FP32", padded.sum(axis=1).reshape(-1, n)),
        Tensor.of("output_log_probs", "FP32", padded.reshape(-1, n, padded.shape[1])),
    ]


def _counts(query: Query, choices: Sequence[Answer], n: int | None = None) -> list[Tensor]:
    n = query.n if n is None else n
    numbers = {
        "num_input_tokens": [len(choice.prompt_token_ids) for choice in choices],
        "num_output_tokens": [choice.num_tokens for choice in choices],
    }
    return [
        Tensor.of(name, "INT32", np.reshape(values, (-1, n)))
        for name, values in numbers.items()
        if name in query.counts
    ]
