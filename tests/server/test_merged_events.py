"""Tokens of a stream that are ready together go out in one event, which says of each what single events would have said."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from phalanx.runtime.answer import Answer
from phalanx.runtime.request import Logprob, SamplingParams, TokenDelta
from phalanx.runtime.server.anthropic.parsing import parse_message
from phalanx.runtime.server.board import Board, Room
from phalanx.runtime.server.kserve.answers import EventChunks
from phalanx.runtime.server.kserve.contract import MODELS
from phalanx.runtime.server.kserve.parsing import parse_rows
from phalanx.runtime.server.link.messages import Deltas, Failed, encode_frame
from phalanx.runtime.server.metrics import INTER_TOKEN_SECONDS, Histogram, Metrics
from phalanx.runtime.server.openai.answer_format import Served, StreamChunks
from phalanx.runtime.server.openai.generation import GenerationStream
from phalanx.runtime.server.openai.generation_job import GenerationJob
from phalanx.runtime.server.openai.parsing import ApiGeneration, parse_chat, parse_completion
from phalanx.runtime.server.responses.parsing import parse_response
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.time_limit import TimeLimit
from phalanx.runtime.server.web.event_stream import EventWriter
from phalanx.runtime.text import Tokenizer

from .engine_clients import connect, make_client

HI = [{"role": "user", "content": "hi"}]
PARSERS: dict[str, tuple[Callable[[bytes], ApiGeneration], dict[str, Any]]] = {
    "completion": (parse_completion, {"prompt": "p"}),
    "chat": (parse_chat, {"messages": HI}),
    "response": (parse_response, {"input": "hi"}),
    "message": (parse_message, {"messages": HI, "max_tokens": 9}),
}


SHORT = SamplingParams(max_tokens=9)


class Connection:
    """What a client has received; it reads while ``is_writable``."""

    is_lost = False

    def __init__(self) -> None:
        self.is_writable = True
        self.writes: list[bytes] = []
        self._callback: Callable[[], None] | None = None

    def write_body(self, data: bytes) -> None:
        self.writes.append(data)

    def call_when_writable(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    def call_when_lost(self, callback: Callable[[], None] | None) -> None:
        """It stays."""

    def catch_up(self) -> None:
        self.is_writable = True
        assert self._callback is not None
        self._callback()

    def take(self) -> list[Any]:
        """The events since the last call."""
        data, self.writes = b"".join(self.writes), []
        lines = [line.removeprefix("data: ") for line in data.decode().split("\n") if line.startswith("data: {")]
        return [json.loads(line) for line in lines]


class Streamed:
    """A stream whose engine is this test."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        n: int,
        chunks: Callable[[GenerationJob], StreamChunks],
        params: SamplingParams = SHORT,
    ) -> None:
        self.client = make_client()
        connect(self.client)
        board = Board.of_one()
        metrics, workers = Metrics(board, Room(board)), ThreadPoolExecutor(1)
        services = Services(self.client, FrontendSettings(), metrics, workers, tokenizer)
        self.job = GenerationJob(services, n, TimeLimit(0.0))
        self.job.submit([((1,), params)])
        self.connection = Connection()
        self.writer = EventWriter(self.connection)
        GenerationStream(self.job, chunks(self.job), []).start(self.writer)

    async def tell(self, *messages: Deltas) -> list[Any]:
        """The events after messages that arrive in the same turn of the loop; those before are forgotten."""
        self.connection.take()
        for message in messages:
            self.client.data_received(encode_frame(message))
        await asyncio.sleep(0)
        return self.connection.take()

    def close(self) -> None:
        self.job.close()
        self.writer.close()


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(model_directory)


def streamed(tokenizer: Tokenizer, kind: str, params: SamplingParams = SHORT, **fields: Any) -> Streamed:
    parse, body = PARSERS[kind]
    generation = parse(json.dumps({**body, **fields, "stream": True}).encode())
    reply = generation.reply(Served("m", tokenizer))
    return Streamed(tokenizer, generation.n, lambda job: reply.stream(job.usage), params)


