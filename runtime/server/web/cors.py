# SPDX-License-Identifier: Apache-2.0
"""Which pages of other origins may ask this server from a browser (the Fetch standard's CORS protocol)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers

__all__ = ["cors_headers", "is_preflight"]

METHODS = "GET, POST, OPTIONS"
EXPOSED = "x-request-id, retry-after"
MAX_AGE_SECONDS = 600


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks what it may send. It does so without a key."""
    return method == "OPTIONS" and "access-control-request-method" in headers


def cors_headers(method: str, headers: Headers, origins: Sequence[str]) -> dict[str, str]:
    """What an answer needs so that the page may read it; nothing where its origin is not allowed. ``*`` allows any."""
    origin = headers.get("origin")
    if origin is None or not ("*" in origins or origin in origins):
        return {}
    answer = {"access-control-allow-origin": origin, "access-control-expose-headers": EXPOSED, "vary": "origin"}
    if is_preflight(method, headers):
        answer |= {
            "access-control-allow-methods": METHODS,
            "access-control-allow-headers": headers.get(
                "access-control-request-headers", "authorization, content-type"
            ),
            "access-control-max-age": str(MAX_AGE_SECONDS),
        }
    return answer
