"""The client of ``launch.bench serve`` reads streams however the bytes are cut, and says what is wrong with broken ones."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.launch.load.messages import Answer
from phalanx.launch.load.stream import Target, _Reader, send

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [
    'data: {"choices": [{"text": "a\u2028b"}]}\n\n'.encode(),
    b": waiting\n\n",
    b'data: {"choices": [{"text": "c"}]}\r\n\r\ndata: {"choices": [{"text": "d"}]}\n\n',
    b'data: {"choices": [], "usage": {"completion_tokens": 3, "details": null}}\n\ndata: [DONE]\n\n',
]


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])


class Closable(asyncio.Transport):
    def close(self) -> None:
        """There is no connection."""


async def read(pieces: list[bytes]) -> Answer:
    """The answer in a response that comes in ``pieces`` before the connection is closed."""
    answer = Answer(0.0)
    reader = _Reader(answer, lambda: None)
    reader.connection_made(Closable())
    for piece in pieces:
        if not reader.end.done():
            reader.data_received(piece)
    reader.connection_lost(None)
    assert reader.end.done()
    return answer


@given(st.lists(st.integers(1, 60), min_size=1))
def test_events_are_found_however_the_stream_is_cut(sizes: list[int]) -> None:
    data, pieces = HEAD + chunked(EVENTS), []
    while data:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[:size])
        data = data[size:]
    answer = asyncio.run(read(pieces))
    assert (len(answer.arrivals), answer.output_tokens, answer.error) == (3, 3, "")


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (HEAD + chunked(EVENTS)[:-5], "the connection was closed in the middle"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + EVENTS[0], "the connection was closed in the middle"),
        (b"HTTP/1.1 200 OK\r\nContent-", "the connection was closed in the middle"),
        (HEAD + chunked([b'data: {"error": {"message": "lost a rank"}}\n\n']), "lost a rank"),
        (HEAD + chunked([b'data: {"choices"}\n\n']), "DecodeError"),
        (b"HTTP/1.1 429 Busy\r\nContent-Length: 4\r\n\r\nfull", "429 full; use a smaller --max-concurrency"),
    ],
)
def test_a_broken_answer_says_why(response: bytes, error: str) -> None:
    assert error in asyncio.run(read([response])).error


def test_an_answer_that_ends_with_the_connection_is_whole() -> None:
    answer = asyncio.run(read([b"HTTP/1.0 200 OK\r\n\r\n", *EVENTS]))
    assert (len(answer.arrivals), answer.error) == (3, "")


def test_a_port_where_nothing_listens_is_an_error_of_the_request() -> None:
    assert "ConnectionRefusedError" in asyncio.run(send(Target("http://127.0.0.1:9"), b"{}")).error


def test_the_longest_gap_is_the_streams() -> None:
    assert Answer(0.0, [1.0, 2.0, 5.0, 6.0]).longest_gap == 3.0
    assert Answer(0.0, [1.0]).longest_gap == 0.0
