# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other about their lives: typed MessagePack over the connections of `links`."""

from __future__ import annotations

import msgspec

from phalanx.parallel.frames import frame
from phalanx.parallel.liveness.progress import Stamp

__all__ = ["End", "Failure", "Leaving", "Message", "Retire", "StackRequest", "Stacks", "Verdict", "encode"]


class Failure(msgspec.Struct, frozen=True, tag=True):
    """This rank has failed: sent before it aborts the job.

    Attributes:
        text: how, in one line.
        trace: the traceback.
        of_a_peer: it failed because it could not reach another rank, which probably has more to say.
    """

    text: str
    trace: str
    of_a_peer: bool = False


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """This rank has done its work; its connection may close from now on."""


class StackRequest(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 asks what every thread is executing."""


class Stacks(msgspec.Struct, frozen=True, tag=True):
    """The answer."""

    text: str


class End(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 has said why the job ends; leave with this status."""

    status: int


class Verdict(msgspec.Struct, frozen=True, tag=True):
    """A rank that gave rank 0 up has said why the job ends. Rank 0 may run again before its launcher ends it, and must say the same."""

    text: str


class Retire(msgspec.Struct, frozen=True, tag=True):
    """This rank's replica is lost, and the others go on without it."""


Message = Stamp | Failure | Leaving | StackRequest | Stacks | End | Verdict | Retire


def encode(message: Message) -> bytes:
    """One message with its length in front."""
    return frame(msgspec.msgpack.encode(message))
