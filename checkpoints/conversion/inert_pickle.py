# SPDX-License-Identifier: Apache-2.0
"""A pickle as plain values: its opcodes are listed, not run, and an object is what the pickle says of it.

PyTorch's own reader of weights does not know the protocol in which ``torch.distributed.checkpoint`` writes ``.metadata``. Source of the
opcodes: ``pickletools`` of Python's standard library, which parses and never imports or calls anything.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from phalanx.parallel.errors import CheckpointError

__all__ = ["Inert", "read_inert"]

_MARK = object()


@dataclass(eq=False, slots=True)
class Inert:
    """An object or a class of the program that wrote the pickle, of which nothing exists here.

    Attributes:
        name: of the class or function, with its module.
        arguments: what it would have been called with.
        state: what it would have been given afterwards; None = nothing.
        items: what it would have held as a mapping.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


def read_inert(content: bytes, name: str) -> Any:
    """Return what the pickle ``content`` describes.

    Raises:
        CheckpointError: it is damaged, or uses an opcode that no plain data needs; ``name`` is for the message.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name} is not a list of tensors: {error}; copy it again") from None


class _Machine:
    """The stack of an unpickler and its memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._places: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Take one opcode."""
        if opcode in _IGNORED:
            return
        if opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _ARGUMENTS:
            self.stack.append(argument)
        elif opcode in _PUTS:
            self._places[len(self._places) if argument is None else argument] = self.stack[-1]
        elif opcode in _GETS:
            self.stack.append(self._places[argument])
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        else:
            raise ValueError(f"opcode {opcode} is not one of plain data")

    def pop_to_mark(self) -> list[Any]:
        """Take what lies above the last mark, and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
        taken = self.stack[at + 1 :]
        del self.stack[at:]
        return taken

    def pop(self, count: int) -> list[Any]:
        """Take the last ``count`` values."""
        taken = self.stack[len(self.stack) - count :]
        if len(taken) < count:
            raise IndexError("the stack is empty")
        del self.stack[len(self.stack) - count :]
        return taken

    def put_items(self, pairs: list[Any]) -> None:
        """Put keys and values into the mapping on top."""
        target = self.stack[-1]
        mapping = target.items if isinstance(target, Inert) else target
        mapping.update(zip(pairs[::2], pairs[1::2], strict=True))

    def call(self, extra: int) -> None:
        """An object of a class and its arguments; ``extra``: further values on the stack, that are for keywords."""
        target, arguments, *_ = self.pop(2 + extra)
        self.stack.append(Inert(target.name, tuple(arguments)))

    def build(self) -> None:
        """Give the object on top its state."""
        target, state = self.pop(2)
        target.state = state
        self.stack.append(target)


_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
_CONSTANTS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
        "EMPTY_DICT": dict, "EMPTY_SET": set, "MARK": lambda: _MARK,
    }
)  # fmt: skip
_ARGUMENTS = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
        "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    }
)  # fmt: skip
_PUTS = frozenset({"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = MappingProxyType(
    {
        "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
        "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.pop(1))),
        "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.pop(2))),
        "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.pop(3))),
        "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
        "DICT": lambda machine, _: _collect(machine),
        "APPEND": lambda machine, _: machine.stack[-2].append(machine.pop(1)[0]),
        "APPENDS": lambda machine, _: _extend(machine),
        "SETITEM": lambda machine, _: machine.put_items(machine.pop(2)),
        "SETITEMS": lambda machine, _: machine.put_items(machine.pop_to_mark()),
        "GLOBAL": lambda machine, name: machine.stack.append(Inert(name.replace(" ", "."))),
        "STACK_GLOBAL": lambda machine, _: machine.stack.append(Inert(".".join(machine.pop(2)))),
        "REDUCE": lambda machine, _: machine.call(0),
        "NEWOBJ": lambda machine, _: machine.call(0),
        "NEWOBJ_EX": lambda machine, _: machine.call(1),
        "BUILD": lambda machine, _: machine.build(),
    }
)


def _extend(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    machine.stack[-1].extend(values)


def _collect(machine: _Machine) -> None:
    pairs = machine.pop_to_mark()
    machine.stack.append({})
    machine.put_items(pairs)
