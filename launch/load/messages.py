# SPDX-License-Identifier: Apache-2.0
"""What ``launch.bench serve`` and its client processes tell each other: JSON, one message a line."""

from __future__ import annotations

from itertools import pairwise

import msgspec

__all__ = ["Answer", "Answers", "ClientMessage", "Load", "Ready", "Tokens"]


class Load(msgspec.Struct, frozen=True):
    """A client's share of the load; every client makes the same prompts and arrival times and takes its own.

    Attributes:
        url: ``http(s)://HOST:PORT``.
        key: sent as bearer token; empty = none.
        client, num_clients: requests ``client``, ``client + num_clients``, ... are this client's.
        max_concurrency: of this client's requests, most in flight at once.
        request_rate: requests a second of all clients; None = as soon as there is room.
        burstiness: shape of the gamma distribution of the time between requests: 1 = Poisson, less = in bursts.
    """

    url: str
    key: str
    model: str
    client: int
    num_clients: int
    max_concurrency: int
    num_prompts: int
    input_len: int
    output_len: int
    vocab_size: int
    seed: int
    request_rate: float | None
    burstiness: float


class Answer(msgspec.Struct):
    """One request's answer as it came.

    Attributes:
        start: when it was sent, on the clock of `time.monotonic`, which all processes of a machine share.
        arrivals: when each event with output came.
        usage: the server's own count; empty until the last event.
        error: why it failed; empty = it did not.
    """

    start: float
    arrivals: list[float] = []
    usage: dict[str, int] = {}
    error: str = ""

    @property
    def output_tokens(self) -> int:
        """As the server counted them; servers that do not are taken to send one token an event."""
        return self.usage.get("completion_tokens") or len(self.arrivals)

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the start to the first event."""
        return self.arrivals[0] - self.start

    @property
    def time_per_output_token(self) -> float:
        """Seconds between tokens after the first, on average."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def longest_gap(self) -> float:
        """Seconds between the two successive events that are farthest apart; 0 with fewer than two."""
        return max((after - before for before, after in pairwise(self.arrivals)), default=0.0)


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The client has made its requests and waits for the time to start, which comes in a separate line."""


class Tokens(msgspec.Struct, tag=True, frozen=True):
    """So many more tokens have come."""

    count: int


class Answers(msgspec.Struct, tag=True, frozen=True):
    """The last message."""

    answers: list[Answer]


ClientMessage = Ready | Tokens | Answers
