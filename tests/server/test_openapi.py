"""The served description is valid OpenAPI, holds every route, and agrees with what the routes accept."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate
from starlette.routing import Route

from phalanx.runtime.sampling.fields import SAMPLING_FIELDS
from phalanx.runtime.server.app import server_routes
from phalanx.runtime.server.gate import OPEN_WITHOUT_KEY

from .servers import Server


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    answer = server.get("/openapi.json")
    assert answer.status == 200
    found: dict[str, Any] = answer.json
    return found


def test_it_is_valid(document: dict[str, Any]) -> None:
    validate(document)


def test_every_route_and_method_is_in_it(document: dict[str, Any]) -> None:
    described = {(path, method.upper()) for path, operations in document["paths"].items() for method in operations}
    served = {
        (route.path.replace(":path", ""), method)
        for route in server_routes(None, None)  # type: ignore[arg-type]
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert described == served
    assert len(served) > 30


def test_every_operation_says_what_it_does(document: dict[str, Any]) -> None:
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all(operation["summary"].endswith((".", ":")) for operation in operations)
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)


def test_only_health_needs_no_key(document: dict[str, Any]) -> None:
    open_paths = {
        path
        for path, operations in document["paths"].items()
        for item in operations.values()
        if item.get("security") == []
    }
    assert open_paths == OPEN_WITHOUT_KEY


BODIES: list[tuple[str, dict[str, Any], bool]] = [
    ("/v1/completions", {"prompt": "a", "temperature": 0.5, "stop": ["x"], "logit_bias": {"7": 1}}, True),
    ("/v1/completions", {"prompt": [[1, 2]], "top_k": None}, True),
    ("/v1/completions", {"prompt": "a", "temperature": 3}, False),
    ("/v1/completions", {"prompt": "a", "unknown": 1}, False),
    ("/v1/completions", {}, False),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}, True),
    ("/v1/chat/completions", {"messages": "a"}, False),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tool_choice": "never"}, False),
    ("/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, True),
    ("/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, False),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}, True),
    ("/v1/responses", {"input": "a", "max_output_tokens": 3}, True),
    ("/v1/responses", {"input": 3}, False),
    ("/tokenize", {"prompt": "a"}, True),
    ("/detokenize", {"tokens": ["a"]}, False),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "accepted"), BODIES)
def test_bodies_are_described_as_the_routes_take_them(
    server: Server, document: dict[str, Any], path: str, body: dict[str, Any], accepted: bool
) -> None:
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema.Draft202012Validator({**reference, "components": document["components"]})
    assert validator.is_valid(body) == accepted
    assert (server.post(path, body).status == 200) == accepted


def test_all_sampling_fields_are_described_with_their_limits(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"]["CompletionRequest"]["properties"]
    names = {field.doors["openai"] for field in SAMPLING_FIELDS if "openai" in field.doors}
    assert names <= set(properties)
    assert (properties["temperature"]["minimum"], properties["temperature"]["maximum"]) == (0.0, 2.0)
