"""Random requests: whatever comes, the answer is below 500 and an error object, and the next request is answered."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from typing import Any
from urllib.parse import urlsplit

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .servers import Server

COMMON = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "prompt",
    "messages",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "stop_token_ids",
    "echo",
    "logprobs",
    "top_logprobs",
    "ignore_eos",
    "min_tokens",
    "stream",
    "stream_options",
    "suffix",
    "tools",
    "response_format",
    "logit_bias",
    "best_of",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "skip_special_tokens",
    "tokens",
    "return_token_ids",
    "tool_choice",
    "parallel_tool_calls",
    "input",
    "instructions",
    "max_output_tokens",
    "store",
    "text",
    "metadata",
    "system",
    "stop_sequences",
    "thinking",
]
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/responses": {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}], "system": "s"},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [30, 31]},
}


@COMMON
@given(path=st.sampled_from(PATHS), changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_values_of_known_fields(server: Server, path: str, changes: dict[str, Any]) -> None:
    body = {**VALID[path], **changes}
    if body.get("stream") is True:
        body["stream"] = False
    answer = server.post(path, body)
    assert answer.status in (200, 400, 404, 429), answer.body
    assert not answer.json.get("error") if answer.status == 200 else answer.json["error"]["message"]


@COMMON
@given(path=st.sampled_from(PATHS), seed=st.integers(0, 2**32))
def test_bodies_with_random_bytes_changed(server: Server, path: str, seed: int) -> None:
    draw = random.Random(seed)
    body = bytearray(json.dumps(VALID[path]).encode())
    for _ in range(draw.randrange(1, 6)):
        position = draw.randrange(len(body))
        body[position : position + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        body = body or bytearray(b"x")
    answer = server.post(path, bytes(body))
    assert answer.status in (200, 400, 404), answer.body
    if answer.status != 200:
        assert answer.json["error"]["message"]


@COMMON
@given(seed=st.integers(0, 2**32))
def test_raw_requests_with_random_bytes_changed(server: Server, seed: int) -> None:
    draw = random.Random(seed)
    path = draw.choice(PATHS)
    body = json.dumps(VALID[path]).encode()
    method = draw.choice(["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE"])
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    request = bytearray(head.encode() + body)
    for _ in range(draw.randrange(1, 8)):
        position = draw.randrange(len(request))
        request[position : position + draw.randrange(4)] = draw.randbytes(draw.randrange(4))
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        status = b""
        with contextlib.suppress(ConnectionError):  # refused while data was still coming
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            status = connection.recv(65_536)[9:12]
            while status == b"100":  # keeps a client that has sent everything informed
                status = connection.recv(65_536)[9:12]
    assert status == b"" or 200 <= int(status) < 500
    assert server.get("/health").status == 200
