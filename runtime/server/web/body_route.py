# SPDX-License-Identifier: Apache-2.0
"""Routes that say what body they take, so that the description of the server follows from them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phalanx.runtime.sampling.fields import Door

__all__ = ["OBJECT_OR_EVENTS", "BodyRoute"]

OBJECT_OR_EVENTS = ("application/json", "text/event-stream")
"""Answers of routes that stream if they are asked to."""


class BodyRoute(Route):
    """A ``POST`` route.

    Attributes:
        body: what the body holds, as JSON.
        door: whose names its sampling fields have; None if it has none.
        answers: media types of its answers.
    """

    def __init__(
        self,
        path: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        body: type[msgspec.Struct],
        door: Door | None = None,
        answers: tuple[str, ...] = ("application/json",),
    ) -> None:
        super().__init__(path, endpoint, methods=["POST"])
        self.body = body
        self.door = door
        self.answers = answers
