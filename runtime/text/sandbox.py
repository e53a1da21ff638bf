# SPDX-License-Identifier: Apache-2.0
"""The jinja2 environment of chat templates: what transformers offers them, inside time and size limits.

A template comes with the checkpoint, never from a request; the limits keep an unlucky pair of template and
messages from blocking a worker forever.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

__all__ = ["LimitExceeded", "Sandbox"]

MAX_POWER_BITS = 4096


class LimitExceeded(jinja2.TemplateRuntimeError):
    """A template ran for too long or wrote too much."""


class GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block's content, in its own scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox for one rendering; `deadline` is a `time.monotonic` value, None to compile only."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, deadline: float | None = None, max_characters: int = 0) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols])
        self._deadline = deadline
        self._max_characters = max_characters
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def check_time(self) -> None:
        """Raise `LimitExceeded` once the deadline has passed."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise LimitExceeded("it ran for too long")

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`x.y`, on the clock."""
        self.check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`x[y]`, on the clock."""
        self.check_time()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A call, on the clock."""
        self.check_time()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`*` and `**`, refused where they would make something huge."""
        self.check_time()
        if operator == "**" and _power_bits(left, right) > MAX_POWER_BITS:
            raise LimitExceeded("it computes a huge power")
        if operator == "*" and _repeated_size(left, right) > self._max_characters:
            raise LimitExceeded("it repeats a text too often")
        return super().call_binop(context, operator, left, right)


def _power_bits(base: Any, exponent: Any) -> int:
    return base.bit_length() * exponent if isinstance(base, int) and isinstance(exponent, int) else 0


def _repeated_size(left: Any, right: Any) -> int:
    if isinstance(right, (str, list, tuple)):
        left, right = right, left
    return len(left) * right if isinstance(left, (str, list, tuple)) and isinstance(right, int) else 0


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