def plain(tokenizer: Tokenizer, text: str, choice: int = 0) -> list[Deltas]:
    """A step for each token of ``text``."""
    return [Deltas([f"0-{choice}"], [token_id], []) for token_id in tokenizer.encode(text, add_special_tokens=False)]


def scored(tokenizer: Tokenizer, text: str, reason: Any = None) -> list[Deltas]:
    """The same with log-probabilities -1, -2, ... and a reason for the end with the last."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = [
        TokenDelta("0-0", (token_id,), (Logprob(token_id, -float(number), ((token_id, -float(number)),)),))
        for number, token_id in enumerate(ids, 1)
    ]
    last = TokenDelta("0-0", deltas[-1].token_ids, deltas[-1].logprobs, finish_reason=reason)
    return [Deltas([], [], [delta]) for delta in [*deltas[:-1], last]]


TEXTS: dict[str, Callable[[Any], Any]] = {
    "completion": lambda event: event["choices"][0]["text"],
    "chat": lambda event: event["choices"][0]["delta"].get("content"),
    "response": lambda event: event.get("delta"),
    "message": lambda event: event.get("delta", {}).get("text"),
}


def texts(kind: str, events: Sequence[Any]) -> list[Any]:
    return [text for text in map(TEXTS[kind], events) if text is not None]


@pytest.mark.parametrize("kind", PARSERS)
def test_plain_tokens_are_one_event(kind: str, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        stream = streamed(tokenizer, kind)
        assert texts(kind, await stream.tell(*plain(tokenizer, "See"))) == ["See"]
        assert texts(kind, await stream.tell(*plain(tokenizer, " Oslo"))) == [" Oslo"]
        assert texts(kind, await stream.tell(*plain(tokenizer, "."))) == ["."]
        stream.close()

    asyncio.run(run())


@pytest.mark.parametrize("kind", PARSERS)
def test_a_client_that_reads_again_gets_all_in_one_event_and_then_the_end(kind: str, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        stream = streamed(tokenizer, kind)
        await stream.tell(*plain(tokenizer, "a"))
        stream.connection.is_writable = False
        assert await stream.tell(*plain(tokenizer, "bcd"), *scored(tokenizer, "ef", "length")) == []
        stream.connection.catch_up()
        assert texts(kind, stream.connection.take()) == ["bcdef"]
        assert stream.writer.is_finished
        stream.close()

    asyncio.run(run())


@pytest.mark.parametrize("kind", PARSERS)
def test_plain_next_tokens_are_written_as_all_others_are(
    kind: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their way from token ids to bytes is shorter; where ``is_plain_text`` is False it is not taken."""
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))
    monkeypatch.setattr(time, "time", lambda: 7.0)
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)

    async def run(is_plain: bool) -> tuple[list[bytes], list[str]]:
        monkeypatch.setattr(Answer, "is_plain_text", property(lambda answer: is_plain))
        short_way, texts = Answer.extend_text, []
        monkeypatch.setattr(Answer, "extend_text", lambda *given: texts.append(short_way(*given)) or texts[-1])
        stream = streamed(tokenizer, kind)
        for step in [
            *plain(tokenizer, 'a "quoted" \u00fc, \U0001f389 and \\ the'),
            *scored(tokenizer, " end", "length"),
        ]:
            stream.client.data_received(encode_frame(step))
            await asyncio.sleep(0)
        assert stream.job.choices[0].num_tokens == stream.job.usage()["completion_tokens"]
        stream.close()
        assert bool(texts) == is_plain
        metrics = stream.job.services.metrics.render().decode().splitlines()
        return stream.connection.writes, [
            line for line in metrics if re.match(r"phalanx_\w+_(count|sum|total)\b", line)
        ]

    assert asyncio.run(run(True)) == asyncio.run(run(False))


