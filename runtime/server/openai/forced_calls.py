# SPDX-License-Identifier: Apache-2.0
"""Guides for answers that must be calls, as JSON: one function's arguments, or a list; and for calls that may come in a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from phalanx.runtime.guidance import JSON_WHITESPACE
from phalanx.runtime.server.errors import invalid

__all__ = ["MARKED_FORM", "OPENING_MARK", "arguments_schema", "calls_schema", "marked_calls_grammar"]

_SHARED = ("$defs", "definitions")

MARKED_FORM, OPENING_MARK = "hermes", "<tool_call>"
"""The form of calls, a key of `TOOL_CALL_FORMS`, that `marked_calls_grammar` describes, and the text with which a call begins."""

_MARKED_CALLS = r"""start: (mark SPACE %%json %s SPACE "</tool_call>")* TEXT
mark[lazy]: TEXT "<tool_call>"
TEXT: /(.|\n)*/
SPACE: /[ \n]{0,64}/
"""


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the schema of a function's arguments; a function without parameters takes an empty object."""
    return (
        {"type": "object", "properties": {}, "additionalProperties": False} if parameters is None else dict(parameters)
    )


def calls_schema(functions: Sequence[tuple[str, Mapping[str, Any] | None]], *, parallel: bool) -> dict[str, Any]:
    """Return the schema of a list of at least one call, ``{"name", "parameters"}``; at most one unless ``parallel``.

    Raises:
        ApiError: 400: two functions define a name of ``$defs``, to which references lead from the top, differently,
            or ``$defs`` is not an object.
    """
    shared: dict[str, dict[str, Any]] = {}
    calls = [_call_schema(name, arguments_schema(parameters), shared, "parameters") for name, parameters in functions]
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, **shared}


def marked_calls_grammar(functions: Sequence[tuple[str, Mapping[str, Any] | None]]) -> str:
    """Return llguidance's Lark grammar of a text that may hold calls between marks, as models of `MARKED_FORM` write them.

    The schema of each function's arguments holds from the mark on (https://github.com/guidance-ai/llguidance, docs/syntax.md, "Tool
    calling").

    Raises:
        ApiError: as `calls_schema`.
    """
    shared: dict[str, dict[str, Any]] = {}
    calls = [_call_schema(name, arguments_schema(parameters), shared, "arguments") for name, parameters in functions]
    bounds = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
    return _MARKED_CALLS % json.dumps({"anyOf": calls, **shared, **bounds})


def _call_schema(
    name: str, parameters: dict[str, Any], shared: dict[str, dict[str, Any]], arguments: str
) -> dict[str, Any]:
    for key in _SHARED:
        definitions = parameters.pop(key, {})
        if not isinstance(definitions, dict):
            raise invalid(f"tools: {key} of {name} is not an object of schemas; correct it", "tools")
        for defined, schema in definitions.items():
            if shared.setdefault(key, {}).setdefault(defined, schema) != schema:
                raise invalid(f"tools: two functions define {key}/{defined} differently; rename one of them", "tools")
    return {
        "type": "object",
        "properties": {"name": {"const": name}, arguments: parameters},
        "required": ["name", arguments],
        "additionalProperties": False,
    }
