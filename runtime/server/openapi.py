# SPDX-License-Identifier: Apache-2.0
"""The server described as OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.1), made from its routes, body types and sampling fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from starlette.routing import BaseRoute, Route

from phalanx import __version__
from phalanx.runtime.sampling.fields import SAMPLING_FIELDS, Door
from phalanx.runtime.server.gate import OPEN_WITHOUT_KEY
from phalanx.runtime.server.web.body_route import BodyRoute

__all__ = ["describe"]

_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_OTHER_TYPES: Mapping[str, str] = {"/": "text/html", "/metrics": "text/plain"}
_EMPTY = re.compile("/v2/.*(live|ready)")
"""Routes whose answer is a status only."""


def describe(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """Return the document that describes ``routes``."""
    known = [route for route in routes if isinstance(route, Route)]
    paths: dict[str, Any] = {}
    for route in known:
        operations = {method.lower(): _operation(route, method) for method in sorted(route.methods or ())}
        operations.pop("head", None)
        paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {}).update(operations)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Phalanx",
            "version": __version__,
            "description": "Inference over the protocols of OpenAI, Anthropic and Triton (KServe v2).",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": _schemas(known),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A line of --api-key-file, if there is one.",
                }
            },
        },
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    summary = (route.endpoint.__doc__ or route.name).strip().splitlines()[0]
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{route.path}").strip("_"),
        "summary": summary,
        "responses": {
            "200": {"description": "The answer."}
            | ({} if _EMPTY.fullmatch(route.path) else {"content": _content(route)}),
            "default": {"description": "An error, in the form of the protocol.", "content": {"application/json": {}}},
        },
    }
    if parameters := _PARAMETER.findall(route.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters
        ]
    if isinstance(route, BodyRoute):
        schema = {"$ref": f"#/components/schemas/{_name(route)}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if route.path in OPEN_WITHOUT_KEY:
        operation["security"] = []
    return operation


def _content(route: Route) -> dict[str, Any]:
    kinds = route.answers if isinstance(route, BodyRoute) else (_OTHER_TYPES.get(route.path, "application/json"),)
    return {kind: {} for kind in kinds}


def _schemas(routes: Iterable[Route]) -> dict[str, Any]:
    bodies = [route for route in routes if isinstance(route, BodyRoute)]
    kinds = list(dict.fromkeys(route.body for route in bodies))
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for route in bodies:
        schemas[_name(route)]["properties"] = _or_null(schemas[_name(route)])
        if route.door is not None:
            schemas[_name(route)]["properties"].update(_sampling_properties(route.door))
    return schemas


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Properties, of which those that need not be there may be null, too."""
    required = schema.get("required", ())
    return {
        name: {**value, "type": [value["type"], "null"]}
        if name not in required and isinstance(value.get("type"), str)
        else value
        for name, value in schema["properties"].items()
    }


def _sampling_properties(door: Door) -> dict[str, Any]:
    """The sampling fields of a protocol: type, limits and, where the command line has them too, what they do."""
    return {
        field.doors[door]: field.rule.schema()
        | ({"description": field.flag[1]} if field.flag and field.flag[1] else {})
        for field in SAMPLING_FIELDS
        if door in field.doors
    }


def _name(route: BodyRoute) -> str:
    """The name of a body among the schemas."""
    (reference,), _ = msgspec.json.schema_components([route.body], ref_template="{name}")
    name: str = reference["$ref"]
    return name
