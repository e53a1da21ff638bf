# SPDX-License-Identifier: Apache-2.0
"""The fields by which OpenAI's and vLLM's clients say what an answer must match, as the one sampling field behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.guides import GuideRule
from phalanx.runtime.sampling.rules import shown

__all__ = ["with_guide"]

_FIELD = "structured_outputs"

_OLDER = {"guided_json": "json", "guided_regex": "regex", "guided_grammar": "grammar", "guided_choice": "choice"}


def with_guide(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with ``structured_outputs`` instead of ``response_format`` and vLLM's older ``guided_*``.

    Raises:
        RequestError: there are several of them, or one is malformed.
    """
    rest = {name: value for name, value in fields.items() if name != "response_format" and name not in _OLDER}
    guides = {name: {key: fields[name]} for name, key in _OLDER.items() if fields.get(name) is not None}
    if (response_format := _response_format(fields.get("response_format"))) is not None:
        guides["response_format"] = response_format
    if rest.get(_FIELD) is not None:
        guides[_FIELD] = rest[_FIELD]
    if len(guides) > 1:
        first, second, *_ = guides
        raise RequestError(f"{first} and {second} both say what the answer must match; leave one out", second)
    for name, guide in guides.items():
        rest[_FIELD] = GuideRule().check(name, guide)
    return rest


def _response_format(value: Any) -> dict[str, Any] | None:
    """Source: OpenAI's ``response_format`` of chat completions."""
    match value:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json": schema}
        case {"type": "json_schema"}:
            raise RequestError(
                "response_format of type json_schema needs json_schema.schema; give it", "response_format"
            )
    raise RequestError(
        f"response_format={shown(value)} is of no known type; use text, json_object or json_schema", "response_format"
    )
