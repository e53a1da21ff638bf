# SPDX-License-Identifier: Apache-2.0
"""The v2 protocol over gRPC: service ``inference.GRPCInferenceService``, in the event loop of the HTTP process.

Errors have a status; in a stream they are messages, so that its other requests go on, unless the stream was opened with
``triton_grpc_error: true``. A client that cancels, leaves or reaches its deadline cancels the handler, which frees the request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf import json_format
from tritonclient.grpc import service_pb2

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.server.errors import ApiError, unavailable
from phalanx.runtime.server.kserve.contract import MODELS
from phalanx.runtime.server.kserve.grpc_messages import read_inputs, read_parameters, wanted_outputs, write_response
from phalanx.runtime.server.kserve.inference import Inference
from phalanx.runtime.server.kserve.inputs import tensor_rows
from phalanx.runtime.server.link.engine_client import ServerState
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.web.api_keys import has_key
from phalanx.runtime.server.web.log import log_request, request_id
from phalanx.runtime.server.web.tls import read_pem

__all__ = ["start_grpc"]

_LOG = logging.getLogger("phalanx.server")

_STATUS = MappingProxyType(
    {
        400: grpc.StatusCode.INVALID_ARGUMENT,
        401: grpc.StatusCode.UNAUTHENTICATED,
        404: grpc.StatusCode.NOT_FOUND,
        408: grpc.StatusCode.DEADLINE_EXCEEDED,
        429: grpc.StatusCode.RESOURCE_EXHAUSTED,
        501: grpc.StatusCode.UNIMPLEMENTED,
        503: grpc.StatusCode.UNAVAILABLE,
    }
)

_PROBES = frozenset({"ServerLive", "ServerReady"})

MAX_CONCURRENT_STREAMS = 1024
"""Calls that one connection may have open."""


async def start_grpc(inference: Inference, api_keys: Sequence[bytes], settings: FrontendSettings) -> Any:
    """Serve on ``settings.grpc_port``; returns the server, which has to be stopped.

    Raises:
        ConfigError: the port cannot be opened.
    """
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", settings.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
            ("grpc.max_metadata_size", settings.max_header_bytes),
            ("grpc.so_reuseport", int(settings.num_processes > 1)),
        ),
        maximum_concurrent_rpcs=settings.max_connections,
    )
    server.add_generic_rpc_handlers((_Door(inference, api_keys).handlers(),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        if settings.ssl_certfile is not None and settings.ssl_keyfile is not None:
            pem = read_pem(settings.ssl_certfile, settings.ssl_keyfile)
            server.add_secure_port(f"{host}:{settings.grpc_port}", grpc.ssl_server_credentials([pem]))
        else:
            server.add_insecure_port(f"{host}:{settings.grpc_port}")
    except RuntimeError:
        raise ConfigError(
            f"--grpc-port {settings.grpc_port} on {settings.host} cannot be opened; choose another, or 0 for any free one"
        ) from None
    await server.start()
    return server


class _Door:
    """One method a call."""

    def __init__(self, inference: Inference, api_keys: Sequence[bytes]) -> None:
        self._inference, self._api_keys = inference, tuple(api_keys)

    def handlers(self) -> Any:
        """All calls of the service that are served; gRPC answers the others with UNIMPLEMENTED."""
        served: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._refuse_loading,
            "RepositoryModelUnload": self._refuse_loading,
            "ModelInfer": self._model_infer,
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(name, call),
                request_deserializer=getattr(service_pb2, f"{name}Request").FromString,
                response_serializer=getattr(service_pb2, f"{name}Response").SerializeToString,
            )
            for name, call in served.items()
        }
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._guarded("ModelStreamInfer", self._model_stream_infer),
            request_deserializer=service_pb2.ModelInferRequest.FromString,
            response_serializer=service_pb2.ModelStreamInferResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)

    def _guarded(self, name: str, call: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """``call``, once key and state allow it; errors become statuses."""

        async def guarded(request: Any, context: Any) -> Any:
            try:
                if name not in _PROBES:
                    self._check(context)
                return await call(request, context)
            except* ApiError as group:
                refusal = _first(group)
            except* Exception:
                _LOG.exception("%s failed", name)
                refusal = ApiError(500, "internal error; see the server's log")
            self._inference.services.metrics.refused.labels(str(refusal.status)).inc()
            await context.abort(_STATUS.get(refusal.status, grpc.StatusCode.INTERNAL), str(refusal))

        return _logged(name, guarded)

    def _check(self, context: Any) -> None:
        client, metadata = self._inference.services.client, dict(context.invocation_metadata() or ())
        if not has_key(str(metadata.get("authorization", "")), self._api_keys):
            raise ApiError(401, "no valid API key; send one as metadata 'authorization: Bearer KEY'")
        if client.state is ServerState.STARTING:
            raise unavailable("the server is starting; try again in a moment")
        if client.state is ServerState.DRAINING:
            raise unavailable("the server is shutting down; use another one, or try again later")
        if client.state is ServerState.FAILED:
            raise unavailable(f"the engine stopped: {client.failure}")

    async def _server_live(self, request: Any, context: Any) -> Any:
        live = self._inference.services.client.state is not ServerState.FAILED
        return service_pb2.ServerLiveResponse(live=live)

    async def _server_ready(self, request: Any, context: Any) -> Any:
        ready = self._inference.services.client.state is ServerState.SERVING
        return service_pb2.ServerReadyResponse(ready=ready)

    async def _model_ready(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name in MODELS and request.version in ("", "1"))

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(**self._inference.metadata())

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        metadata = self._inference.contract(request.name, request.version).metadata()
        return json_format.ParseDict(metadata, service_pb2.ModelMetadataResponse())

    async def _model_config(self, request: Any, context: Any) -> Any:
        config = self._inference.contract(request.name, request.version).config()
        return json_format.ParseDict({"config": config}, service_pb2.ModelConfigResponse())

    async def _model_statistics(self, request: Any, context: Any) -> Any:
        statistics = self._inference.model_statistics(request.name, request.version)
        return json_format.ParseDict(statistics, service_pb2.ModelStatisticsResponse())

    async def _repository_index(self, request: Any, context: Any) -> Any:
        return json_format.ParseDict({"models": self._inference.index()}, service_pb2.RepositoryIndexResponse())

    async def _refuse_loading(self, request: Any, context: Any) -> Any:
        raise ApiError(501, "models are not loaded or unloaded while the server runs; start another server")

    async def _model_infer(self, request: Any, context: Any) -> Any:
        limit = self._inference.limit(time.monotonic(), read_parameters(request))
        contract = self._inference.contract(request.model_name, request.model_version)
        self._inference.check_outputs(contract, wanted_outputs(request))
        rows = tensor_rows(contract, read_inputs(request))
        outputs = await self._inference.run(contract, rows, limit)
        return write_response(request, outputs)

    async def _model_stream_infer(self, requests: Any, context: Any) -> None:
        """Answer each request of a stream as its tokens come, all of them at once."""
        ends_at_error = dict(context.invocation_metadata() or ()).get("triton_grpc_error") == "true"
        stream = _Stream(self._inference, context, ends_at_error)
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                group.create_task(stream.answer(request))


class _Stream:
    """The answering side of a stream; responses of several requests do not interrupt each other."""

    def __init__(self, inference: Inference, context: Any, ends_at_error: bool) -> None:
        self._inference, self._context, self._ends_at_error = inference, context, ends_at_error
        self._lock = asyncio.Lock()

    async def answer(self, request: Any) -> None:
        """Write all responses to one request; an error is the last of them, or ends the stream."""
        try:
            await self._respond_or_fail(request)
        except (grpc.aio.InternalError, grpc.aio.UsageError):
            return  # a write after the client has left; the call is cancelled next

    async def _respond_or_fail(self, request: Any) -> None:
        try:
            await self._respond(request)
        except grpc.aio.BaseError:
            raise
        except Exception as error:
            if self._ends_at_error:
                raise
            if not isinstance(error, ApiError):
                _LOG.exception("a request of a stream failed")
                error = ApiError(500, "internal error; see the server's log")
            self._inference.services.metrics.refused.labels(str(error.status)).inc()
            failed = service_pb2.ModelStreamInferResponse(error_message=str(error))
            failed.infer_response.CopyFrom(write_response(request, (), final=True))
            await self._write(failed)

    async def _respond(self, request: Any) -> None:
        parameters = read_parameters(request)
        limit = self._inference.limit(time.monotonic(), parameters)
        contract = self._inference.contract(request.model_name, request.model_version)
        self._inference.check_outputs(contract, wanted_outputs(request))
        rows = tensor_rows(contract, read_inputs(request))
        marks_with_empty = parameters.get("triton_enable_empty_final_response") is True
        async with aclosing(self._inference.stream(contract, rows, limit)) as responses:
            async for outputs, last in responses:
                await self._write_one(request, outputs, last and not marks_with_empty)
        if marks_with_empty:
            await self._write_one(request, (), True)

    async def _write_one(self, request: Any, outputs: Sequence[Any], final: bool) -> None:
        response = service_pb2.ModelStreamInferResponse()
        response.infer_response.CopyFrom(write_response(request, outputs, final=final))
        await self._write(response)

    async def _write(self, response: Any) -> None:
        async with self._lock:
            await self._context.write(response)


def _logged(name: str, call: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """``call``, and a line in the log when it is over."""

    async def logged(request: Any, context: Any) -> Any:
        started, status = time.monotonic(), "CANCELLED"
        given = dict(context.invocation_metadata() or ()).get("x-request-id", "")
        try:
            answer = await call(request, context)
            status = "OK"
        except grpc.aio.AbortError:
            status = context.code().name
            raise
        finally:
            seconds = time.monotonic() - started
            log_request(request_id(str(given)), "gRPC", name, status, seconds, is_probe=name in _PROBES)
        return answer

    return logged


def _first(group: BaseExceptionGroup[ApiError]) -> ApiError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ApiError)
    return error