@pytest.mark.parametrize("kind", PARSERS)
def test_an_engine_that_fails_after_a_stop_text_adds_nothing_to_the_end(kind: str, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        stream = streamed(tokenizer, kind, params=SamplingParams(max_tokens=9, stop=("END",)))
        await stream.tell(*plain(tokenizer, "a"))
        stream.connection.is_writable = False
        await stream.tell(*plain(tokenizer, "bcENDde"))
        stream.client.data_received(encode_frame(Failed("rank 1 has ended")))
        await asyncio.sleep(0)
        stream.connection.catch_up()
        text = b"".join(stream.connection.writes).decode()
        assert "engine stopped" not in text
        assert text.count("[DONE]") == (kind in ("completion", "chat"))
        stream.close()

    asyncio.run(run())


def test_next_tokens_are_in_the_metrics_when_the_turn_is_over() -> None:
    board = Board.of_one()
    metrics = Metrics(board, Room(board))

    async def run() -> bytes:
        for seconds in (0.001, 0.0011, 3.0, 100.0):
            metrics.next_tokens.add(2, seconds)
        assert b"phalanx_generation_tokens_total 0.0" in metrics.render()
        await asyncio.sleep(0)
        return metrics.render()

    one_by_one = Histogram(board, CollectorRegistry(), "each", "Each", INTER_TOKEN_SECONDS)
    for seconds in (0.001, 0.0011, 3.0, 100.0):
        one_by_one.observe(seconds)
    text = asyncio.run(run()).decode()
    assert "phalanx_generation_tokens_total 8.0" in text
    (family,) = one_by_one.collect()
    for sample in family.samples:
        name = sample.name.replace("each", "phalanx_inter_token_latency_seconds")
        labels = "".join(f'{{le="{bound}"}}' for bound in sample.labels.values())
        assert f"{name}{labels} {sample.value}" in text


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_each_choice_has_its_own_event(kind: str, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        stream = streamed(tokenizer, kind, n=2)
        steps = zip(plain(tokenizer, "abc"), plain(tokenizer, "xyz", 1), strict=True)
        events = await stream.tell(*(delta for step in steps for delta in step))
        assert [(event["choices"][0]["index"], TEXTS[kind](event)) for event in events] == [(0, "abc"), (1, "xyz")]
        stream.close()

    asyncio.run(run())


def test_lists_of_a_completion_follow_one_another(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        stream = streamed(tokenizer, "completion", logprobs=1, return_token_ids=True)
        (first,) = await stream.tell(*scored(tokenizer, "ab"))
        (second,) = await stream.tell(*scored(tokenizer, "c", "stop"))
        first, second = first["choices"][0], second["choices"][0]
        assert (first["text"], first["finish_reason"], second["finish_reason"]) == ("ab", None, "stop")
        assert tuple(first["token_ids"]) == tokenizer.encode("ab", add_special_tokens=False)
        assert first["logprobs"] == {
            "tokens": ["a", "b"],
            "token_logprobs": [-1.0, -2.0],
            "top_logprobs": [{"a": -1.0}, {"b": -2.0}],
            "text_offset": [0, 1],
        }
        assert second["logprobs"]["text_offset"] == [2]
        stream.close()

    asyncio.run(run())


def test_log_probabilities_of_a_chat_follow_one_another(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        stream = streamed(tokenizer, "chat", logprobs=True, top_logprobs=1)
        event, last = await stream.tell(*scored(tokenizer, "ab", "stop"))
        entries = event["choices"][0]["logprobs"]["content"]
        assert [(entry["token"], entry["logprob"]) for entry in entries] == [("a", -1.0), ("b", -2.0)]
        assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
        stream.close()

    asyncio.run(run())


def test_a_response_of_tritons_backend_may_hold_several_tokens(tokenizer: Tokenizer) -> None:
    """It sends what is new since its last response, of each token that the log-probabilities cover."""

    async def run() -> None:
        row = {"text_input": "p", "max_tokens": 9, "stream": True, "return_log_probs": True}
        query = parse_rows(MODELS["ensemble"], [row], 400)
        stream = Streamed(tokenizer, 1, lambda job: EventChunks(MODELS["ensemble"], query, ""))
        (event,) = await stream.tell(*scored(tokenizer, "ab"))
        assert (event["text_output"], event["output_log_probs"], event["cum_log_probs"]) == ("ab", [-1.0, -2.0], -3.0)
        stream.close()

    asyncio.run(run())
