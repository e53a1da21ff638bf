"""Several HTTP processes on one port: to clients and operators they are one server."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from phalanx.parallel.errors import CapacityError, CommunicatorError, ConfigError
from phalanx.runtime.engine import ReplicaStats
from phalanx.runtime.request import Request, SamplingParams, TokenDelta
from phalanx.runtime.scheduler import DeltaBatch, SchedulerStats
from phalanx.runtime.server.board import Board, Room, create_board
from phalanx.runtime.server.link.bridge import EngineBridge
from phalanx.runtime.server.link.channel import FrontendChannel, FrontendChannels
from phalanx.runtime.server.link.messages import (
    Alive,
    Deltas,
    Drained,
    FrameDecoder,
    FrontendReady,
    ModelInfo,
    Submit,
    ToFrontend,
    encode_frame,
)
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.web.listener import bind

from .jobs import serve
from .servers import Server, stub_server
from .test_lifecycle import events
from .test_routes import metrics

PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "ab", "max_tokens": 200}
NUM_PROCESSES = 3


@pytest.fixture(scope="module")
def three(model_directory: Path) -> Iterator[Server]:
    """Three processes with room for 64 requests together."""
    settings = {"num_processes": NUM_PROCESSES, "model_names": ["stub"]}
    with stub_server(model_directory, settings, max_open_requests=64, step_seconds=0.01) as running:
        yield running


def open_requests(server: Server) -> list[int]:
    """Open requests of each process."""
    shown = metrics(server)
    return [int(shown[f'phalanx_http_requests_open{{process="{number}"}}']) for number in range(NUM_PROCESSES)]


def stream_everywhere(server: Server, body: dict[str, Any] = LONG) -> list[http.client.HTTPResponse]:
    """Streams in every process; Linux chooses the process of a connection by its address."""
    streams = [server.open_stream(PATH, body) for _ in range(6)]
    while not all(open_requests(server)):
        streams.append(server.open_stream(PATH, body))
    return streams


def close(server: Server, streams: list[http.client.HTTPResponse]) -> None:
    """Leave, and wait until no request is open."""
    for stream in streams:
        stream.close()
    while any(open_requests(server)):
        continue


def client_port(stream: http.client.HTTPResponse) -> int:
    """Our side's port of a stream's connection."""
    with socket.socket(fileno=os.dup(stream.fileno())) as connection:
        return int(connection.getsockname()[1])


def client_ports(pid: int) -> set[int]:
    """The other side's port of every TCP connection that a process holds."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    remote_ports = {line.split()[9]: int(line.split()[2].partition(":")[2], 16) for line in lines}
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links}
    return {port for inode, port in remote_ports.items() if inode in inodes}


def test_connections_are_spread_and_leave_nothing_behind(three: Server) -> None:
    close(three, stream_everywhere(three))


def test_the_limit_on_requests_is_one_for_all_processes(three: Server) -> None:
    streams = [three.open_stream(PATH, {**LONG, "n": 16}) for _ in range(4)]
    refused = [three.post(PATH, LONG) for _ in range(8)]
    assert {(answer.status, answer.error["code"]) for answer in refused} == {(429, "queue_full")}
    assert "64 requests are open, at most 64" in refused[0].error["message"]
    close(three, streams)
    assert three.post(PATH, {**LONG, "n": 64, "max_tokens": 1}).status == 200


def test_every_process_shows_the_counts_of_all(three: Server) -> None:
    before = metrics(three)
    for _ in range(12):
        assert three.post(PATH, {"prompt": "abc", "max_tokens": 2}).status == 200
    for _ in range(8):
        after = metrics(three)
        grown = {name: after[name] - before[name] for name in before}
        assert grown["phalanx_prompt_tokens_total"] == 36
        assert grown["phalanx_generation_tokens_total"] == 24
        assert grown['phalanx_requests_finished_total{finish_reason="length"}'] == 12
        assert grown["phalanx_time_to_first_token_seconds_count"] == 12
        assert grown["phalanx_request_duration_seconds_count"] == 12


