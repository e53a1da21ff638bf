# SPDX-License-Identifier: Apache-2.0
"""What a chat template does about tools, found in its syntax tree and its text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from jinja2 import nodes

__all__ = ["detect_form", "shows_tool_calls", "takes_tools"]

_TAUGHT: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        # The tag alone would not do: other families put XML inside it.
        "hermes": re.compile(r"""<tool_call>(?:\s|\\n)*\{+\s*\\?["'](?:name|arguments)"""),
        "llama3_json": re.compile(r"""\{\\?"name\\?": function name, \\?"parameters\\?": dictionary"""),
        "mistral": re.compile(r"\[TOOL_CALLS\]"),
        "pythonic": re.compile(r"\[func_name1\("),
        "qwen3_coder": re.compile(r"<function="),
        "glm45": re.compile(r"<arg_key>"),
        "deepseek_v3": re.compile(r"<\uff5ctool\u2581calls\u2581begin\uff5c>"),
    }
)
"""The words by which a template shows a model, or repeats to it, how a call is written."""


def takes_tools(template: nodes.Template) -> bool:
    """Return whether the template reads the variable ``tools``."""
    return any(name.name == "tools" and name.ctx == "load" for name in template.find_all(nodes.Name))


def shows_tool_calls(template: nodes.Template) -> bool:
    """Return whether the template reads the ``tool_calls`` of messages."""
    return any(node.attr == "tool_calls" for node in template.find_all(nodes.Getattr)) or any(
        node.value == "tool_calls" for node in template.find_all(nodes.Const)
    )


def detect_form(source: str) -> str | None:
    """Return the one form that the template's text teaches; None if it is none or several."""
    found = [form for form, pattern in _TAUGHT.items() if pattern.search(source)]
    return found[0] if len(found) == 1 else None
