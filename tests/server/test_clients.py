"""Clients as people use them, unmodified, against a whole job of two ranks that serves the demo checkpoint."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import numpy as np
import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from tokenizers import Tokenizer

from tests.support.float64_llama import Float64Llama
from tests.text.chat_templates import HERMES

from .jobs import Job, serve
from .servers import ROOT

DEMO = ROOT / "checkpoints" / "demo"
MODEL = "phalanx-demo"
QUESTION = "Write a function that adds two numbers."
CHAT: list[Any] = [{"role": "user", "content": QUESTION}]


CITIES = ["Oslo", "Rome"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": CITIES}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "strict": True, "parameters": SCHEMA}}
    for name in ("weather", "news")
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The demo checkpoint with a chat template that takes tools."""
    model = tmp_path_factory.mktemp("models") / MODEL
    shutil.copytree(DEMO, model)
    (model / "chat_template.jinja").write_text(HERMES)
    with serve(2, "--model", str(model), "--dtype", "float32", "--scheduling-policy", "priority") as running:
        yield running


@pytest.fixture
def client(job: Job) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{job.server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference() -> Float64Llama:
    return Float64Llama(DEMO)


@pytest.fixture(scope="module")
def answer(job: Job) -> str:
    """What the model says to the question, greedily; every client must get the same."""
    body = {"messages": CHAT, "max_tokens": 12, "temperature": 0}
    return str(job.server.post("/v1/chat/completions", body).json["choices"][0]["message"]["content"])


def lm_eval_body(tokens: list[list[int]]) -> dict[str, Any]:
    """What lm-eval 0.4 sends for log-likelihoods (``LocalCompletionsAPI._create_payload``)."""
    return {
        "model": MODEL,
        "prompt": tokens,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def test_lm_evals_log_likelihoods_are_those_of_the_reference(job: Job, reference: Float64Llama) -> None:
    encode = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode
    pairs = [
        ("def add(a, b):\n    return", " a + b"),
        ("import", " os"),
        ("class Error(", "Exception): pass"),
        ("x =", " qqqq"),
    ]
    contexts = [encode(context).ids for context, _ in pairs]
    sequences = [
        context + encode(continuation, add_special_tokens=False).ids
        for context, (_, continuation) in zip(contexts, pairs, strict=True)
    ]
    choices = job.server.post("/v1/completions", lm_eval_body(sequences)).json["choices"]
    greedy = []
    for choice, tokens, context in zip(sorted(choices, key=lambda one: one["index"]), sequences, contexts, strict=True):
        length, logprobs = len(context), choice["logprobs"]
        found, top = logprobs["token_logprobs"][length:-1], logprobs["top_logprobs"][length:-1]
        rows = reference.log_probabilities(tokens)[length - 1 : -1]
        expected = [row[token] for row, token in zip(rows, tokens[length:], strict=True)]
        assert sum(found) == pytest.approx(sum(expected), abs=1e-4)
        is_greedy = all(value == max(alternatives.values()) for value, alternatives in zip(found, top, strict=True))
        assert is_greedy == (np.argmax(rows, axis=-1).tolist() == tokens[length:])
        greedy.append(is_greedy)
    assert len(set(greedy)) == 2, "the cases should hold both"


def test_prompt_logprobs_are_those_of_the_reference(client: openai.OpenAI, reference: Float64Llama) -> None:
    tokens = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode("def add(a, b):\n    return").ids
    extra: dict[str, Any] = {"prompt_logprobs": 3}
    choice = client.completions.create(model=MODEL, prompt=tokens, max_tokens=1, extra_body=extra).choices[0]
    first, *others = choice.model_dump()["prompt_logprobs"]
    assert first is None
    for entry, token, row in zip(others, tokens[1:], reference.log_probabilities(tokens)[:-1], strict=True):
        assert {int(one): value["logprob"] for one, value in entry.items()} == pytest.approx(
            {one: row[one] for one in {token, *np.argsort(-row)[:3].tolist()}}, abs=1e-4
        )
        place = int((row > row[token]).sum()) + 1
        assert entry[str(token)]["rank"] == (place if place <= 3 else None)
    chat = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=1, extra_body=extra)
    assert chat.usage is not None
    assert len(chat.model_dump()["prompt_logprobs"]) == chat.usage.prompt_tokens


def test_an_echo_of_the_prompt_alone_needs_no_step(client: openai.OpenAI) -> None:
    """An idle server left it unanswered until another request came."""
    whole = client.completions.create(model=MODEL, prompt="def f", echo=True, max_tokens=0, timeout=60).choices[0]
    assert (whole.text, whole.finish_reason) == ("def f", "length")
    stream = client.completions.create(model=MODEL, prompt="def f", echo=True, max_tokens=0, stream=True, timeout=60)
    assert "".join(chunk.choices[0].text for chunk in stream) == "def f"


def test_lm_evals_generations_stop_where_it_says(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "seed": 1234}
    whole = client.completions.create(model=MODEL, prompt="def main(", **fields).choices[0].text
    until = whole[5:7]
    cut = client.completions.create(model=MODEL, prompt="def main(", stop=["never comes up", until], **fields).choices[
        0
    ]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(until)], "stop")


