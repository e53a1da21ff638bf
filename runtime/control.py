# SPDX-License-Identifier: Apache-2.0
"""The leader's orders to its replica: what kind of order, and its words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.communicator import Communicator

__all__ = ["FIRST_WORDS", "ControlChannel", "Order", "OrderKind"]

Int32Array = NDArray[np.int32]

FIRST_WORDS = 1024
"""Orders up to this many words, header included, travel in one broadcast of fixed size; longer ones in a second."""
_HEADER_WORDS = 2


class OrderKind(IntEnum):
    """What an order asks of the other ranks. A new kind is a line here and a handler in `phalanx.runtime.engine.follow`."""

    STOP = 0
    """Return from the loop; no words."""
    PLAN = 1
    """Execute a step; the words are a packed `StepPlan`."""


@dataclass(frozen=True, slots=True)
class Order:
    """An order as it was received; ``words`` may alias the receiver's buffer."""

    kind: OrderKind
    words: Int32Array


class ControlChannel:
    """Broadcasts orders from rank 0 of ``comm`` to the others.

    A message is the order's kind, its length in words, and the words. Waiting for the first part costs next to nothing, so idle
    ranks do not burn a core.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def send(self, kind: OrderKind, words: Int32Array | None = None) -> None:
        """Leader: give the next order to all. *Collective with `receive`.*"""
        if self._comm.size == 1:
            return
        words = np.empty(0, np.int32) if words is None else words
        first = np.zeros(FIRST_WORDS, np.int32)
        head = words[: FIRST_WORDS - _HEADER_WORDS]
        first[:_HEADER_WORDS] = kind, len(words)
        first[_HEADER_WORDS : _HEADER_WORDS + len(head)] = head
        self._comm.broadcast_idle(first)
        if len(words) > len(head):
            self._comm.broadcast(np.ascontiguousarray(words[len(head) :]))

    def receive(self) -> Order:
        """Follower: wait for the next order. *Collective with `send`.*"""
        first = self._comm.broadcast_idle(np.empty(FIRST_WORDS, np.int32))
        kind, length = OrderKind(int(first[0])), int(first[1])
        words = first[_HEADER_WORDS : _HEADER_WORDS + length]
        if length > len(words):
            rest = self._comm.broadcast(np.empty(length - len(words), np.int32))
            words = np.concatenate((words, rest))
        return Order(kind, words)
