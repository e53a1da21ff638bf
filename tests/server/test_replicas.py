"""``launch.serve --dp``: several replicas in one job, one server in front of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .jobs import Job, is_open_mpi
from .test_lifecycle import events
from .test_serve import LONG, metric, serve_tiny, tiny, wait_until_idle

__all__ = ["tiny"]

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def job(tiny: Path) -> Iterator[Job]:
    """dp 2 x tp 2."""
    with serve_tiny(
        tiny, 4, "--dp", "2", "--pp", "1", "--max-num-seqs", "4", "--max-queued-requests", "2", "--http-processes", "3"
    ) as running:
        yield running


def answers(job: Job, bodies: list[dict[str, Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return [answer.json for answer in pool.map(lambda body: job.server.post(PATH, body), bodies)]


def replica_metric(job: Job, name: str, replica: int) -> float:
    return metric(job, f'phalanx_replica_{name}{{replica="{replica}"}}')


def test_both_replicas_work_and_give_the_tokens_of_one(job: Job, tiny: Path) -> None:
    bodies = [
        {"prompt": [20 + n, 30, 40], "max_tokens": 20, "temperature": 0, "return_token_ids": True} for n in range(8)
    ]
    together = [answer["choices"][0]["token_ids"] for answer in answers(job, bodies)]
    wait_until_idle(job)
    assert all(replica_metric(job, "steps_total", replica) > 0 for replica in range(2))
    assert metric(job, "phalanx_replicas_serving") == 2
    alone = [job.server.post(PATH, body).json["choices"][0]["token_ids"] for body in bodies]
    assert together == alone
    assert "dp 2 x pp 1 x tp 2" in job.server.get("/server_info").json["layout"]


def test_admission_counts_all_replicas_together(job: Job) -> None:
    stream = job.server.open_stream(
        PATH, {**LONG, "max_tokens": 60, "n": 8}
    )  # all on one replica, for the prompt's sake
    refused = job.server.post(PATH, {"prompt": "a", "max_tokens": 1, "n": 3})
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert "8 requests are open, at most 10" in refused.error["message"]
    assert job.server.post(PATH, {"prompt": "a", "max_tokens": 1, "n": 2}).status == 200
    assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"


def test_a_drain_waits_for_every_replica(tiny: Path) -> None:
    with serve_tiny(tiny, 2, "--dp", "2") as job:
        streams = [job.server.open_stream(PATH, {**LONG, "max_tokens": 100}) for _ in range(4)]
        os.kill(job.rank(0), signal.SIGTERM)
        assert all(events(stream)[-1]["choices"][0]["finish_reason"] == "length" for stream in streams)
        status, errors = job.server.wait()
        assert status == 0, errors


def test_a_stopped_replica_ends_the_job_and_its_rank_is_named(tiny: Path) -> None:
    with serve_tiny(tiny, 2, "--dp", "2", "--stall-timeout", "4") as job:
        streams = [job.server.open_stream(PATH, LONG) for _ in range(2)]
        pid = job.rank(1)
        os.kill(pid, signal.SIGSTOP)
        assert any("rank 1 (" in json.dumps(events(stream)[-1]) for stream in streams)
        status, errors = job.server.wait()
        assert status != 0
        assert f"pid {pid}) has given no sign of life" in errors


def test_an_automatic_layout_of_a_small_model_is_replicas(tiny: Path) -> None:
    with serve_tiny(tiny, 2, "--layout", "auto", "--max-model-len", "64") as job:
        assert "dp 2 x pp 1 x tp 1" in job.server.get("/server_info").json["layout"]
        assert job.server.lines_with("--layout auto: use --dp 2 --pp 1 --tp 1: ")
        assert "choices" in job.server.post(PATH, {"prompt": "a", "max_tokens": 3}).json


def test_an_automatic_layout_next_to_sizes_is_refused(tiny: Path) -> None:
    with serve_tiny(tiny, 2, "--layout", "auto", "--dp", "2", wait_for="") as job:
        status, errors = job.server.wait()
    assert status == 2
    assert errors.count("phalanx: --layout auto chooses dp, pp and tp; leave --dp 2 out") == 1


def test_without_ulfm_a_lost_replica_ends_the_job(tiny: Path) -> None:
    with serve_tiny(tiny, 2, "--dp", "2") as job:
        streams = [job.server.open_stream(PATH, LONG) for _ in range(2)]
        os.kill(job.rank(1), signal.SIGKILL)
        assert [events(stream)[-1]["error"]["code"] for stream in streams] == ["engine_failed"] * 2
        status, errors = job.server.wait()
        assert status != 0
        assert "rank 1 (" in errors


@pytest.mark.parametrize("lost_rank", [2, 3])
def test_with_ulfm_the_other_replicas_go_on_and_their_tokens_are_the_same(tiny: Path, lost_rank: int) -> None:
    if not is_open_mpi():
        pytest.skip("ULFM is Open MPI's")
    flags = ("--dp", "2", "--pp", "1")
    with serve_tiny(tiny, 4, *flags, launcher_flags=("--with-ft", "ulfm")) as job:
        body = {**LONG, "max_tokens": 300, "temperature": 0, "return_token_ids": True}
        streams = [job.server.begin_stream(PATH, body) for _ in range(2)]  # one a replica
        os.kill(job.rank(lost_rank), signal.SIGKILL)
        read = [[first, *events(stream)] for stream, first in streams]
        (whole,) = [stream for stream in read if "error" not in stream[-1]]
        (broken,) = [stream for stream in read if "error" in stream[-1]]
        assert "replica 1 was lost" in broken[-1]["error"]["message"]
        alone = job.server.post(PATH, body).json["choices"][0]["token_ids"]
        assert len(alone) == 300
        assert token_ids(whole) == alone
        assert 0 < (count := len(token_ids(broken[:-1]))) < 300
        assert token_ids(broken[:-1]) == alone[:count]
        assert job.server.get("/health").status == 200
        assert metric(job, "phalanx_replicas_serving") == 1
        assert all("choices" in answer for answer in answers(job, [{"prompt": "a", "max_tokens": 3}] * 4))
        os.kill(job.rank(0), signal.SIGUSR1)
        status, errors = job.server.wait()
        assert status == 0, errors
        assert f"rank {lost_rank} (" in errors


def token_ids(stream: list[Any]) -> list[int]:
    return [token_id for event in stream for token_id in event["choices"][0]["token_ids"]]


@pytest.mark.parametrize(("rank", "fault"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (3, signal.SIGSTOP)])
def test_with_ulfm_the_loss_of_replica_0_or_a_stopped_rank_ends_the_job(
    tiny: Path, rank: int, fault: signal.Signals
) -> None:
    if not is_open_mpi():
        pytest.skip("ULFM is Open MPI's")
    flags = ("--dp", "2", "--pp", "1", "--stall-timeout", "4")
    with serve_tiny(tiny, 4, *flags, launcher_flags=("--with-ft", "ulfm")) as job:
        streams = [job.server.open_stream(PATH, LONG) for _ in range(2)]
        os.kill(job.rank(rank), fault)
        assert any("error" in events(stream)[-1] for stream in streams)  # the other may have ended in time
        status, errors = job.server.wait()
        assert status != 0
        assert f"rank {rank} (" in errors


def test_streams_that_nobody_reads_hold_up_no_replica(job: Job) -> None:
    bodies = [{"prompt": [40 + n, 30], "max_tokens": 20, "temperature": 0, "return_token_ids": True} for n in range(3)]
    expected = answers(job, bodies)
    unread = [job.server.open_stream(PATH, {**LONG, "prompt": [50 + n], "n": 3}) for n in range(2)]
    assert [answer["choices"] for answer in answers(job, bodies)] == [answer["choices"] for answer in expected]
    for stream in unread:
        stream.close()
    wait_until_idle(job)
