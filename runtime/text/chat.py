# SPDX-License-Identifier: Apache-2.0
"""Chat templates: messages to one prompt text, as the checkpoint's jinja2 template says."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import jinja2

from phalanx.parallel.errors import CheckpointError, RequestError
from phalanx.runtime.text.content import walks_content
from phalanx.runtime.text.sandbox import LimitExceeded, Sandbox
from phalanx.runtime.text.tool_calls.detection import detect_form, shows_tool_calls, takes_tools

__all__ = ["TEMPLATE_OPTIONS", "ChatTemplate", "message_text"]

TEMPLATE_OPTIONS = frozenset({"enable_thinking", "thinking", "reasoning_effort"})
"""Variables that a request may set; any other could change what the template's author meant."""

_MARKER = "CONTINUE_FINAL_MESSAGE_TAG "
"""Follows the last message while it is rendered; its space shows whether the template trims messages.

It is that of transformers: templates of LFM 2.5 look for it, and write a message's calls before it.
"""

MAX_RENDER_SECONDS = 5.0
MAX_RENDERED_CHARACTERS = 1 << 24


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template.

    Attributes:
        special_tokens: what it may name (``bos_token``, ``eos_token``, ...).
        walks_parts: whether it goes through the parts of a content itself; others get the parts as one text.
        takes_tools: whether it shows the model the functions that it may call.
        shows_tool_calls: whether it writes the calls of earlier turns.
        tool_call_form: the form of calls that it teaches (a key of `TOOL_CALL_FORMS`); None if that is not certain.
    """

    code: CodeType
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    walks_parts: bool = False
    takes_tools: bool = False
    shows_tool_calls: bool = False
    tool_call_form: str | None = None

    @classmethod
    def compile(cls, source: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """Compile ``source``.

        Raises:
            CheckpointError: it is no valid jinja2 template.
        """
        try:
            sandbox = Sandbox()
            tree = sandbox.parse(source)
            return cls(
                sandbox.compile(source),
                dict(special_tokens),
                walks_parts=walks_content(tree),
                takes_tools=takes_tools(tree),
                shows_tool_calls=shows_tool_calls(tree),
                tool_call_form=detect_form(source),
            )
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template cannot be compiled: {error}; correct chat_template") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, Any] | None = None,
        max_seconds: float = MAX_RENDER_SECONDS,
        max_characters: int = MAX_RENDERED_CHARACTERS,
    ) -> str:
        """Return the prompt text for ``messages``: mappings with ``role`` and ``content`` (see `message_text`).

        ``tools`` describes functions as the OpenAI protocol does; the arguments of ``tool_calls`` in messages are objects, as
        transformers passes them. May compute for up to ``max_seconds``: call it outside an event loop.

        Raises:
            RequestError: the template refuses the messages, or they exceed the time or size limit.
        """
        options = _checked_options(options or {})
        content_of = message_parts if self.walks_parts else message_text
        conversation = [{**message, "content": content_of(message.get("content"))} for message in messages]
        final = conversation[-1]["content"] if conversation else None
        if continue_final_message:
            conversation = _with_marker(conversation)
        sandbox = Sandbox(time.monotonic() + max_seconds, max_characters)
        variables = {
            **self.special_tokens, **options, "messages": conversation, "tools": tools, "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }  # fmt: skip
        text = _run(sandbox, self.code, variables, max_characters)
        return _cut_at_marker(text, final) if continue_final_message else text


def message_text(content: Any) -> str:
    """Return a message's content as one text: a text, or ``{"type": "text", "text": ...}`` parts joined by newlines, as in vLLM.

    Raises:
        RequestError: a part is not text.
    """
    parts = message_parts(content)
    return "\n".join(part["text"] for part in parts) if isinstance(parts, list) else parts


def message_parts(content: Any) -> str | list[dict[str, str]]:
    """Return a message's content as templates that go through its parts take it: a text, or the list of text parts.

    None, as in a message that only calls tools, is the empty text, as in vLLM: many templates print it, as the word None.

    Raises:
        RequestError: a part is not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"content is a {type(content).__name__}; use a string or a list of text parts", "messages")
    return [{"type": "text", "text": _part_text(part)} for part in content]


def _part_text(part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise RequestError(f"content part of type {kind!r} is not supported; use parts of type 'text'", "messages")
    raise RequestError('a content part must be {"type": "text", "text": "..."}', "messages")


def _checked_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in options.items():
        if name not in TEMPLATE_OPTIONS:
            allowed = ", ".join(sorted(TEMPLATE_OPTIONS))
            raise RequestError(
                f"chat_template_kwargs may not set {name!r}; allowed are {allowed}", "chat_template_kwargs"
            )
        if not isinstance(value, (str, bool, int, float, type(None))):
            raise RequestError(f"chat_template_kwargs {name!r} must be a single value", "chat_template_kwargs")
    return options


def _run(sandbox: Sandbox, code: CodeType, variables: dict[str, Any], max_characters: int) -> str:
    template = jinja2.Template.from_code(sandbox, code, sandbox.make_globals(None))
    pieces: list[str] = []
    num_characters = 0
    try:
        for piece in template.generate(variables):
            sandbox.check_time()
            num_characters += len(piece)
            if num_characters > max_characters:
                raise LimitExceeded(f"it writes more than {max_characters} characters")
            pieces.append(piece)
    except LimitExceeded as error:
        raise RequestError(f"the chat template failed on these messages: {error}", "messages") from error
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise RequestError(f"the chat template does not accept these messages: {error}", "messages") from error
    return "".join(pieces)


def _with_marker(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with `_MARKER` at the end of its last text, where the model is to go on."""
    content = conversation[-1].get("content") if conversation else None
    marked: Any
    if isinstance(content, str):
        marked = content + _MARKER
    elif content:
        marked = [*content[:-1], {**content[-1], "text": content[-1]["text"] + _MARKER}]
    else:
        raise _not_shown()
    return [*conversation[:-1], {**conversation[-1], "content": marked}]


def _cut_at_marker(text: str, content: Any) -> str:
    """``text`` up to the marker. A template that trimmed the marker's space would have trimmed the message's own, too."""
    end = text.rfind(_MARKER.strip())
    final = content if isinstance(content, str) else content[-1]["text"]
    if end < 0 or final.strip() not in text:
        raise _not_shown()
    return text[:end] if text[end:].startswith(_MARKER) else text[:end].rstrip()


def _not_shown() -> RequestError:
    return RequestError(
        "continue_final_message needs a last message whose content the chat template shows unchanged",
        "continue_final_message",
    )