def test_every_process_shows_tritons_statistics_of_all(three: Server) -> None:
    body = {"text_input": "abc", "max_tokens": 2}
    assert {three.post("/v2/models/ensemble/generate", body).status for _ in range(8)} == {200}
    for _ in range(8):
        (shown,) = three.get("/v2/models/ensemble/stats").json["model_stats"]
        assert (shown["inference_count"], shown["inference_stats"]["success"]["count"]) == (8, 8)


def test_ids_are_unique_over_processes(three: Server) -> None:
    ids = [three.post(PATH, {"prompt": "a", "max_tokens": 1}).json["id"] for _ in range(24)]
    assert len(set(ids)) == 24
    close(three, stream_everywhere(three))
    cancelled = [line for line in three.lines if line.startswith("CANCELLED")]
    assert len(set(cancelled)) == len(cancelled)


def test_all_routes_answer_in_every_process(three: Server) -> None:
    for _ in range(8):
        assert three.get("/health").status == 200
        assert three.get("/ready").status == 200
        assert three.get("/").body.startswith(b"<!doctype html>")


def test_a_drain_waits_for_the_streams_of_all_processes(model_directory: Path) -> None:
    settings = {"num_processes": NUM_PROCESSES}
    with stub_server(model_directory, settings, max_open_requests=64, step_seconds=0.01) as server:
        streams = stream_everywhere(server)
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait()[0] == 0


def test_when_one_process_is_killed_clients_of_the_others_are_told_and_the_server_ends(model_directory: Path) -> None:
    settings = {"num_processes": NUM_PROCESSES}
    with stub_server(model_directory, settings, max_open_requests=64, step_seconds=0.01) as server:
        streams = stream_everywhere(server)
        os.kill(server.http_processes()[1], signal.SIGKILL)
        told = 0
        for stream in streams:
            try:
                told += events(stream)[-1]["error"]["code"] == "engine_failed"
            except http.client.HTTPException:
                continue
            except ConnectionError:
                continue
        assert told >= 2
        status, errors = server.wait()
        assert status == 1
        assert re.search(r"HTTP process 1 \(pid \d+\) is gone", errors)


def test_a_process_that_stands_still_holds_up_no_other(model_directory: Path) -> None:
    settings = {"num_processes": NUM_PROCESSES}
    with stub_server(model_directory, settings, max_open_requests=64, step_seconds=0.01) as server:
        streams = stream_everywhere(server)
        stopped = server.http_processes()[0]
        of_stopped = [stream for stream in streams if client_port(stream) in client_ports(stopped)]
        os.kill(stopped, signal.SIGSTOP)
        try:
            for stream in streams:
                if stream not in of_stopped:
                    assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert 0 < len(of_stopped) < len(streams)
        for stream in of_stopped:
            assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"


def test_grpc_is_served_by_every_process(model_directory: Path) -> None:
    grpc = pytest.importorskip("tritonclient.grpc")
    with stub_server(model_directory, {"num_processes": NUM_PROCESSES, "grpc_port": 0}) as server:
        port = server.wait_for("GRPC").split()[1]
        for number in range(8):
            options = [("grpc.use_local_subchannel_pool", 1), ("phalanx.test", number)]
            client = grpc.InferenceServerClient(f"127.0.0.1:{port}", channel_args=options)
            assert client.is_server_ready()
            client.close()
        assert server.drain()[0] == 0


def test_ranks_serve_through_three_processes(model_directory: Path) -> None:
    with serve(2, "--http-processes", str(NUM_PROCESSES), "--served-model-name", "demo") as job:
        assert len(job.http_processes()) == NUM_PROCESSES
        body = {"prompt": "def main(", "max_tokens": 4, "temperature": 0}
        answers = [job.server.post(PATH, body).json["choices"][0]["text"] for _ in range(6)]
        assert len(set(answers)) == 1
        assert metrics(job.server)["phalanx_generation_tokens_total"] == 24
        assert job.server.drain()[0] == 0


def test_a_port_in_use_is_not_shared_with_another_server() -> None:
    first = bind("127.0.0.1", 0, 2)
    port = first[0].getsockname()[1]
    for count in (1, 2):
        with pytest.raises(ConfigError, match=f"--port {port} on 127.0.0.1 cannot be opened"):
            bind("127.0.0.1", port, count)
    for listener in first:
        listener.close()


