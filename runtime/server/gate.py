# SPDX-License-Identifier: Apache-2.0
"""What every request passes before it reaches a route: is the server up, who asks, under which id."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phalanx.runtime.server.errors import ApiError, unavailable
from phalanx.runtime.server.link.engine_client import EngineClient, ServerState
from phalanx.runtime.server.web.api_keys import has_key
from phalanx.runtime.server.web.cors import cors_headers, is_preflight
from phalanx.runtime.server.web.http import error_response
from phalanx.runtime.server.web.log import log_request, request_id

__all__ = ["OPEN_WITHOUT_KEY", "Gate"]

_PROBES = frozenset({"/health", "/metrics", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"})
OPEN_WITHOUT_KEY = frozenset({"/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"})
"""A load balancer that asks whether to send requests here has no key."""
_OPEN_WHILE_DRAINING = frozenset({"/health", "/metrics", "/v2/health/live", "/admin/drain"})
_ADMIN = "/admin/"


class Gate:
    """Pure ASGI middleware. Requests are logged by id, route, status and time, never by content.

    Args:
        admin_keys: what routes under ``/admin/`` take instead of ``api_keys``; there they refuse everything if there are none.
        cors_origins: whose pages may ask from a browser.
    """

    def __init__(
        self,
        app: ASGIApp,
        client: EngineClient,
        api_keys: Sequence[bytes],
        admin_keys: Sequence[bytes] = (),
        cors_origins: Sequence[str] = (),
    ) -> None:
        self._admin_keys = tuple(admin_keys)
        self._cors_origins = tuple(cors_origins)
        self._app = app
        self._client = client
        self._api_keys = tuple(api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.monotonic()
        own_id, method = request_id(headers.get("x-request-id", "")), scope["method"]
        more_headers = {"x-request-id": own_id, **cors_headers(method, headers, self._cors_origins)}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(more_headers)
            await send(message)

        answer: ASGIApp
        if is_preflight(method, headers) and self._cors_origins:
            answer = Response(status_code=204)
        else:
            refusal = self._refusal(scope["path"], headers)
            answer = self._app if refusal is None else error_response(refusal, scope["path"])
        try:
            await answer(scope, receive, send_with_id)
        finally:
            path, seconds = scope["path"], time.monotonic() - started
            log_request(own_id, method, path, status, seconds, is_probe=path in _PROBES)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if "content-length" in headers and "transfer-encoding" in headers:  # RFC 9112, section 6.1: request smuggling
            message = (
                "the request has both Content-Length and Transfer-Encoding, so its end is ambiguous; send one of them"
            )
            return ApiError(400, message, code="ambiguous_length", headers={"connection": "close"})
        state = self._client.state
        if state is ServerState.STARTING:
            phase = f" ({self._client.phase})" if self._client.phase else ""
            return unavailable(f"the server is starting{phase}; try again in a moment")
        if path.startswith(_ADMIN) and not self._admin_keys:
            message = (
                f"{path} needs a key; start the server with --admin-key-file or --api-key-file, or send it SIGUSR1"
            )
            return ApiError(403, message, code="admin_key_required")
        keys = self._admin_keys if path.startswith(_ADMIN) else self._api_keys
        if path not in OPEN_WITHOUT_KEY and not has_key(_credentials(headers), keys):
            # Only at the page: a browser asks for the key once, as a password, and sends it from then on.
            challenge = 'Basic realm="API key as password", charset="UTF-8"' if path == "/" else "Bearer"
            return ApiError(
                401, "no valid API key; send one as 'Authorization: Bearer KEY'", code="invalid_api_key",
                headers={"www-authenticate": challenge},
            )  # fmt: skip
        if state is ServerState.DRAINING and path not in _OPEN_WHILE_DRAINING:
            return unavailable("the server is shutting down; use another one, or try again later", 5)
        if state is ServerState.FAILED and path not in _OPEN_WHILE_DRAINING:
            return unavailable(f"the engine stopped: {self._client.failure}", 5)
        return None


def _credentials(headers: Headers) -> str:
    """``Authorization``, or the header in which Anthropic's clients send a key."""
    own = headers.get("x-api-key")
    return headers.get("authorization", "") if own is None else f"Bearer {own}"