def test_the_routes_of_its_remote_tokenizer(job: Job) -> None:
    info = job.server.get("/tokenizer_info").json
    assert {"eos_token", "bos_token"} <= set(info)
    tokens = job.server.post("/tokenize", {"prompt": "def f():", "add_special_tokens": False}).json["tokens"]
    assert job.server.post("/detokenize", {"tokens": tokens}).json == {"prompt": "def f():"}


def test_what_the_prefix_cache_holds_is_shared_within_a_salt_only(job: Job) -> None:
    def num_cached(salt: str | None) -> int:
        body = {"prompt": QUESTION * 20, "max_tokens": 1, "cache_salt": salt}
        answer = job.server.post("/v1/completions", body).json
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [num_cached(salt) for salt in ("one", "two", None)] == [0, 0, 0]
    assert all(num_cached(salt) > 0 for salt in ("one", "two", None, ""))


def test_best_of_returns_the_most_probable_of_the_same_candidates(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "prompt": "def",
        "max_tokens": 6,
        "seed": 7,
        "temperature": 1.0,
        "logprobs": 0,
    }
    all_of_them = client.completions.create(n=4, **fields).choices
    scores = [float(np.mean(choice.logprobs.token_logprobs)) for choice in all_of_them if choice.logprobs is not None]
    order = sorted(range(4), key=lambda index: -scores[index])
    best = client.completions.create(n=2, best_of=4, **fields).choices
    assert [choice.text for choice in best] == [all_of_them[index].text for index in order[:2]]


def test_openai_chat_responses_and_streams(client: openai.OpenAI, answer: str) -> None:
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0}
    whole = client.chat.completions.create(messages=CHAT, max_completion_tokens=12, **fields)
    assert whole.choices[0].message.content == answer
    stream = client.chat.completions.create(messages=CHAT, max_tokens=12, stream=True, **fields)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer
    assert client.responses.create(input=QUESTION, max_output_tokens=12, **fields).output_text == answer


