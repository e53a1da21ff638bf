# SPDX-License-Identifier: Apache-2.0
"""The page at ``/``: one file, without outside resources."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

__all__ = ["page_response"]


def page_response() -> Response:
    """The page. Its own script and style run, and nothing that text on the page may bring in."""
    body, policy = _page()
    headers = {"content-security-policy": policy, "cache-control": "no-cache", "x-content-type-options": "nosniff"}
    return Response(body, media_type="text/html", headers=headers)


@functools.cache
def _page() -> tuple[bytes, str]:
    body = (Path(__file__).parent / "page.html").read_bytes()
    script, style = _hash(body, b"script"), _hash(body, b"style")
    return body, (
        f"default-src 'none'; connect-src 'self'; script-src {script}; style-src {style}; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(body: bytes, element: bytes) -> str:
    """How a policy names the page's only inline ``element`` (CSP level 2)."""
    (content,) = re.findall(b"<%s>(.*?)</%s>" % (element, element), body, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
