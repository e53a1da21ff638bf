"""``launch.serve`` with the CUDA engine, or that of ``GPU_TEST_ENGINE``, over as many GPUs as there are, up to four.

The assertions are those of `test_serve`; only the job differs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gpus import num_gpus, skip_without_gpus

from .jobs import Job
from .test_failures import assert_stopping_a_rank_ends_everything
from .test_lifecycle import events
from .test_serve import (  # noqa: F401 (collected here again, with this module's job)
    LONG,
    PATH,
    assert_killing_a_rank_ends_everything,
    serve_tiny,
    test_an_engine_limit_is_a_400,
    test_chat_and_scores,
    test_clients_that_leave_free_their_blocks,
    test_echoed_scores_are_those_of_generation,
    test_mixed_requests_together_give_the_tokens_of_each_alone,
    test_ranks_without_work_leave_the_processor_alone,
    tiny,
    wait_until_idle,
)
from .test_unusual_faults import assert_a_fault_ends_every_stream_and_names_the_rank, serve_faulty

pytestmark = pytest.mark.gpu

ENGINE = os.environ.get("GPU_TEST_ENGINE", "cuda")


TOLERATED_BYTES = 64 << 20
"""A GPU's own bookkeeping; a rank of these jobs holds some gigabytes."""
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
SPREAD = [(2, 1), (1, 2), (4, 1), (2, 2)]
"""Layouts of several GPUs, in which a rank can fail the others."""
FAULTS = {
    "stuck": "while True: pass",  # its peers wait on their GPUs, in a sum or for hidden states
    "aborted": "[group.abort() for group in self._groups.all]; raise ZeroDivisionError('planted')",
    "gone": "os._exit(0)",
}


def num_ranks(tp: int, pp: int) -> int:
    skip_without_gpus(tp * pp)
    return tp * pp


def layout_flags(tp: int, pp: int) -> tuple[str, ...]:
    return "--engine", ENGINE, "--tp", str(tp), "--pp", str(pp)


def free_bytes() -> list[int]:
    """What is free on each GPU."""
    import cupy

    found = []
    for gpu in range(num_gpus()):
        with cupy.cuda.Device(gpu):
            found.append(int(cupy.cuda.runtime.memGetInfo()[0]))
    return found


def assert_free_again(before: list[int]) -> None:
    """Within ten seconds; a driver takes memory back a moment after its process has ended."""
    limit = time.monotonic() + 10
    while any(now < free - TOLERATED_BYTES for free, now in zip(before, free_bytes(), strict=True)):
        assert time.monotonic() < limit, (before, free_bytes())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled kernels and timings of all these jobs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def reports(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reports are kept; there are none yet."""
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(cache))
    shutil.rmtree(cache / "failures", ignore_errors=True)
    return cache / "failures"


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def job(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Job]:  # noqa: F811
    sizes = ("--max-num-seqs", "16", "--num-kv-blocks", "32")  # a quarter of what 64 requests need
    with serve_tiny(tiny, num_ranks(*request.param), *layout_flags(*request.param), *sizes) as running:
        yield running


@pytest.mark.parametrize(("tp", "pp"), SPREAD)
@pytest.mark.parametrize("rank", ["first", "last"])
def test_killing_a_rank_ends_everything_and_frees_the_gpus(tiny: Path, tp: int, pp: int, rank: str) -> None:  # noqa: F811
    ranks = num_ranks(tp, pp)
    before = free_bytes()
    with serve_tiny(tiny, ranks, *layout_flags(tp, pp)) as running:
        assert_killing_a_rank_ends_everything(running, 0 if rank == "first" else ranks - 1)
    assert_free_again(before)


@pytest.mark.parametrize(("tp", "pp"), SPREAD)
def test_a_stopped_rank_under_load_ends_the_job_and_is_named(
    tiny: Path,  # noqa: F811
    reports: Path,
    tp: int,
    pp: int,
) -> None:
    with serve_tiny(tiny, num_ranks(tp, pp), *layout_flags(tp, pp), "--stall-timeout", "4") as running:
        assert_stopping_a_rank_ends_everything(running, tp * pp - 1, reports)


@pytest.mark.parametrize(("tp", "pp"), SPREAD)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_within_a_step_is_named(
    tiny: Path,  # noqa: F811
    tmp_path: Path,
    reports: Path,
    tp: int,
    pp: int,
    fault: str,
) -> None:
    ranks, rank = num_ranks(tp, pp), 1
    flags = ("--tp", str(tp), "--pp", str(pp))
    before = free_bytes()
    with serve_faulty(tiny, tmp_path, {rank: FAULTS[fault]}, *flags, num_ranks=ranks, engine=ENGINE) as (
        running,
        trigger,
    ):
        errors = assert_a_fault_ends_every_stream_and_names_the_rank(running, trigger, rank)
    assert re.search(rf"rank {rank}\b", errors)
    assert_free_again(before)


def test_sigterm_drains(tiny: Path) -> None:  # noqa: F811
    with serve_tiny(tiny, 0, "--engine", ENGINE) as running:
        stream = running.server.open_stream(PATH, LONG | {"max_tokens": 100})
        running.server.process.send_signal(signal.SIGTERM)
        assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert running.server.wait()[0] == 0
