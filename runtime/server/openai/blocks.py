# SPDX-License-Identifier: Apache-2.0
"""An answer as a row of blocks, texts and tool calls, for the protocols that number them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from phalanx.runtime.server.openai.answer_format import Served
from phalanx.runtime.server.openai.tools import ToolUse, new_call_id, read_arguments
from phalanx.runtime.text.tool_calls import CallPiece, ToolCallReader

__all__ = ["Block", "Blocks"]


@dataclass(slots=True)
class Block:
    """A text, or a call and its arguments.

    Attributes:
        name: of the function called; None for a text.
        text: the text, or the arguments as JSON, so far.
        id: of the call.
    """

    index: int
    name: str | None = None
    text: str = ""
    id: str = ""


@dataclass(slots=True)
class Blocks:
    """Splits one answer into blocks as it grows; there is at least one when it ends.

    Attributes:
        tools: what the model may call; None = text only.
        blocks: all so far; only the last one grows.
    """

    served: Served
    tools: ToolUse | None
    blocks: list[Block] = field(default_factory=list)
    _reader: ToolCallReader | None = None

    def __post_init__(self) -> None:
        if self.tools is not None:
            self._reader = self.tools.reader(self.served.tool_call_form)

    def push(self, text: str, *, last: bool) -> Iterator[tuple[Block, str, bool]]:
        """Yield each block that began or grew with ``text``, what it grew by, and whether it is new."""
        for piece in self._pieces(text, last=last):
            is_new = not self.blocks or piece.name is not None or (piece.call is None) != (self.blocks[-1].name is None)
            if is_new:
                self.blocks.append(self._begin(piece))
            block = self.blocks[-1]
            block.text += piece.text
            yield block, piece.text, is_new
        if last and not self.blocks:
            self.blocks.append(Block(0))
            yield self.blocks[0], "", True

    @property
    def has_calls(self) -> bool:
        """Whether a function was called, with arguments that are a JSON object."""
        return any(block.name is not None and read_arguments(block.text) is not None for block in self.blocks)

    @property
    def ends_inside_a_call(self) -> bool:
        """Whether the last block is a call without all of its arguments."""
        return bool(self.blocks) and self.blocks[-1].name is not None and read_arguments(self.blocks[-1].text) is None

    def _pieces(self, text: str, *, last: bool) -> list[CallPiece]:
        if self._reader is None:
            return [CallPiece(text)] if text else []
        return self._reader.push(text) + (self._reader.finish() if last else [])

    def _begin(self, piece: CallPiece) -> Block:
        block_id = "" if piece.name is None else new_call_id(self.served.tool_call_form)
        return Block(len(self.blocks), piece.name, id=block_id)
