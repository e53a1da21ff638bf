# SPDX-License-Identifier: Apache-2.0
"""The HTTP routes of the v2 protocol."""

from __future__ import annotations

import gzip
import time
import zlib
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.kserve.answers import EventChunks, event, scalars
from phalanx.runtime.server.kserve.contract import ModelContract
from phalanx.runtime.server.kserve.inference import Inference
from phalanx.runtime.server.kserve.inputs import GenerateBody, read_fields_body, tensor_rows
from phalanx.runtime.server.kserve.wire import HEADER_LENGTH, InferHeader, read_request, write_response
from phalanx.runtime.server.link.engine_client import ServerState
from phalanx.runtime.server.openai.generation import stream_response
from phalanx.runtime.server.time_limit import TimeLimit
from phalanx.runtime.server.web.body_route import BodyRoute
from phalanx.runtime.server.web.http import json_response, read_body, until_disconnect

__all__ = ["v2_routes"]

SMALLEST_COMPRESSED = 256
"""Bytes of an answer below which compression costs more than it saves."""


def v2_routes(inference: Inference) -> list[Route]:
    """All routes below ``/v2``."""
    door = _Door(inference)
    model, post = "/v2/models/{model}", ["POST"]
    routes: list[Route] = [
        Route("/v2", door.metadata),
        Route("/v2/health/live", door.live),
        Route("/v2/health/ready", door.ready),
        Route("/v2/models/stats", door.statistics),
        Route("/v2/repository/index", door.index, methods=post),
        Route("/v2/repository/models/{model}/load", door.refuse, methods=post),
        Route("/v2/repository/models/{model}/unload", door.refuse, methods=post),
    ]
    for base in (model, f"{model}/versions/{{version}}"):
        routes += [
            Route(base, door.model_metadata),
            Route(f"{base}/ready", door.model_ready),
            Route(f"{base}/config", door.config),
            Route(f"{base}/stats", door.statistics),
            BodyRoute(f"{base}/infer", door.infer, InferHeader),
            BodyRoute(f"{base}/generate", door.generate, GenerateBody, "triton"),
            BodyRoute(f"{base}/generate_stream", door.generate_stream, GenerateBody, "triton", ("text/event-stream",)),
        ]
    return routes


class _Door:
    """One method a route; each returns the whole answer or raises `ApiError`."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def live(self, request: Request) -> Response:
        """200 while the engine is there, also while it drains."""
        if self._inference.services.client.state is ServerState.FAILED:
            raise ApiError(503, "the engine stopped")
        return Response()

    async def ready(self, request: Request) -> Response:
        """200 while requests are answered; the gate says 503 otherwise."""
        return Response()

    async def metadata(self, request: Request) -> Response:
        """Name, version, extensions."""
        return json_response(self._inference.metadata())

    async def model_metadata(self, request: Request) -> Response:
        """Inputs and outputs of a model."""
        return json_response(self._contract(request).metadata())

    async def model_ready(self, request: Request) -> Response:
        """200 if the model is there."""
        self._contract(request)
        return Response()

    async def config(self, request: Request) -> Response:
        """Triton's ``ModelConfig``."""
        return json_response(self._contract(request).config())

    async def statistics(self, request: Request) -> Response:
        """Counts of one model, or of all."""
        parameters = request.path_params
        return json_response(
            self._inference.model_statistics(parameters.get("model", ""), parameters.get("version", ""))
        )

    async def index(self, request: Request) -> Response:
        """The models."""
        return json_response(self._inference.index())

    async def refuse(self, request: Request) -> Response:
        """Loading and unloading: the model is chosen when the server starts."""
        raise ApiError(501, "models are not loaded or unloaded while the server runs; start another server")

    async def infer(self, request: Request) -> Response:
        """Tensors in, tensors out."""
        arrival, contract = time.monotonic(), self._contract(request)
        body = await read_body(request, self._inference.services.settings)
        asked = read_request(body, request.headers.get(HEADER_LENGTH))
        self._inference.check_outputs(contract, list(asked.outputs))
        rows = tensor_rows(contract, asked.inputs)
        limit = self._inference.limit(arrival, asked.parameters)
        outputs = await until_disconnect(request.scope, self._inference.run(contract, rows, limit))
        headers, answer = write_response(asked, contract.name, outputs)
        return _compressed(answer, headers, request.headers.get("accept-encoding", ""))

    async def generate(self, request: Request) -> Response:
        """JSON fields in, one JSON object out."""
        contract = self._generating(request)
        row, request_id, limit = await self._read_fields(request, contract)
        outputs = await until_disconnect(request.scope, self._inference.run(contract, [row], limit))
        return json_response(scalars(contract, outputs, request_id))

    async def generate_stream(self, request: Request) -> Response:
        """JSON fields in, events out: one, unless ``stream`` is true."""
        contract = self._generating(request)
        row, request_id, limit = await self._read_fields(request, contract)
        query = self._inference.parse(contract, [row])
        if not query.stream:
            outputs = await until_disconnect(request.scope, self._inference.run(contract, [row], limit))
            return Response(event(scalars(contract, outputs, request_id)), media_type="text/event-stream")
        started, statistics = time.monotonic_ns(), self._inference.statistics[contract.name]
        job = await self._inference.start(query, limit)
        job.held.callback(
            lambda: (
                statistics.count_success(1, time.monotonic_ns() - started)
                if job.is_finished
                else statistics.count_failure(time.monotonic_ns() - started)
            )
        )
        try:
            return await stream_response(job, EventChunks(contract, query, request_id), request)
        except BaseException:
            job.close()
            raise

    def _contract(self, request: Request) -> ModelContract:
        return self._inference.contract(request.path_params["model"], request.path_params.get("version", ""))

    def _generating(self, request: Request) -> ModelContract:
        contract = self._contract(request)
        if all(spec.name != "text_input" for spec in contract.inputs):
            raise ApiError(400, f"model '{contract.name}' takes tensors; use its infer route, or model 'ensemble'")
        return contract

    async def _read_fields(self, request: Request, contract: ModelContract) -> tuple[dict[str, Any], str, TimeLimit]:
        arrival = time.monotonic()
        body = await read_body(request, self._inference.services.settings)
        row, request_id, parameters = read_fields_body(contract, body)
        return row, request_id, self._inference.limit(arrival, parameters)


def _compressed(body: bytes, headers: dict[str, str], accepted: str) -> Response:
    """``body`` in the first coding that the client accepts."""
    codings = [coding.partition(";")[0].strip().lower() for coding in accepted.split(",")]
    if len(body) >= SMALLEST_COMPRESSED and "gzip" in codings:
        return Response(gzip.compress(body, 1), headers={**headers, "content-encoding": "gzip"})
    if len(body) >= SMALLEST_COMPRESSED and "deflate" in codings:
        return Response(zlib.compress(body, 1), headers={**headers, "content-encoding": "deflate"})
    return Response(body, headers=headers)