@pytest.mark.parametrize("count", [0, 65])
def test_an_absurd_number_of_processes_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"--http-processes={count} is out of range; use 1 to 64"):
        FrontendSettings(num_processes=count)


def test_room_is_shared_by_the_rows_of_a_board() -> None:
    descriptor = create_board(2)
    rooms = [Room(Board(descriptor, row)) for row in range(2)]
    rooms[0].enter(2, 3)
    rooms[1].enter(1, 3)
    with pytest.raises(CapacityError, match="3 requests are open, at most 3"):
        rooms[1].enter(1, 3)
    assert [room.num_own for room in rooms] == [2, 1]
    rooms[0].leave(1)
    rooms[1].enter(1, 3)
    assert rooms[0].num_open() == [1, 2]
    os.close(descriptor)


class ThreeSteps:
    """An engine whose steps give every request a plain token, then one with its end."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._open: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def submit(self, request: Request) -> None:
        self._open.append(request.request_id)

    def cancel(self, request_id: str) -> None:
        raise AssertionError

    def step_batches(self) -> list[DeltaBatch]:
        self.num_steps += 1
        if self.num_steps < 3:
            ids = np.array(self._open, np.object_)
            return [DeltaBatch(ids, token_ids=np.arange(len(ids), dtype=np.int32))]
        ended, self._open = self._open, []
        return [DeltaBatch(deltas=[TokenDelta(name, (7,), finish_reason="length") for name in ended])]

    def replica_stats(self) -> list[ReplicaStats]:
        return [ReplicaStats(self.num_steps, self.has_work, SchedulerStats(0, 0, 0, 1, 0, 0, 0))]


class Ends:
    """Both ends of three channels, and a bridge over them."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(NUM_PROCESSES)]
        self.theirs = [theirs for _, theirs in pairs]
        channels = [FrontendChannel(ours, f"HTTP process {number}") for number, (ours, _) in enumerate(pairs)]
        self.channels, self.now = FrontendChannels(channels), 0.0
        self.living: list[socket.socket] = []
        self.bridge = EngineBridge(ThreeSteps(), self.channels, self.tick)

    def tick(self) -> float:
        """A second later; living processes have answered meanwhile, in the tenth second that they have no open requests."""
        self.now += 1.0
        for theirs in self.living:
            theirs.sendall(encode_frame(Drained() if self.now == 10.0 else Alive()))
        return self.now

    def close(self) -> None:
        self.channels.close()
        for theirs in self.theirs:
            theirs.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.close()


def end(request_id: str) -> TokenDelta:
    return TokenDelta(request_id, (7,), finish_reason="length")


def deltas(theirs: socket.socket) -> list[Deltas]:
    """The deltas among everything that was sent to a process."""
    decode = msgspec.msgpack.Decoder(ToFrontend).decode
    messages = [decode(body) for body in FrameDecoder().feed(theirs.recv(1 << 20))]
    return [message for message in messages if isinstance(message, Deltas)]


def test_each_process_gets_its_own_tokens_and_one_message_a_step(ends: Ends) -> None:
    for process, names in enumerate((["0-0"], ["1-0", "1-1"], [])):
        for name in names:
            ends.theirs[process].sendall(encode_frame(Submit(Request(name, (1,), SamplingParams()))))
    ends.living = ends.theirs
    ends.bridge.run(ModelInfo("", 1, 1, 1), lambda: None)
    received = [deltas(theirs) for theirs in ends.theirs]
    assert received[0] == [Deltas(["0-0"], [0], [])] * 2 + [Deltas([], [], [end("0-0")])]
    assert received[1] == [Deltas(["1-0", "1-1"], [1, 2], [])] * 2 + [Deltas([], [], [end("1-0"), end("1-1")])]
    assert received[2] == []


def test_a_process_that_answers_nothing_ends_the_server(ends: Ends) -> None:
    for theirs in ends.theirs:
        theirs.sendall(encode_frame(FrontendReady()))
    ends.living = ends.theirs[1:]
    with pytest.raises(CommunicatorError, match="HTTP process 0 has not answered for 30 s"):
        ends.bridge.run(ModelInfo("", 1, 1, 1), lambda: None)
