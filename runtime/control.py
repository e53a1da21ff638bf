"""The leader's orders to its replica: one packed step plan per broadcast, or the order to stop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.communicator import Communicator
from phalanx.runtime.step import StepPlan

__all__ = ["ControlChannel"]

Int32Array = NDArray[np.int32]
FIRST_WORDS = 1024
"""Plans up to this many words travel in one broadcast of fixed size; longer ones in a second."""
_STOP = -1


class ControlChannel:
    """Broadcasts plans from rank 0 of ``comm`` to the others.

    A message is its length in words, then the words. Waiting for the first part costs next to nothing, so idle ranks do
    not burn a core.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def send(self, plan: StepPlan) -> None:
        """Leader: give the next plan to all. *Collective with `receive`.*"""
        if self._comm.size > 1:
            self._send(plan.words)

    def send_stop(self) -> None:
        """Leader: end the others' loops. *Collective with `receive`.*"""
        if self._comm.size > 1:
            self._send(None)

    def receive(self) -> StepPlan | None:
        """Follower: wait for the next plan; None means stop. *Collective with `send`.*"""
        first = self._comm.broadcast_idle(np.empty(FIRST_WORDS, np.int32))
        length = int(first[0])
        if length == _STOP:
            return None
        if length < FIRST_WORDS:
            return StepPlan.unpack(first[1 : 1 + length])
        rest = self._comm.broadcast(np.empty(length - FIRST_WORDS + 1, np.int32))
        return StepPlan.unpack(np.concatenate((first[1:], rest)))

    def _send(self, words: Int32Array | None) -> None:
        first = np.zeros(FIRST_WORDS, np.int32)
        if words is None:
            first[0] = _STOP
            self._comm.broadcast_idle(first)
            return
        first[0] = len(words)
        head = words[: FIRST_WORDS - 1]
        first[1 : 1 + len(head)] = head
        self._comm.broadcast_idle(first)
        if len(words) >= FIRST_WORDS:
            self._comm.broadcast(np.ascontiguousarray(words[FIRST_WORDS - 1 :]))
