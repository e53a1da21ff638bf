"""Which replica gets a request, and what a router over several engines promises when one of them is lost."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from phalanx.parallel.errors import CommunicatorError, RequestError
from phalanx.runtime.request import Request, SamplingParams, TokenDelta
from phalanx.runtime.server.link.bridge import EngineBridge
from phalanx.runtime.server.link.channel import FrontendChannel, FrontendChannels, ReplicaChannel
from phalanx.runtime.server.link.messages import ModelInfo
from phalanx.runtime.server.link.router import RemoteReplica, ReplicaRouter
from phalanx.runtime.server.link.routing import PREFIX_TOKENS, Routes

from .stub_server import FORBIDDEN_TOKEN, StubEngine, StubOptions


def request(name: str, *prompt: int, max_tokens: int = 10, **fields: object) -> Request:
    return Request(name, prompt or (1, 2), SamplingParams(max_tokens=max_tokens), **fields)  # type: ignore[arg-type]


def placed(routes: Routes, asked: Request) -> int:
    replica = routes.choose(asked)
    routes.add(asked, replica)
    return replica


def test_requests_go_to_the_replica_with_the_fewest_open_tokens() -> None:
    routes = Routes(3)
    assert [placed(routes, request(str(index))) for index in range(6)] == [0, 1, 2, 0, 1, 2]
    routes.end("1")
    assert placed(routes, request("a", max_tokens=1000)) == 1
    assert [placed(routes, request(f"b{index}")) for index in range(4)] == [0, 2, 0, 2]


def test_a_known_beginning_goes_where_it_was_computed_until_that_replica_is_too_busy() -> None:
    routes = Routes(2)
    beginning = tuple(range(4 * PREFIX_TOKENS))
    assert placed(routes, request("first", *beginning)) == 0
    routes.end("first")
    assert placed(routes, request("other", 7)) == 0
    assert placed(routes, request("next", *beginning, 8)) == 0
    lead = [placed(routes, request(f"more{index}", *beginning, index)) for index in range(4)]
    assert 1 in lead, "a replica with a lead of more tokens than the beginning has gets no more for its sake"


def test_a_beginning_is_known_only_to_requests_with_the_same_salt() -> None:
    routes = Routes(2)
    prompt = tuple(range(PREFIX_TOKENS))
    placed(routes, request("a", *prompt, cache_salt="x"))
    routes.end("a")
    placed(routes, request("b", 5))
    assert placed(routes, request("c", *prompt, cache_salt="y")) == 1


def test_a_fork_goes_where_its_first_is_and_a_lost_replica_gets_nothing() -> None:
    routes = Routes(2)
    assert [placed(routes, request("a")), placed(routes, request("b"))] == [0, 1]
    assert placed(routes, request("c", max_tokens=1000)) == 0
    assert placed(routes, request("d", fork_from="c")) == 0
    assert [lost.request_id for lost in routes.lose(1)] == ["b"]
    assert placed(routes, request("e")) == 0


class OwnStub(StubEngine):
    """The stub as rank 0's own engine."""

    def check(self, request: Request) -> None:
        if FORBIDDEN_TOKEN in request.prompt_token_ids:
            raise RequestError("token 13 brings bad luck; leave it out", "prompt")

    def release(self) -> None:
        pass


@contextmanager
def router_and_other() -> Iterator[tuple[ReplicaRouter, socket.socket]]:
    """A router whose second replica is a thread, and the socket of that replica's leader."""
    ours, theirs = socket.socketpair()
    bridge = EngineBridge(
        StubEngine(StubOptions("", step_seconds=0.001)), FrontendChannels([FrontendChannel(theirs, "the router")])
    )

    def lead() -> None:
        with suppress(CommunicatorError):
            bridge.run(ModelInfo("", 400, 256, 8), lambda: None)

    thread = threading.Thread(target=lead)
    with ExitStack() as closed:
        closed.callback(theirs.close)
        closed.callback(thread.join)
        thread.start()
        router = ReplicaRouter(
            OwnStub(StubOptions("")), [RemoteReplica(ReplicaChannel(ours, "replica 1"))], survives_loss=True
        )
        closed.callback(ours.close)
        router.wait_until_ready()
        yield router, theirs


def finished(router: ReplicaRouter) -> dict[str, tuple[list[int], TokenDelta]]:
    """Every request's tokens and last delta, once nothing is left to do."""
    tokens: dict[str, list[int]] = {}
    last: dict[str, TokenDelta] = {}
    while router.has_work:
        for batch in router.step_batches():
            for delta in batch.objects():
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                last[delta.request_id] = delta
    return {name: (tokens[name], delta) for name, delta in last.items() if delta.finish_reason}


def test_both_replicas_answer_and_are_counted_apart() -> None:
    with router_and_other() as (router, _):
        for name in "abcd":
            router.submit(request(name, 3, 4, max_tokens=5))
        assert {name: tokens for name, (tokens, _) in finished(router).items()} == {
            name: [3, 4, 3, 4, 3] for name in "abcd"
        }
        own, other = router.replica_stats()
        assert own.num_steps > 0
        assert not own.has_work
        assert not other.has_work
        router.release()


def test_a_request_for_another_replica_is_checked_before_it_is_sent() -> None:
    with router_and_other() as (router, _):
        router.submit(request("a"))
        with pytest.raises(RequestError, match="bad luck"):
            router.submit(request("b", FORBIDDEN_TOKEN))
        router.cancel("a")
        assert finished(router)["a"][1].finish_reason == "cancelled"
        router.release()


def test_a_lost_replica_ends_what_had_begun_and_hands_on_what_had_not() -> None:
    with router_and_other() as (router, _):
        router.submit(request("own", max_tokens=1))
        router.submit(request("begun", 3, 4, max_tokens=10_000))
        while not any(delta.request_id == "begun" for batch in router.step_batches() for delta in batch.objects()):
            continue
        router.submit(request("waits", 5, 6, max_tokens=20_000))  # on replica 0, which is idle
        router.submit(request("new", 7, 8, max_tokens=3))
        router.lose(1, "rank 1 has ended")
        router.cancel("waits")
        ends = finished(router)
        assert ends["begun"][1].finish_reason == "error"
        assert "replica 1 was lost" in str(ends["begun"][1].error)
        assert ends["new"][0] == [7, 8, 7]
        assert [stats.is_lost for stats in router.replica_stats()] == [False, True]
        router.submit(request("after", 9))
        assert ends["new"][1].finish_reason == "length"
        assert finished(router)["after"][0] == [9] * 10


def test_a_closed_connection_is_a_lost_replica() -> None:
    with router_and_other() as (router, theirs):
        router.submit(request("own", max_tokens=1))
        router.submit(request("remote", 3, max_tokens=10_000))
        theirs.shutdown(socket.SHUT_RDWR)
        end = finished(router)["remote"]
        assert end[1].finish_reason in ("error", "length")
        assert router.replica_stats()[1].is_lost
