"""Messages between the two processes survive any cutting of the byte stream, and nothing else is accepted."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.parallel.errors import CommunicatorError
from phalanx.runtime.request import Logprob, Request, SamplingParams, TokenDelta
from phalanx.runtime.server.link.channel import MESSAGE_BYTES, REQUEST_BYTES, FrontendChannel, FrontendChannels
from phalanx.runtime.server.link.messages import (
    Cancel,
    Deltas,
    Drained,
    Failed,
    FrameDecoder,
    FromFrontend,
    Stop,
    Submit,
    ToFrontend,
    encode_frame,
)

REQUEST = Request("7", (1, 2, 3), SamplingParams(stop=("é", "b"), seed=2**64 - 1, logprobs=3), deadline=12.5)
DELTA = TokenDelta("7", (5,), (Logprob(5, -0.25, ((5, -0.25), (6, -2.0))),), (None, Logprob(2, -1.0)), "stop", "é", 4)


@contextmanager
def channel_pair() -> Iterator[tuple[FrontendChannels, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = FrontendChannels([FrontendChannel(ours, "HTTP process 0")])
    with theirs:
        yield channel, theirs
    channel.close()


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(1, 30), min_size=1))
def test_bodies_come_out_as_they_went_in_however_the_stream_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    frames, received, position, step = FrameDecoder(), [], 0, 0
    while position < len(stream):
        size = cuts[step % len(cuts)]
        received += list(frames.feed(stream[position : position + size]))
        position, step = position + size, step + 1
    assert received == bodies


def test_an_absurd_length_is_an_error() -> None:
    with pytest.raises(CommunicatorError, match="claims 4294967295 bytes"):
        list(FrameDecoder().feed(b"\xff\xff\xff\xff"))


@pytest.mark.parametrize("message", [Submit(REQUEST), Cancel("7"), Drained()])
def test_messages_to_the_engine_keep_their_values(message: FromFrontend) -> None:
    (body,) = FrameDecoder().feed(encode_frame(message))
    assert msgspec.msgpack.decode(body, type=FromFrontend) == message


@pytest.mark.parametrize("message", [Deltas(["1", "2"], [3, 4], [DELTA]), Failed("why"), Stop()])
def test_messages_to_the_http_process_keep_their_values(message: ToFrontend) -> None:
    (body,) = FrameDecoder().feed(encode_frame(message))
    assert msgspec.msgpack.decode(body, type=ToFrontend) == message


@pytest.mark.parametrize("value", [{"type": "Other"}, {"type": "Cancel"}, {"type": "Cancel", "request_id": 5}, [], 3])
def test_other_types_are_not_decoded(value: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=FromFrontend)


def test_receive_returns_what_came_and_does_not_wait_when_told_so() -> None:
    with channel_pair() as (channel, theirs):
        assert channel.receive(0.0) == []
        theirs.sendall(encode_frame(Cancel("1")) + encode_frame(Cancel("2"))[:5])
        assert channel.receive(1.0) == [(0, Cancel("1"))]
        theirs.sendall(encode_frame(Cancel("2"))[5:])
        assert channel.receive(1.0) == [(0, Cancel("2"))]


def test_a_reader_that_is_slow_does_not_hold_the_sender_up_and_misses_nothing() -> None:
    with channel_pair() as (channel, theirs):
        sent = [Failed(f"{number} {'x' * 10_000}") for number in range(200)]
        for message in sent:
            channel.send(message)
        assert not channel.flush(0.0)
        frames, received = FrameDecoder(), []
        while len(received) < len(sent):
            channel.receive(0.0)
            bodies = frames.feed(theirs.recv(65_536))
            received += [msgspec.msgpack.decode(body, type=ToFrontend) for body in bodies]
        assert received == sent
        assert channel.flush(0.0)


def test_a_closed_end_is_an_error_with_a_way_out() -> None:
    with channel_pair() as (channel, theirs):
        theirs.close()
        with pytest.raises(CommunicatorError, match="HTTP process 0 is gone"):
            channel.receive(1.0)
        with pytest.raises(CommunicatorError, match="HTTP process 0 is gone"):
            channel.send(Stop())
        assert not channel.flush(1.0)


def test_a_long_prompt_arrives_before_one_step() -> None:
    with channel_pair() as (channels, theirs):
        request = Request("0", tuple(range(25_000)), SamplingParams())
        data = encode_frame(Submit(request))
        assert len(data) > 2 * REQUEST_BYTES
        theirs.sendall(data)
        assert channels.receive(1.0) == [(0, Submit(request))]


def test_a_request_that_never_ends_holds_no_step_up() -> None:
    """However fast it comes: a part of it is taken before each step."""
    with channel_pair() as (channels, theirs):
        request = Request("0", tuple(range(30_000, 1_030_000)), SamplingParams())
        data = encode_frame(Submit(request))
        sending = threading.Thread(target=theirs.sendall, args=(data,))
        sending.start()
        num_turns, taken = 0, []
        while not taken:
            taken = channels.receive(1.0)
            num_turns += 1
        sending.join()
        assert num_turns > len(data) // (MESSAGE_BYTES + REQUEST_BYTES)
        assert taken == [(0, Submit(request))]


def test_a_burst_of_requests_is_taken_a_few_before_each_step() -> None:
    with channel_pair() as (channels, theirs):
        requests = [Request(str(number), tuple(range(200, 500)), SamplingParams()) for number in range(100)]
        theirs.sendall(b"".join(encode_frame(Submit(request)) for request in requests))
        taken = []
        while len(taken) < len(requests):
            turn = channels.receive(1.0)
            assert 0 < len(turn) < 40
            taken += turn
        assert [message for _, message in taken] == [Submit(request) for request in requests]
