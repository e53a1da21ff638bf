# SPDX-License-Identifier: Apache-2.0
"""The routes of the Messages protocol."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phalanx.runtime.server.anthropic.parsing import conversation, parse_message
from phalanx.runtime.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from phalanx.runtime.server.openai.encoding import prompt_token_ids
from phalanx.runtime.server.openai.generation import generate
from phalanx.runtime.server.openai.protocol import decode_body
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.web.body_route import OBJECT_OR_EVENTS, BodyRoute
from phalanx.runtime.server.web.http import json_response, read_body

__all__ = ["messages_routes"]


def messages_routes(services: Services) -> list[Route]:
    """Return the routes below ``/v1/messages``."""

    async def message(request: Request) -> Response:
        """``POST /v1/messages``: one message, or its events."""
        return await generate(services, request, parse_message)

    async def count_tokens(request: Request) -> Response:
        """``POST /v1/messages/count_tokens``: the length of the prompt."""
        body = decode_body(await read_body(request, services.settings), CountTokensRequest)
        services.check_model(body.model)
        token_ids = await prompt_token_ids(services, conversation(body), add_special_tokens=False)
        return json_response({"input_tokens": len(token_ids)})

    return [
        BodyRoute("/v1/messages", message, MessagesRequest, "anthropic", OBJECT_OR_EVENTS),
        BodyRoute("/v1/messages/count_tokens", count_tokens, CountTokensRequest),
    ]
