# SPDX-License-Identifier: Apache-2.0
"""Which replica gets a request: the one with the least work, unless another has computed its beginning and is not much busier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phalanx.runtime.request import Request

__all__ = ["Routes"]

PREFIX_TOKENS = 32
"""The shortest beginning that is remembered; longer ones by powers of two."""
REMEMBERED_PREFIXES = 65_536
BUSIER = 1.25
"""How much more work than the mean a replica may have and still get a request for the sake of its cache."""


@dataclass(frozen=True, slots=True)
class _Open:
    request: Request
    replica: int
    num_tokens: int


class Routes:
    """Open requests by replica. Work is counted in tokens: prompt and ``max_tokens`` of every open request.

    A replica's cache is not asked: it is remembered which replica got a prompt with the same first 32, 64, 128, ... tokens.
    """

    def __init__(self, num_replicas: int) -> None:
        self._open: dict[str, _Open] = {}
        self._num_tokens = [0] * num_replicas
        self._serving = set(range(num_replicas))
        self._prefixes: OrderedDict[int, set[int]] = OrderedDict()

    def choose(self, request: Request) -> int:
        """The replica for a request; a fork goes where its first is."""
        if request.fork_from is not None and (first := self._open.get(request.fork_from)) is not None:
            return first.replica
        least = min(self._serving, key=self._order)
        return next(self._near(request, self._num_tokens[least]), least)

    def _near(self, request: Request, least_tokens: int) -> Iterator[int]:
        """Replicas that know the beginning and may get the request: those not much busier, or whose lead the beginning outweighs."""
        most = BUSIER * sum(self._num_tokens[replica] for replica in self._serving) / len(self._serving)
        for length, key in _prefixes(request):
            for replica in sorted(self._prefixes.get(key, set()) & self._serving, key=self._order):
                if self._num_tokens[replica] <= max(most, least_tokens + length):
                    yield replica

    def _order(self, replica: int) -> tuple[int, int]:
        return self._num_tokens[replica], replica

    def add(self, request: Request, replica: int) -> None:
        """The request is open there from now on."""
        self._open[request.request_id] = _Open(request, replica, _size(request))
        self._num_tokens[replica] += _size(request)
        for _, key in _prefixes(request):
            self._prefixes.setdefault(key, set()).add(replica)
            self._prefixes.move_to_end(key)
        while len(self._prefixes) > REMEMBERED_PREFIXES:
            self._prefixes.popitem(last=False)

    def end(self, request_id: str) -> None:
        """The request has ended; unknown ids pass."""
        if (ended := self._open.pop(request_id, None)) is not None:
            self._num_tokens[ended.replica] -= ended.num_tokens

    def lose(self, replica: int) -> list[Request]:
        """A replica is gone: it gets nothing any more; returns its open requests, which are open no longer."""
        self._serving.discard(replica)
        requests = [entry.request for entry in self._open.values() if entry.replica == replica]
        for request in requests:
            self.end(request.request_id)
        return requests

    def replica_of(self, request_id: str) -> int | None:
        """Where a request is open; None = nowhere."""
        entry = self._open.get(request_id)
        return None if entry is None else entry.replica

    def has_work(self, replica: int) -> bool:
        """Whether a request is open there."""
        return self._num_tokens[replica] > 0

    @property
    def serving(self) -> Sequence[int]:
        """Replicas that are not lost."""
        return sorted(self._serving)


def _size(request: Request) -> int:
    return len(request.prompt_token_ids) + request.params.max_tokens


def _prefixes(request: Request) -> Iterator[tuple[int, int]]:
    """Lengths and hashes of the prompt's beginnings, the longest first."""
    prompt, lengths, length = request.prompt_token_ids, [], PREFIX_TOKENS
    while length <= len(prompt):
        lengths.append(length)
        length *= 2
    for length in reversed(lengths):
        yield length, hash((request.cache_salt, prompt[:length]))
