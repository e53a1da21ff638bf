# SPDX-License-Identifier: Apache-2.0
"""From a body to an answer, whole or streamed: what all protocols have in common."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.openai.answer_format import Reply, Served, StreamChunks
from phalanx.runtime.server.openai.generation_job import GenerationJob, start_job
from phalanx.runtime.server.openai.parsing import ApiGeneration
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.time_limit import TimeLimit
from phalanx.runtime.server.web.event_stream import EventStream, EventWriter
from phalanx.runtime.server.web.http import json_response, read_body, until_disconnect

__all__ = ["GenerationStream", "generate", "respond", "stream_response"]

_LOG = logging.getLogger("phalanx.server")

HEADERS_SECONDS = 0.5
"""How long a stream waits for its first token before its headers go out: until then a refusal of the engine has its own status."""


async def generate(services: Services, request: Request, parse: Callable[[bytes], ApiGeneration]) -> Response:
    """Parse a request, make room, encode, submit, answer.

    Raises:
        ApiError: the request is refused, or failed before anything was sent.
        ClientGone: the client left before anything was sent.
    """
    arrival = time.monotonic()
    generation = parse(await read_body(request, services.settings))
    services.check_model(generation.model)
    limit = TimeLimit(arrival, services.settings.request_timeout_seconds)
    job = await start_job(services, [generation], limit)
    try:
        return await respond(job, generation, request)
    except BaseException:
        job.close()
        raise


async def respond(job: GenerationJob, generation: ApiGeneration, request: Request) -> Response:
    """Answer, also when the client leaves or the engine stops. Closes the job unless the response does later.

    Raises:
        ApiError: nothing was sent yet and the request failed.
        ClientGone: the client left before anything was sent.
    """
    services = job.services
    reply = generation.reply(Served(services.model_name, services.tokenizer, services.tool_call_form))
    if generation.stream:
        return await stream_response(job, reply.stream(job.usage), request)
    choices = await until_disconnect(request.scope, job.collect())
    # Log-probabilities of a long prompt are many, and writing them must not keep the event loop from other requests.
    is_long = any(choice.prompt_logprobs is not None for choice in choices)
    response = await services.in_worker(lambda: _whole(job, reply)) if is_long else _whole(job, reply)
    job.close()
    return response


def _whole(job: GenerationJob, reply: Reply) -> Response:
    return json_response(reply.whole(job.choices, job.usage()))


async def stream_response(job: GenerationJob, chunks: StreamChunks, request: Request) -> Response:
    """A stream of events as ``chunks`` writes them.

    Raises:
        ApiError: the request failed before its first token, and soon.
        ClientGone: the client left before anything was sent.
    """
    first = await until_disconnect(request.scope, _first_events(job))
    stream = GenerationStream(job, chunks, first)
    return EventStream(stream.start, job.close)


async def _first_events(job: GenerationJob) -> list[tuple[Answer, list[TokenEvent]]]:
    """The first events of a stream; none when they take longer than the headers should."""
    try:
        async with asyncio.timeout(HEADERS_SECONDS):
            return await job.next()
    except TimeoutError:
        return []


class GenerationStream:
    """Writes a job's chunks as its tokens arrive, from the callback that brings them: no task has to wake for a token.

    Args:
        first: events that arrived before the headers went out.
    """

    def __init__(self, job: GenerationJob, chunks: StreamChunks, first: list[tuple[Answer, list[TokenEvent]]]) -> None:
        self._job, self._chunks, self._first = job, chunks, first
        self._writer: EventWriter | None = None
        self._write_text: Callable[[str], bytes] | None = None

    def start(self, writer: EventWriter) -> None:
        """The headers are out: write what is there, and the rest as it comes."""
        self._writer = writer
        writer.write(self._chunks.opening(self._job.choices))
        self._write(self._first)
        if not writer.is_finished:
            self._flush(time.monotonic())
        if self._job.group is not None and not writer.is_finished:
            writer.on_writable(lambda: self._flush(time.monotonic()))
            self._job.group.listen(self._flush)

    def _flush(self, now: float) -> None:
        """Write what has arrived, unless the client is behind: then it waits, merged, until the client has read."""
        writer = self._writer
        assert writer is not None
        if not writer.connection.is_writable:
            return
        try:
            if self._write_text is not None and (text := self._job.take_text(now)) is not None:
                writer.write(self._write_text(text))
                return
            self._write(self._job.take(now))
            self._job.raise_failure()
        except ApiError as error:
            self._finish(self._chunks.error(error))
        except Exception:
            _LOG.exception("a stream cannot be written")
            self._finish(
                self._chunks.error(ApiError(500, "internal error; see the server's log", code="internal_error"))
            )

    def _write(self, taken: list[tuple[Answer, list[TokenEvent]]]) -> None:
        assert self._writer is not None
        data = b"".join([self._chunks.tokens(choice, events) for choice, events in taken]) if taken else b""
        if not self._job.num_unfinished:
            self._finish(data + self._chunks.usage())
            return
        self._writer.write(data)
        choice = self._job.only_text
        self._write_text = None if choice is None else self._chunks.text_writer(choice)

    def _finish(self, data: bytes) -> None:
        """Write the end, unless it is written: an engine may fail after an answer that a stop text has ended."""
        assert self._writer is not None
        if self._writer.is_finished:
            return
        if self._job.group is not None:
            self._job.group.listen(None)
        self._writer.on_writable(None)
        self._writer.finish(data + self._chunks.done)
