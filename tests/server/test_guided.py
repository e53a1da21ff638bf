"""What an answer must match, as clients say it: each spelling becomes one guide, and what cannot be compiled is a 400 at once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import msgspec
import pytest

from phalanx.runtime.sampling.guides import Guide
from phalanx.runtime.server import guides
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.openai.parsing import parse_chat, parse_completion

from .servers import Server
from .stub_server import GUIDE_TOKEN

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
LOOP = {"$ref": "#"}
AS_JSON = Guide("json", msgspec.json.encode(SCHEMA).decode())


def parsed(**fields: Any) -> Any:
    completion = parse_completion(msgspec.json.encode({"prompt": "a", **fields})).sampling.get("structured_outputs")
    body = {"messages": [{"role": "user", "content": "a"}], **fields}
    assert parse_chat(msgspec.json.encode(body)).sampling.get("structured_outputs") == completion
    return completion


@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}}, AS_JSON),
        ({"response_format": {"type": "json_object"}}, Guide("json", '{"type":"object"}')),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "guided_json": None, "structured_outputs": None}, None),
        ({"guided_json": SCHEMA}, AS_JSON),
        ({"guided_json": msgspec.json.encode(SCHEMA).decode(), "guided_regex": None}, AS_JSON),
        ({"guided_regex": "a+"}, Guide("regex", "a+")),
        ({"guided_grammar": 'start: "a"'}, Guide("grammar", 'start: "a"')),
        ({"guided_choice": ["a", "b"]}, Guide("choice", '["a","b"]')),
        ({"structured_outputs": {"json": SCHEMA}}, AS_JSON),
        ({"structured_outputs": {"choice": ["a"], "regex": None}, "response_format": {"type": "text"}}, Guide("choice", '["a"]')),
    ],
)  # fmt: skip
def test_every_spelling_becomes_one_guide(fields: dict[str, Any], guide: Guide | None) -> None:
    assert parsed(**fields) == guide


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format", "no known type"),
        ({"response_format": "json"}, "response_format", "no known type"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "leave one out"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "structured_outputs", "leave one out"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_choice": []}, "guided_choice", "not a list"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "give one of json"),
    ],
)
def test_malformed_ones_are_refused_by_the_name_that_the_client_used(
    fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        parsed(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("guide", [{"regex": "(("}, {"grammar": "start: x"}, {"json": {"$ref": "#"}}], ids=str)
def test_what_cannot_be_compiled_is_a_400_before_the_engine_sees_it(server: Server, guide: dict[str, Any]) -> None:
    answer = server.post("/v1/completions", {"prompt": "a", "structured_outputs": guide})
    assert answer.status == 400
    error = answer.json["error"]
    assert error["param"] == "structured_outputs"
    assert error["message"].startswith("structured_outputs cannot be compiled")


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/v1/completions", {"guided_regex": "(("}, "guided_regex"),
        ("/v1/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": LOOP}}}, "response_format"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": LOOP}}}, "text"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_by_the_name_that_the_client_used(
    server: Server, path: str, fields: dict[str, Any], name: str
) -> None:
    prompt = {"input": "a"} if path == "/v1/responses" else {"prompt": "a"}
    answer = server.post(path, prompt | fields)
    assert (answer.status, answer.json["error"]["param"]) == (400, name)
    assert answer.json["error"]["message"].startswith(f"{name} cannot be compiled")


def test_without_a_tokenizer_guides_are_refused(token_server: Server) -> None:
    answer = token_server.post("/v1/completions", {"prompt": [3], "structured_outputs": {"regex": "a"}})
    assert answer.status == 400
    assert "no tokenizer.json" in answer.json["error"]["message"]


def test_usable_guides_reach_the_engine_in_every_protocol(server: Server) -> None:
    answer = server.post("/v1/completions", {"prompt": "ab", "max_tokens": 3, "guided_regex": "(ab)+"})
    assert answer.json["choices"][0]["text"] == "aba"
    body = {
        "text_input": "ab", "max_tokens": 3, "guided_decoding_guide_type": "regex", "guided_decoding_guide": "(ab)+",
    }  # fmt: skip
    assert server.post("/v2/models/ensemble/generate", body).json["text_output"] == "ababa"
    body["guided_decoding_guide"] = "(("
    refused = server.post("/v2/models/ensemble/generate", body)
    assert refused.status == 400
    assert "cannot be compiled" in refused.json["error"]


class SlowCompiler:
    """Compiles until it is told that it may end."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def check(self, guide: Guide) -> None:
        assert self.may_end.wait(60)


def test_a_guide_that_takes_too_long_is_a_400_and_too_many_at_once_a_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides, "CHECK_SECONDS", 0.05)
    compiler = SlowCompiler()

    async def check_many() -> list[BaseException | None]:
        checker = guides.GuideChecker(compiler.check)
        checks = [checker.check(AS_JSON) for _ in range(guides.MOST_CHECKS + 1)]
        return await asyncio.gather(*checks, return_exceptions=True)

    try:
        *late, refused = asyncio.run(check_many())
    finally:
        compiler.may_end.set()
    assert isinstance(refused, ApiError)
    assert refused.status == 429
    assert {(error.status, "took longer" in str(error)) for error in late if isinstance(error, ApiError)} == {
        (400, True)
    }
    assert len(late) == guides.MOST_CHECKS


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"best_of": 3}])
def test_a_guide_that_fails_in_the_engine_is_a_400(server: Server, fields: dict[str, Any]) -> None:
    answer = server.post("/v1/completions", {"prompt": [5, GUIDE_TOKEN], "max_tokens": 9, **fields})
    assert (answer.status, answer.error["param"]) == (400, "structured_outputs")
    assert answer.error["message"] == "no token fits structured_outputs any more"


def test_a_stream_whose_guide_fails_has_the_status_or_an_event_that_says_so(server: Server) -> None:
    early = server.post("/v1/completions", {"prompt": [GUIDE_TOKEN], "max_tokens": 9, "stream": True})
    assert (early.status, early.error["type"]) == (400, "invalid_request_error")
    *tokens, last = server.stream(
        "/v1/completions", {"prompt": [5, 6, GUIDE_TOKEN], "max_tokens": 9, "return_token_ids": True}
    )
    assert [token for event in tokens for token in event["choices"][0]["token_ids"]] == [5, 6]
    assert (last["error"]["type"], last["error"]["param"]) == ("invalid_request_error", "structured_outputs")
