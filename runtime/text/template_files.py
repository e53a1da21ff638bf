# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint keeps its chat template, and what is wrong with it. A bad template refuses chats, not the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from phalanx.checkpoints.config_files import DEFAULT_TEMPLATE, TEMPLATE_FILE, TEMPLATE_FOLDER, TOOL_TEMPLATE
from phalanx.checkpoints.files import ModelDirectory
from phalanx.parallel.errors import CheckpointError

__all__ = ["TemplateSource", "read_template"]

LEGACY_FILE = "chat_template.json"
MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A template's text, or the reason why there is none: ``text`` is None then, ``problem`` also where it does not matter.

    ``tool_text`` is the text of a second template, called ``tool_use``, for requests with tools.
    """

    text: str | None = None
    problem: str | None = None
    tool_text: str | None = None


def read_template(directory: ModelDirectory, config: Mapping[str, Any]) -> TemplateSource:
    """Find the template that chats use, and the one for chats with tools if there is one.

    The first: ``chat_template.jinja``, ``additional_chat_templates/default.jinja``, ``chat_template`` of ``tokenizer_config.json`` (a text, or
    named templates of which ``default`` counts), ``chat_template.json``: the first that is there. The second:
    ``additional_chat_templates/tool_use.jinja`` (``tool_use.jinja`` in a split), or the named template ``tool_use``.
    """
    source = _read_default(directory, config)
    for place in (directory.subdirectory(TEMPLATE_FOLDER), directory):
        if place.has(TOOL_TEMPLATE):
            return replace(source, tool_text=_read_text(place, TOOL_TEMPLATE).text)
    return source


def _read_default(directory: ModelDirectory, config: Mapping[str, Any]) -> TemplateSource:
    for place, file in ((directory, TEMPLATE_FILE), (directory.subdirectory(TEMPLATE_FOLDER), DEFAULT_TEMPLATE)):
        if place.has(file):
            return _read_text(place, file)
    if (value := config.get("chat_template")) is not None:
        return _choose(value, "tokenizer_config.json")
    if directory.has(LEGACY_FILE):
        try:
            return _choose(directory.read_json(LEGACY_FILE).get("chat_template"), LEGACY_FILE)
        except CheckpointError as error:
            return TemplateSource(problem=str(error))
    return TemplateSource()


def _read_text(directory: ModelDirectory, name: str) -> TemplateSource:
    try:
        return TemplateSource(directory.read(name, MAX_TEMPLATE_BYTES).decode())
    except CheckpointError as error:
        return TemplateSource(problem=str(error))
    except UnicodeDecodeError:
        return TemplateSource(problem=f"{name} is not UTF-8 text; restore it")


def _choose(value: Any, file: str) -> TemplateSource:
    """The text itself, or of several named ones the one called ``default``."""
    if isinstance(value, str):
        return TemplateSource(value)
    named: dict[Any, Any] = value if isinstance(value, dict) else {}
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(default := named.get("default"), str):
        tool_use = named.get("tool_use")
        return TemplateSource(default, tool_text=tool_use if isinstance(tool_use, str) else None)
    names = ", ".join(sorted(str(name) for name in named)) or "none"
    return TemplateSource(problem=f"chat_template in {file} holds no template called 'default' (but {names}); add one")
