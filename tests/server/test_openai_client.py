"""The official client, synchronous and asynchronous, unmodified."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from .servers import Server, stub_server

HI = [{"role": "user", "content": "hi"}]
PROMPT = "[user]hi>"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stub", "org/stub"]
    assert client.models.retrieve("org/stub").owned_by == "phalanx"


def test_completion(client: openai.OpenAI) -> None:
    result = client.completions.create(model="stub", prompt="abc", max_tokens=4, logprobs=1, echo=True)
    assert result.choices[0].text == "abcabca"
    assert result.choices[0].logprobs is not None
    assert result.choices[0].logprobs.token_logprobs == [None, *[-0.5] * 6]
    assert result.usage is not None
    assert result.usage.completion_tokens == 4


def test_completion_stream(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="stub", prompt="é🙂", max_tokens=6, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "é🙂"
    assert 1 <= len(chunks) <= 6
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat(client: openai.OpenAI) -> None:
    result = client.chat.completions.create(
        model="stub", messages=HI, max_completion_tokens=len(PROMPT), logprobs=True, top_logprobs=2
    )
    assert result.choices[0].message.content == PROMPT
    logprobs = result.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * len(PROMPT)


def test_chat_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="stub",
        messages=HI,
        max_tokens=len(PROMPT),
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == PROMPT
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(PROMPT)


def test_stream_helper_adds_chunks_up(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="stub", messages=HI, stop="]") as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == "[user"
    assert completion.choices[0].finish_reason == "stop"


def test_many_at_once(server: Server) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=9) as client:

            async def ask(number: int) -> str:
                stream = await client.completions.create(model="stub", prompt=f"<{number}>", max_tokens=5, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(ask(number) for number in range(30)))

    assert asyncio.run(ask_all()) == [(f"<{number}>" * 3)[:5] for number in range(30)]


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": 9999}, openai.BadRequestError, "context_length_exceeded"),
        ({"suffix": "x"}, openai.BadRequestError, "unsupported_parameter"),
        ({"prompt": [14]}, openai.RateLimitError, "queue_full"),
        ({"prompt": [12, 30]}, openai.InternalServerError, "generation_failed"),
    ],
)
def test_errors_become_the_clients_own(
    client: openai.OpenAI, fields: dict[str, object], error: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "stub", "prompt": "a", **fields})  # type: ignore[call-overload]
    assert caught.value.code == code


def test_an_error_inside_a_stream_is_raised(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="logits are not finite"):
        list(client.completions.create(model="stub", prompt=[12, 30], stream=True))


def test_a_client_that_closes_a_stream_ends_its_request(model_directory: Path) -> None:
    with stub_server(model_directory, {"model_names": ["stub"]}, step_seconds=0.02) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with client.completions.create(model="stub", prompt="ab", max_tokens=250, stream=True) as stream:
            assert next(iter(stream)).choices[0].text.startswith("a")
        server.wait_for("CANCELLED")
        client.close()
