# SPDX-License-Identifier: Apache-2.0
"""JSON of a request, with a limit on its nesting: templates, schemas and messages of errors recurse over what it holds."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable
from typing import Any

import msgspec

__all__ = ["MAX_NESTING", "NestingError", "decode_json"]

MAX_NESTING = 100
"""Arrays and objects in one another; Triton's limit."""


class NestingError(ValueError):
    """JSON has more levels than `MAX_NESTING`."""

    def __init__(self) -> None:
        super().__init__(f"it is nested more than {MAX_NESTING} levels deep; flatten it")


def decode_json(body: bytes, kind: Any = Any) -> Any:
    """Return the value as ``kind``; a byte order mark in front of it is passed over (RFC 8259, section 8.1).

    Raises:
        msgspec.DecodeError, UnicodeDecodeError: it is not JSON, or not of that kind.
        NestingError: it is nested too deeply.
    """
    body = body.removeprefix(BOM_UTF8)
    try:
        value = msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise NestingError from None
    # Few brackets cannot lie too deep, which leaves most requests; a second decoding costs less than it would to follow `kind`.
    if body.count(b"[") + body.count(b"{") > MAX_NESTING and _num_levels_exceed_limit(msgspec.json.decode(body)):
        raise NestingError
    return value


def _num_levels_exceed_limit(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING):
        level = [item for container in level for item in _items(container) if isinstance(item, (dict, list))]
    return bool(level)


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
