# SPDX-License-Identifier: Apache-2.0
"""The engine requests of one HTTP request, and what has become of them since the last look."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from phalanx.runtime.request import TokenDelta
from phalanx.runtime.server.errors import ApiError

__all__ = ["GenerationGroup", "GroupClient"]


News = tuple[int, list[int] | TokenDelta]
"""Index of a request in its group, and its plain next tokens or anything more than those."""


class GroupClient(Protocol):
    """What a group needs of the client that made it.

    Attributes:
        marked: groups that have something to read.
    """

    marked: deque[GenerationGroup]

    def cancel(self, request_id: str) -> None:
        """End a request and forget it; unknown ids pass."""
        ...


class GenerationGroup:
    """The engine requests of one HTTP request; what happens to them is gathered in one list, marked by index.

    Either `wait` is awaited, or `listen` names what is called, with the time, whenever something has arrived.
    """

    def __init__(self, client: GroupClient, request_ids: Sequence[str]) -> None:
        self._client, self._marked = client, client.marked
        self._request_ids = list(request_ids)
        self._news: list[News] = []
        self._error: ApiError | None = None
        self._listener: Callable[[float], None] | None = None

    def put_token(self, index: int, token_id: int) -> None:
        """Add a plain next token of one request; called by the client. Unread tokens are merged to bound memory."""
        news = self._news
        if not news:
            self._marked.append(self)
        elif news[-1][0] == index and isinstance(news[-1][1], list):
            news[-1][1].append(token_id)
            return
        news.append((index, [token_id]))

    def put(self, index: int, delta: TokenDelta) -> None:
        """Add anything else that happened to one request; called by the client."""
        if not self._news:
            self._marked.append(self)
        self._news.append((index, delta))

    def fail(self, error: ApiError) -> None:
        """End the group with an error; called by the client."""
        self._error = self._error or error
        self._marked.append(self)

    def notify(self, now: float) -> None:
        """Tell the reader that something has arrived; called by the client once for all that it has not read."""
        if self._listener is not None:
            self._listener(now)

    def listen(self, listener: Callable[[float], None] | None) -> None:
        """Call ``listener`` from now on whenever something has arrived, and once now if something is there; None = no listener."""
        self._listener = listener
        if listener is not None and (self._news or self._error is not None):
            listener(time.monotonic())

    def take(self) -> list[News]:
        """Everything that has arrived.

        Raises:
            ApiError: the engine refused a request of this group, or is gone; what came before was returned earlier.
        """
        news, self._news = self._news, []
        if not news:
            self.raise_error()
        return news

    def take_plain(self) -> list[int] | None:
        """All that has arrived, if it is plain next tokens of one request; None otherwise, and nothing is taken."""
        news = self._news
        if len(news) != 1 or self._error is not None or not isinstance(token_ids := news[0][1], list):
            return None
        self._news = []
        return token_ids

    def raise_error(self) -> None:
        """Raise the ApiError that ended the group once everything before it was taken."""
        if self._error is not None and not self._news:
            raise self._error

    async def wait(self) -> None:
        """Wait until `take` has something to return or to raise."""
        if not self._news and self._error is None:
            arrived = asyncio.get_running_loop().create_future()
            self.listen(lambda _: None if arrived.done() else arrived.set_result(None))
            try:
                await arrived
            finally:
                self.listen(None)

    def cancel(self, index: int) -> None:
        """End one request of the group. No further deltas are delivered for it."""
        self._client.cancel(self._request_ids[index])

    def close(self) -> None:
        """End what is still open."""
        self._listener = None
        for request_id in self._request_ids:
            self._client.cancel(request_id)
