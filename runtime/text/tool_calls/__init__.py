# SPDX-License-Identifier: Apache-2.0
"""Tool calls in a model's text: which form a checkpoint's template teaches, and calls read out of a growing answer."""

from phalanx.runtime.text.tool_calls.detection import detect_form, shows_tool_calls, takes_tools
from phalanx.runtime.text.tool_calls.forms import TOOL_CALL_FORMS, ArgumentsReader, CallListReader, tool_call_reader
from phalanx.runtime.text.tool_calls.reader import CallPiece, ToolCallReader
from phalanx.runtime.text.tool_calls.schemas import (
    ANNOTATIONS,
    alternatives,
    members_of,
    pointer_names,
    property_schema,
    types_of,
)

__all__ = [
    "ANNOTATIONS",
    "TOOL_CALL_FORMS",
    "ArgumentsReader",
    "CallListReader",
    "CallPiece",
    "ToolCallReader",
    "alternatives",
    "detect_form",
    "members_of",
    "pointer_names",
    "property_schema",
    "shows_tool_calls",
    "takes_tools",
    "tool_call_reader",
    "types_of",
]
