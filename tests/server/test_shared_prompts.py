"""Several answers to one prompt reach the engine as requests that share its computation."""

from __future__ import annotations

import asyncio
import socket

import msgspec

from phalanx.runtime.request import SamplingParams
from phalanx.runtime.server.board import Board, Room
from phalanx.runtime.server.link.engine_client import EngineClient
from phalanx.runtime.server.link.messages import FrameDecoder, FromFrontend, Submit


class RecordingTransport(asyncio.Transport):
    """Keeps what is written to the engine at the other end of ``sock``."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
        self.written = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data


def test_requests_with_one_prompt_name_the_first_of_them() -> None:
    client = EngineClient(lambda model: None, lambda: None, lambda stats: None, Room(Board.of_one()))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport = RecordingTransport(ours)
        client.connection_made(transport)
    client.submit([(prompt, SamplingParams(seed=seed)) for prompt in ((1, 2), (3, 4)) for seed in range(3)], None)
    messages = [
        msgspec.msgpack.decode(body, type=FromFrontend) for body in FrameDecoder().feed(bytes(transport.written))
    ]
    requests = [message.request for message in messages if isinstance(message, Submit)]
    first, second = requests[0].request_id, requests[3].request_id
    assert [request.fork_from for request in requests] == [None, first, first, None, second, second]