def test_a_call_can_be_required_or_named(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": CHAT, "tools": TOOLS, "temperature": 1, "max_tokens": 100}
    for seed in range(3):
        choice = client.chat.completions.create(tool_choice="required", seed=seed, **fields).choices[0]
        assert choice.finish_reason == "tool_calls"
        for call in choice.message.tool_calls or []:
            assert call.type == "function"
            assert call.function.name in ("weather", "news")
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    named: Any = {"type": "function", "function": {"name": "news"}}
    with client.chat.completions.stream(tool_choice=named, seed=1, **fields) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert call.function.name == "news"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_strict_tools_leave_the_model_free_to_call(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(model=MODEL, messages=CHAT, tools=TOOLS, max_tokens=8).choices[0].message
    assert message.content or message.tool_calls
    functions: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    assert client.responses.create(model=MODEL, input=QUESTION, tools=functions, max_output_tokens=8).output


def test_tools_and_a_format_of_the_answer_go_together(client: openai.OpenAI) -> None:
    """An agent with typed outputs: each answer is a call or what the format says; with a forced call it is one."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for seed in range(2):
        choice = client.chat.completions.create(
            model=MODEL, messages=CHAT, tools=TOOLS, response_format=form, max_tokens=60, seed=seed
        ).choices[0]  # fmt: skip
        if choice.finish_reason == "length":
            continue
        message = choice.message
        found = [call.function.arguments for call in message.tool_calls or () if call.type == "function"]
        for text in found or [message.content or ""]:
            jsonschema.validate(json.loads(text), SCHEMA)
    forced = client.chat.completions.create(
        model=MODEL, messages=CHAT, tools=TOOLS, response_format=form, max_tokens=200, tool_choice="required", seed=1
    )
    assert forced.choices[0].message.tool_calls


def test_required_calls_and_formats_in_the_other_protocols(job: Job, client: openai.OpenAI) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    response = client.responses.create(model=MODEL, input=QUESTION, text=text, temperature=0, max_output_tokens=100)
    jsonschema.validate(json.loads(response.output_text), SCHEMA)
    with anthropic.Anthropic(base_url=job.server.url, api_key="none", max_retries=0) as other:
        message = other.messages.create(
            model=MODEL,
            max_tokens=200,
            messages=CHAT,
            tools=[{"name": "weather", "input_schema": SCHEMA}],
            tool_choice={"type": "any"},
            extra_body={"temperature": 0},
        )
        config: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
        formatted = other.messages.create(
            model=MODEL, max_tokens=200, messages=CHAT, output_config=config, extra_body={"temperature": 0}
        )
        (answer,) = formatted.content
        assert answer.type == "text"
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert message.stop_reason == "tool_use"
    for block in message.content:
        assert block.type == "tool_use"
        jsonschema.validate(block.input, SCHEMA)


def test_a_priority_changes_no_answer(client: openai.OpenAI, answer: str) -> None:
    for priority in (-3, 0, 2**31 - 1):
        found = client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=12, temperature=0, n=2, extra_body={"priority": priority}
        )
        assert [choice.message.content for choice in found.choices] == [answer] * 2


def test_openai_asynchronously(job: Job, answer: str) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{job.server.url}/v1", api_key="none", max_retries=0) as client:
            made = [
                client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=12, temperature=0)
                for _ in range(8)
            ]
            return [completion.choices[0].message.content for completion in await asyncio.gather(*made)]

    assert asyncio.run(ask_all()) == [answer] * 8


def test_anthropic(job: Job, answer: str) -> None:
    with anthropic.Anthropic(base_url=job.server.url, api_key="none", max_retries=0) as client:
        greedy = {"temperature": 0}
        message = client.messages.create(model=MODEL, max_tokens=12, messages=CHAT, extra_body=greedy)
        assert message.content[0].type == "text"
        assert message.content[0].text == answer
        with client.messages.stream(model=MODEL, max_tokens=12, messages=CHAT, extra_body=greedy) as stream:
            assert "".join(stream.text_stream) == answer


def test_langchain(job: Job, answer: str) -> None:
    model = ChatOpenAI(
        base_url=f"{job.server.url}/v1", api_key=SecretStr("none"), model=MODEL, temperature=0, max_completion_tokens=12, max_retries=0
    )  # fmt: skip
    result = model.invoke([HumanMessage(QUESTION)])
    assert result.content == answer
    assert result.usage_metadata is not None
    assert result.usage_metadata["output_tokens"] == 12
    assert "".join(str(chunk.content) for chunk in model.stream([HumanMessage(QUESTION)])) == answer
    with_system = model.invoke([SystemMessage("Be brief."), HumanMessage(QUESTION)])
    assert with_system.usage_metadata is not None
    assert with_system.usage_metadata["input_tokens"] > result.usage_metadata["input_tokens"]


def test_sglangs_benchmark_for_triton(job: Job) -> None:
    """What ``sglang.bench_serving --backend trt`` posts, and how it reads the events."""
    body = {
        "accumulate_tokens": True, "text_input": "def main(", "temperature": 0.000001, "top_p": 1.0, "max_tokens": 10, "stream": True,
        "min_length": 10, "end_id": 1048576,
    }  # fmt: skip
    answer = job.server.post("/v2/models/ensemble/generate_stream", body)
    assert answer.status == 200
    events = [
        json.loads(line.removeprefix("data:")) for line in answer.body.decode().splitlines() if line.startswith("data:")
    ]
    assert 0 < len(events) <= 10
    assert all(isinstance(event["text_output"], str) for event in events)


def test_vllms_benchmark(job: Job) -> None:
    """What ``vllm bench serve`` posts to completions and to chat, with parts."""
    common = {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    completion = {**common, "prompt": "def", "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None}
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    chat = {**common, "messages": parts, "max_completion_tokens": 8}
    for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat)):
        events = job.server.stream(path, body)
        assert events[-1]["usage"]["completion_tokens"] == 8
        assert events[-2]["choices"][0]["finish_reason"] == "length"


def test_the_reference_is_one(reference: Float64Llama) -> None:
    """It agrees with what transformers gave for the same checkpoint (tests/demo/reference.json)."""
    recorded = json.loads((ROOT / "tests" / "demo" / "reference.json").read_text())["greedy"][0]
    tokens = [*recorded["prompt_token_ids"], *recorded["token_ids"]]
    rows = reference.log_probabilities(tokens)
    assert rows.argmax(axis=-1).tolist()[len(recorded["prompt_token_ids"]) - 1 : -1] == recorded["token_ids"]
    assert math.isclose(float(np.exp(rows[0]).sum()), 1.0)
