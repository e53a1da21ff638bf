# SPDX-License-Identifier: Apache-2.0
"""The routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from phalanx import __version__
from phalanx.runtime.server.anthropic.routes import messages_routes
from phalanx.runtime.server.errors import ApiError, invalid
from phalanx.runtime.server.gate import Gate
from phalanx.runtime.server.kserve.inference import Inference
from phalanx.runtime.server.kserve.routes import v2_routes
from phalanx.runtime.server.link.engine_client import ServerState
from phalanx.runtime.server.link.messages import DrainRequest
from phalanx.runtime.server.openai.encoding import render
from phalanx.runtime.server.openai.generation import generate
from phalanx.runtime.server.openai.parsing import conversation, parse_chat, parse_completion
from phalanx.runtime.server.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    decode_body,
)
from phalanx.runtime.server.openapi import describe
from phalanx.runtime.server.responses.parsing import parse_response
from phalanx.runtime.server.responses.protocol import ResponsesRequest
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.web.body_route import OBJECT_OR_EVENTS, BodyRoute
from phalanx.runtime.server.web.http import ClientGone, error_response, json_response, read_body
from phalanx.runtime.server.web.page import page_response

__all__ = ["build_app", "server_routes"]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_app(
    services: Services, inference: Inference, api_keys: Sequence[bytes], admin_keys: Sequence[bytes]
) -> ASGIApp:
    """Return the whole HTTP side as one ASGI application."""
    routes = Routes(services)
    app = Starlette(
        routes=server_routes(services, inference),
        exception_handlers={
            ApiError: routes.on_api_error,
            ClientGone: routes.on_client_gone,
            HTTPException: routes.on_http_exception,
            Exception: routes.on_bug,
        },
    )
    app.router.redirect_slashes = False
    return Gate(app, services.client, api_keys, admin_keys, services.settings.cors_origins)


def server_routes(services: Services, inference: Inference) -> list[Route]:
    """Return every route of the server."""
    routes = Routes(services)
    return [  # tried in this order
        BodyRoute("/v1/completions", routes.completions, CompletionRequest, "openai", OBJECT_OR_EVENTS),
        BodyRoute("/v1/chat/completions", routes.chat, ChatRequest, "openai", OBJECT_OR_EVENTS),
        BodyRoute("/v1/responses", routes.responses, ResponsesRequest, "openai", OBJECT_OR_EVENTS),
        Route("/", routes.page),
        Route("/health", routes.health),
        Route("/ready", routes.ready),
        Route("/ping", routes.health),
        Route("/version", routes.version),
        Route("/openapi.json", routes.openapi),
        Route("/server_info", routes.server_info),
        Route("/metrics", routes.metrics),
        Route("/v1/models", routes.models),
        Route("/v1/models/{model:path}", routes.model),
        BodyRoute("/tokenize", routes.tokenize, TokenizeRequest),
        BodyRoute("/detokenize", routes.detokenize, DetokenizeRequest),
        Route("/tokenizer_info", routes.tokenizer_info),
        Route("/admin/drain", routes.drain, methods=["POST"]),
        *messages_routes(services),
        *v2_routes(inference),
    ]


class Routes:
    """One method a route; each returns the whole answer or raises `ApiError`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def page(self, request: Request) -> Response:
        """A page to try the model and watch the server."""
        return page_response()

    async def health(self, request: Request) -> Response:
        """200 while steps make progress, or the engine is idle, and every rank answers."""
        services, client = self._services, self._services.client
        if client.state is ServerState.FAILED:
            raise ApiError(503, f"the engine stopped: {client.failure}", code="engine_failed")
        if client.trouble is not None:
            raise ApiError(503, client.trouble, code="engine_stalled")
        silent = client.seconds_without_progress()
        if silent > services.settings.stall_seconds:
            raise ApiError(503, f"no step has finished for {silent:.0f} s", code="engine_stalled")
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while new requests are answered; the gate says 503 otherwise."""
        return await self.health(request)

    async def version(self, request: Request) -> Response:
        """The version of Phalanx."""
        return json_response({"version": __version__})

    async def openapi(self, request: Request) -> Response:
        """This description of the routes."""
        return json_response(describe(request.app.routes))

    async def server_info(self, request: Request) -> Response:
        """What runs here: model, engine and why, layout, hosts, cache."""
        return json_response({"version": __version__, **self._services.model.about})

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        return Response(self._services.metrics.render(), headers={"content-type": METRICS_TYPE})

    async def models(self, request: Request) -> Response:
        """The names under which the model is served."""
        names = self._services.settings.model_names
        return json_response({"object": "list", "data": [self._model_card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["model"]
        self._services.check_model(name)
        return json_response(self._model_card(name))

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await generate(self._services, request, parse_completion)

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await generate(self._services, request, parse_chat)

    async def responses(self, request: Request) -> Response:
        """``POST /v1/responses``."""
        return await generate(self._services, request, parse_response)

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of messages."""
        services = self._services
        body = decode_body(await read_body(request, services.settings), TokenizeRequest)
        services.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        if body.prompt is None:
            chat = ChatRequest(
                messages=body.messages or [],
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
            )
            text = await render(services, conversation(chat))
            token_ids = await services.encode(text, add_special_tokens=body.add_special_tokens is True)
        else:
            if body.tools:
                raise invalid("tools need messages; leave them out, or use messages", "tools")
            special = body.add_special_tokens is not False
            token_ids = await services.encode(body.prompt, add_special_tokens=special)
        limit = services.model.max_model_len
        counted = {"tokens": token_ids, "count": len(token_ids), "max_model_len": limit}
        if body.return_token_strs:
            counted["token_strs"] = list(map(services.need_tokenizer("prompt").spelling, token_ids))
        return json_response(counted)

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids."""
        services = self._services
        body = decode_body(await read_body(request, services.settings), DetokenizeRequest)
        services.check_model(body.model)
        tokenizer = services.need_tokenizer("tokens")
        services.check_token_ids(body.tokens, "tokens")
        text = await services.in_worker(
            lambda: tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
        )
        return json_response({"prompt": text})

    async def drain(self, request: Request) -> Response:
        """End the server once open requests are answered, as SIGUSR1 does."""
        client = self._services.client
        client.send(DrainRequest())
        return json_response({"status": "draining", "open_requests": client.num_open}, 202)

    async def tokenizer_info(self, request: Request) -> Response:
        """The named special tokens."""
        return json_response({**self._services.need_tokenizer("tokenizer_info").special_tokens})

    async def on_api_error(self, request: Request, error: Exception) -> Response:
        """A request that is refused or failed."""
        assert isinstance(error, ApiError)
        self._services.metrics.refused.labels(str(error.status)).inc()
        return error_response(error, request.url.path)

    async def on_client_gone(self, request: Request, error: Exception) -> Response:
        """The client has left; 499 shows in the log."""
        return Response(status_code=499)

    async def on_http_exception(self, request: Request, error: Exception) -> Response:
        """No such route or method."""
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        codes = {404: "route_not_found", 405: "method_not_allowed"}
        headers = dict(error.headers or {})
        refused = ApiError(error.status_code, message, code=codes.get(error.status_code), headers=headers)
        return error_response(refused, request.url.path)

    async def on_bug(self, request: Request, error: Exception) -> Response:
        """An error of ours; the traceback goes to the log."""
        bug = ApiError(500, "internal error; see the server's log", code="internal_error")
        return error_response(bug, request.url.path)

    def _model_card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._services.created,
            "owned_by": "phalanx",
            "max_model_len": self._services.model.max_model_len,
            "quantization": self._services.model.about.get("quantisation"),
        }
