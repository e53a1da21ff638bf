# SPDX-License-Identifier: Apache-2.0
"""Errors as the protocols show them.

OpenAI: ``{"error": {"message", "type", "param", "code"}}``; KServe: ``{"error": "message"}``; Anthropic: ``{"type": "error",
"error": {"type", "message"}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from phalanx.parallel.errors import CapacityError, RequestError

__all__ = ["ApiError", "from_request_error", "invalid", "overloaded", "unavailable"]

_TYPES = MappingProxyType({401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"})

_ANTHROPIC_TYPES = MappingProxyType(
    {
        401: "authentication_error",
        404: "not_found_error",
        408: "timeout_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
)

_TRITON_STATUS = MappingProxyType({408: 503, 413: 400, 415: 400, 422: 400, 429: 503})
"""Triton answers UNAVAILABLE with 503 and INVALID_ARG with 400."""


class ApiError(Exception):
    """What a client is told, with the HTTP status that says who must act."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers)

    def body(self) -> dict[str, Any]:
        """The JSON object of this error."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """`body` as JSON."""
        return msgspec.json.encode(self.body())

    def for_path(self, path: str) -> tuple[int, bytes]:
        """Return status and body in the form of the protocol that owns ``path``."""
        if path == "/v1/messages" or path.startswith("/v1/messages/"):
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            error = {"type": kind, "message": str(self)}
            return self.status, msgspec.json.encode({"type": "error", "error": error})
        if path == "/v2" or path.startswith("/v2/"):
            return _TRITON_STATUS.get(self.status, self.status), msgspec.json.encode({"error": str(self)})
        return self.status, self.encoded()


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client must change its request."""
    return ApiError(400, message, param=param, code=code)


def overloaded(error: CapacityError) -> ApiError:
    """The client may come back later."""
    seconds = max(1, round(error.retry_after_seconds))
    headers = {"retry-after": str(seconds), "x-should-retry": "true"}
    return ApiError(429, str(error), code="queue_full", headers=headers)


def unavailable(message: str, retry_after_seconds: int = 1) -> ApiError:
    """This server takes no requests now."""
    return ApiError(503, message, code="unavailable", headers={"retry-after": str(retry_after_seconds)})


def from_request_error(error: RequestError, code: str | None = None) -> ApiError:
    """A value of the request is refused."""
    return invalid(str(error), error.param, error.code or code)
