# SPDX-License-Identifier: Apache-2.0
"""What an HTTP process and the engine tell each other: typed MessagePack, each message after its length.

The socket pair is private to the two processes, and both ends decode into exactly these types. Rank 0 and the leaders of other
replicas use the same messages: to such a leader rank 0 is the HTTP side.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from phalanx.parallel.frames import FrameDecoder, frame
from phalanx.runtime.engine import ReplicaStats
from phalanx.runtime.request import Request, TokenDelta

__all__ = [
    "Alive",
    "Cancel",
    "Deltas",
    "DrainRequest",
    "Drained",
    "Draining",
    "EngineGone",
    "Failed",
    "FrameDecoder",
    "FromFrontend",
    "FrontendReady",
    "FrontendRefused",
    "Job",
    "ModelInfo",
    "Phase",
    "Pulse",
    "Refused",
    "Stats",
    "Stop",
    "Submit",
    "ToFrontend",
    "Trouble",
    "encode_frame",
]


class FrontendRefused(msgspec.Struct, tag=True, frozen=True):
    """The HTTP process cannot serve this checkpoint: its tokenizer is broken."""

    message: str


class FrontendReady(msgspec.Struct, tag=True, frozen=True):
    """The tokenizer is loaded and requests are answered from now on; by the engine of ``job``, where a supervisor starts them."""

    job: int = 0


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Queue this request."""

    request: Request


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """End this request; its client is gone."""

    request_id: str


class Drained(msgspec.Struct, tag=True, frozen=True):
    """After `Draining`: the last answer has been given."""


class Phase(msgspec.Struct, tag=True, frozen=True):
    """What rank 0 does before it is ready, in words: ``loading weights, 41 %``."""

    text: str


class DrainRequest(msgspec.Struct, tag=True, frozen=True):
    """An administrator asks for a drain."""


class Job(msgspec.Struct, tag=True, frozen=True):
    """The first message of an engine that a supervisor has started: which of its jobs this is, from 1."""

    number: int


class EngineGone(msgspec.Struct, tag=True, frozen=True):
    """To the supervisor: rank 0 of a job has ended, or has said that it will. It may come when the next job runs already."""

    job: int


class Alive(msgspec.Struct, tag=True, frozen=True):
    """The answer to `Stats`: this process still takes messages."""


class ModelInfo(msgspec.Struct, tag=True, frozen=True):
    """The engine is ready; what the HTTP side must know about it.

    Attributes:
        directory: where the tokenizer is.
        vocab_size: token ids are below it.
        max_model_len: maximum number of tokens of one sequence, prompt and output.
        max_open_requests: maximum number of requests that run and wait at once.
        sampling_defaults: values of sampling fields that a request leaves out, by their own names.
        about: what ``/server_info`` shows, in words.
    """

    directory: str
    vocab_size: int
    max_model_len: int
    max_open_requests: int
    sampling_defaults: dict[str, float | int] = {}
    about: dict[str, str] = {}


class Deltas(msgspec.Struct, tag=True, frozen=True):
    """What one step did: a plain next token is a pair in two columns; anything more is in ``others``, read last."""

    request_ids: list[str]
    token_ids: list[int]
    others: list[TokenDelta]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The engine does not take this request: ``capacity`` = try again later, ``request`` = it is invalid."""

    request_id: str
    reason: Literal["request", "capacity"]
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_seconds: float = 1.0


class Stats(msgspec.Struct, tag=True, frozen=True):
    """Counts of every replica, in order; sent several times a second as a sign of life, and answered by `Alive`.

    Attributes:
        num_saturated: keys and values that fp8 caches of all ranks could not hold, since the start.
    """

    replicas: list[ReplicaStats]
    num_saturated: int = 0


class Draining(msgspec.Struct, tag=True, frozen=True):
    """Take no new requests; say `Drained` when the last one is answered."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine is gone: every open request ends with this error."""

    message: str


class Trouble(msgspec.Struct, tag=True, frozen=True):
    """A rank does not answer, though no limit is reached yet: ``/health`` fails for this reason. None = all is well."""

    message: str | None


class Pulse(msgspec.Struct, tag=True, frozen=True):
    """Rank 0's process runs, whatever its main thread does; sent by the thread that watches ranks, twice a second."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Close the port and exit."""


FromFrontend = FrontendRefused | FrontendReady | Submit | Cancel | Drained | DrainRequest | Alive | EngineGone
ToFrontend = Job | Phase | ModelInfo | Deltas | Refused | Stats | Draining | Trouble | Pulse | Failed | Stop


def encode_frame(message: FromFrontend | ToFrontend) -> bytes:
    """One message with its length in front."""
    return frame(msgspec.msgpack.encode(message))
