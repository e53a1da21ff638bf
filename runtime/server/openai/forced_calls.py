# SPDX-License-Identifier: Apache-2.0
"""Guides for answers that must be calls, as JSON: one function's arguments, or a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phalanx.runtime.server.errors import invalid
from phalanx.runtime.text.tool_calls import ANNOTATIONS

__all__ = ["arguments_schema", "call_schema", "calls_schema"]

_SHARED = ("$defs", "definitions")
_OF_SCHEMAS = frozenset({*_SHARED, "properties", "patternProperties", "dependentSchemas"})
_OF_VALUES = frozenset({"enum", "const", "required", "type"})


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the schema of a function's arguments, less its words for the model; a function without parameters takes an empty object.

    Raises:
        ApiError: 400: it is nested too deeply.
    """
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    try:
        return {key: _without_words(key, value) for key, value in parameters.items() if key not in ANNOTATIONS}
    except RecursionError:
        raise invalid("tools: a schema is nested too deeply; flatten it", "tools") from None


def _without_words(key: str, value: Any) -> Any:
    """The value of a keyword without the annotations of the schemas in it: they allow nothing, and a guide has a limit."""
    if key in _OF_VALUES:
        return value
    if key in _OF_SCHEMAS and isinstance(value, dict):
        return {name: _without_words("", schema) for name, schema in value.items()}
    if isinstance(value, list):
        return [_without_words("", item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_words(name, item) for name, item in value.items() if name not in ANNOTATIONS}


def calls_schema(functions: Sequence[tuple[str, Mapping[str, Any] | None]], *, parallel: bool) -> dict[str, Any]:
    """Return the schema of a list of at least one call, ``{"name", "parameters"}``; at most one unless ``parallel``.

    Raises:
        ApiError: 400: two functions define a name of ``$defs``, to which references lead from the top, differently,
            or ``$defs`` is not an object.
    """
    shared: dict[str, dict[str, Any]] = {}
    calls = [call_schema(name, arguments_schema(parameters), shared, "parameters") for name, parameters in functions]
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, **shared}


def call_schema(
    name: str, parameters: dict[str, Any], shared: dict[str, dict[str, Any]], arguments: str
) -> dict[str, Any]:
    """Return the schema of one call, an object with a name and ``arguments``; definitions go to ``shared``.

    Raises:
        ApiError: as `calls_schema`.
    """
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
