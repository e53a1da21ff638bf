"""Whatever a client sends, it gets a 4xx with the right error object, and the server stays well."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .servers import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]

COMPLETION_FIELDS: list[tuple[str, Any, str | None]] = [
    # field, value, param of the error where it is not the field's name
    ("best_of", 0, None),
    ("best_of", 129, None),
    ("echo", "yes", None),
    ("echo", 1, None),
    ("frequency_penalty", 2.1, None),
    ("guided_json", 5, None),
    ("ignore_eos", "true", None),
    ("logit_bias", {"5": 101}, None),
    ("logit_bias", {"five": 1.0}, None),
    ("logit_bias", {"4294967296": 1.0}, None),
    ("logit_bias", [5, 6], None),
    ("logprobs", -1, None),
    ("logprobs", 21, None),
    ("logprobs", True, None),
    ("max_tokens", -1, None),
    ("max_tokens", 0, None),
    ("max_tokens", 1.5, None),
    ("max_tokens", "5", None),
    ("max_tokens", 254, None),
    ("max_tokens", 2**70, None),
    ("min_p", -0.1, None),
    ("min_p", 1.1, None),
    ("min_tokens", -1, None),
    ("min_tokens", 17, None),
    ("model", 5, None),
    ("n", 0, None),
    ("n", -1, None),
    ("n", 129, None),
    ("n", 10**9, None),
    ("n", 9, None),
    ("n", 1.5, None),
    ("presence_penalty", -2.1, None),
    ("prompt", "", None),
    ("prompt", None, None),
    ("prompt", [], None),
    ("prompt", [""], None),
    ("prompt", [[]], None),
    ("prompt", ["a", 5], None),
    ("prompt", [5, "a"], None),
    ("prompt", [[5], "a"], None),
    ("prompt", {"text": "a"}, None),
    ("prompt", 5, None),
    ("prompt", True, None),
    ("prompt", [-1], None),
    ("prompt", [400], None),
    ("prompt", [2**31], None),
    ("prompt", [2**63], None),
    ("prompt", [2**64], None),
    ("prompt", [10**40], None),
    ("prompt", [1.5], None),
    ("prompt", [[5, "a"]], None),
    ("prompt", [[[5]]], None),
    ("prompt", "a" * 256, None),
    ("prompt", "a" * 50_000, None),
    ("prompt", ["ab"] * 9, "n"),
    ("priority", 2**31, None),
    ("priority", 0.5, None),
    ("prompt_logprobs", -1, None),
    ("prompt_logprobs", 21, None),
    ("prompt_logprobs", True, None),
    ("repetition_penalty", 0, None),
    ("response_format", {"type": "xml"}, None),
    ("seed", 2**64, None),
    ("seed", -(2**63) - 1, None),
    ("seed", 1.5, None),
    ("seed", "1", None),
    ("stop", "", None),
    ("stop", ["a", ""], None),
    ("stop", ["a"] * 17, None),
    ("stop", ["a"] * 10_000, None),
    ("stop", "a" * 1025, None),
    ("stop", [5], None),
    ("stop", {"a": 1}, None),
    ("stop_token_ids", [-1], None),
    ("stop_token_ids", [2**40], None),
    ("stop_token_ids", list(range(20)) * 60, None),
    ("stream", "true", None),
    ("stream_options", {"include_usage": True}, None),
    ("stream_options", {"unknown": True}, "unknown"),
    ("structured_outputs", {"choice": []}, None),
    ("suffix", "end", None),
    ("temperature", -0.1, None),
    ("temperature", 2.1, None),
    ("temperature", "hot", None),
    ("temperature", [0.5], None),
    ("top_k", -2, None),
    ("top_k", 1.5, None),
    ("top_p", -0.5, None),
    ("top_p", 1.5, None),
    ("tools", [], None),
    ("messages", HI, None),
    ("temprature", 0.5, None),
    ("cache_salt", "x" * 257, None),
    ("cache_salt", 1, None),
    ("truncate_prompt_tokens", 0, None),
    ("truncate_prompt_tokens", -2, None),
    ("request_id", "x" * 257, None),
    ("request_id", 5, None),
    ("return_tokens_as_token_ids", 1, None),
    ("truncate_prompt_tokens", 1.5, None),
]

CHAT_FIELDS: list[tuple[str, Any, str | None]] = [
    ("messages", [], None),
    ("messages", None, None),
    ("messages", "hi", None),
    ("messages", ["hi"], None),
    ("messages", [{}], "role"),
    ("messages", [{"role": "user"}], None),
    ("messages", [{"role": 5, "content": "a"}], None),
    ("messages", [{"role": "robot", "content": "a"}], None),
    ("messages", [{"role": "tool", "content": "a"}], "messages"),
    ("messages", [{"role": "user", "content": 5}], None),
    ("messages", [{"role": "user", "content": {"type": "text", "text": "a"}}], None),
    ("messages", [{"role": "user", "content": ["a"]}], None),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], None),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}], None),
    ("messages", [{"role": "user", "content": "a", "extra": 1}], "extra"),
    ("messages", [{"role": "user", "content": "a" * 90_000}], None),
    ("messages", HI * 1500, None),
    ("messages", [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}], "function"),
    ("max_completion_tokens", 0, None),
    ("max_completion_tokens", 10**6, None),
    ("logprobs", 5, None),
    ("top_logprobs", 5, None),
    ("tools", [{"type": "function", "function": {"name": "f"}}], None),
    ("tool_choice", "required", None),
    ("functions", [{"name": "f"}], None),
    ("modalities", ["audio"], None),
    ("chat_template", "{{ messages }}", None),
    ("chat_template_kwargs", {"messages": []}, None),
    ("chat_template_kwargs", {"enable_thinking": {"a": 1}}, None),
    ("chat_template_kwargs", "x", None),
    ("continue_final_message", True, None),
    ("reasoning_effort", "high", None),
    ("web_search_options", {}, None),
    ("echo", 1, None),
    ("prompt", "hi", None),
]

RAW_BODIES = {
    "empty": b"",
    "no JSON": b"hello",
    "cut": b'{"prompt": "a"',
    "array": b'["prompt"]',
    "number": b"5",
    "null": b"null",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": Infinity}',
    "huge float": b'{"prompt": "a", "temperature": 1e999}',
    "lone surrogate": b'{"prompt": "a\\ud800b"}',
    "reversed surrogates": b'{"prompt": "\\udc00\\ud800"}',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "control character": b'{"prompt": "a\x00b"}',
    "trailing text": b'{"prompt": "a"} x',
    "comment": b'{"prompt": "a" /* b */}',
    "deep": b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep where anything goes": b'{"prompt": "a", "user": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "101 levels": b'{"prompt": "a", "user": ' + b"[" * 100 + b"]" * 100 + b"}",
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "form": b"prompt=a",
}


def check_refused(server: Server, path: str, body: Any, param: str | None) -> None:
    answer = server.post(path, body)
    assert answer.status == 400, answer.body
    error = answer.error
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["param"] == param
    assert server.get("/health").status == 200


@pytest.mark.parametrize(("field", "value", "param"), COMPLETION_FIELDS)
def test_completion_field_is_refused_by_name(server: Server, field: str, value: Any, param: str | None) -> None:
    check_refused(server, COMPLETIONS, {"prompt": "abc", field: value}, param or field)


@pytest.mark.parametrize(("field", "value", "param"), CHAT_FIELDS)
def test_chat_field_is_refused_by_name(server: Server, field: str, value: Any, param: str | None) -> None:
    check_refused(server, CHAT, {"messages": HI, field: value}, param or field)


@pytest.mark.parametrize("body", RAW_BODIES.values(), ids=RAW_BODIES)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_body_that_is_no_valid_request(server: Server, path: str, body: bytes) -> None:
    if path != COMPLETIONS:
        for name in (b'"prompt"', b'"temperature"', b'"user"'):
            body = body.replace(name, b'"model"')
    answer = server.post(path, body)
    assert answer.status == 400, answer.body
    assert answer.error["code"] in ("invalid_json", "invalid_type", "missing_required_parameter")
    assert server.get("/health").status == 200


def test_a_byte_order_mark_is_passed_over_and_an_empty_body_is_said_to_be_empty(server: Server) -> None:
    assert server.post(COMPLETIONS, b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}').status == 200
    generate = "/v2/models/ensemble/generate"
    assert server.post(generate, b'\xef\xbb\xbf{"text_input": "a", "max_tokens": 1}').status == 200
    assert server.post(COMPLETIONS, b"").error["message"] == "the body is empty; send a JSON object"


def test_json_of_a_hundred_levels_is_read_and_brackets_in_texts_are_no_levels(server: Server) -> None:
    nested = b'{"prompt": "a", "max_tokens": 1, "user": ' + b"[" * 99 + b"]" * 99 + b"}"
    assert server.post(COMPLETIONS, nested).status == 200
    assert server.post(COMPLETIONS, {"prompt": "[{" * 120, "max_tokens": 1}).status == 200
    assert server.post(COMPLETIONS, {"prompt": [[30, 31]] * 8, "user": [[{}] * 200], "max_tokens": 1}).status == 200


def test_the_last_of_two_equal_keys_counts_as_with_openai(server: Server) -> None:
    answer = server.post(COMPLETIONS, b'{"prompt": "a", "max_tokens": 1, "max_tokens": 3}')
    assert answer.json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x", "audio": {}}]}, "audio"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ],
)
def test_tokenizer_routes(server: Server, path: str, body: Any, param: str) -> None:
    check_refused(server, path, body, param)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("model", ["other", "", "../stub", "stub/", "STUB", "\x00"])
def test_unknown_model(server: Server, path: str, model: str) -> None:
    content = {"messages": HI} if path == CHAT else {"prompt": "a"}
    answer = server.post(path, {**content, "model": model})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")


def test_context_length_has_its_code(server: Server) -> None:
    for fields in ({"prompt": "a" * 250, "max_tokens": 7}, {"prompt": "a" * 256}, {"prompt": "a" * 300}):
        answer = server.post(COMPLETIONS, fields)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert server.post(COMPLETIONS, {"prompt": "a" * 250, "max_tokens": 6}).status == 200


def test_a_zero_character_in_a_prompt_is_a_character(server: Server) -> None:
    answer = server.post(COMPLETIONS, {"prompt": "a\x00b", "max_tokens": 3})
    assert answer.json["choices"][0]["text"] == "a\x00b"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/completions/", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/models/stub/infer", 405),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/%00", 404),
        ("GET", COMPLETIONS, 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("PATCH", "/tokenize", 405),
    ],
)
def test_wrong_routes_and_methods_have_error_objects(server: Server, method: str, path: str, status: int) -> None:
    answer = server.request(method, path)
    assert answer.status == status
    assert answer.error["message"]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", COMPLETIONS, CHAT, "/tokenize", "/nothing"])
def test_no_method_on_any_route_is_a_server_error(server: Server, method: str, path: str) -> None:
    assert server.request(method, path).status < 500
    assert server.request(method, path, b"\x00\xff{").status < 500


def test_odd_combinations_are_never_server_errors(server: Server) -> None:
    fields = {"stop": "a", "echo": True, "logprobs": 0, "max_tokens": 0, "min_tokens": 0, "n": 2, "ignore_eos": True}
    for left in range(2 ** len(fields)):
        chosen = {name: value for index, (name, value) in enumerate(fields.items()) if left >> index & 1}
        answer = server.post(COMPLETIONS, json.dumps({"prompt": "ab", **chosen}).encode())
        expected = 400 if chosen.get("max_tokens") == 0 and not chosen.get("echo") else 200
        assert answer.status == expected, (chosen, answer.body)
