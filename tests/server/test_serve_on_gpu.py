"""``launch.serve`` with the CUDA engine, or that of ``PHALANX_GPU_ENGINE``, on the GPUs of this machine, tensor-parallel over two where there are two.

The assertions are those of `test_serve`; only the job differs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gpus import skip_without_gpus

from .jobs import Job
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

pytestmark = pytest.mark.gpu

ENGINE = os.environ.get("PHALANX_GPU_ENGINE", "cuda")


def layouts() -> list[tuple[str, ...]]:
    """Flags for one GPU, and for two."""
    return [("--tp", "1"), ("--tp", "2"), ("--tp", "1", "--pp", "2")]


def num_ranks(flags: tuple[str, ...]) -> int:
    needed = 2 if "2" in flags else 1
    skip_without_gpus(needed)
    return needed


@pytest.fixture(scope="module", params=layouts(), ids=" ".join)
def job(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Job]:  # noqa: F811
    sizes = ("--max-num-seqs", "16", "--num-kv-blocks", "32")  # a quarter of what 64 requests need
    with serve_tiny(tiny, num_ranks(request.param), "--engine", ENGINE, *request.param, *sizes) as running:
        yield running


@pytest.mark.parametrize("flags", layouts()[1:], ids=" ".join)
@pytest.mark.parametrize("rank", [0, 1])
def test_killing_a_rank_ends_everything_and_tells_clients(tiny: Path, flags: tuple[str, ...], rank: int) -> None:  # noqa: F811
    with serve_tiny(tiny, num_ranks(flags), "--engine", ENGINE, *flags) as running:
        assert_killing_a_rank_ends_everything(running, rank)


def test_sigterm_drains(tiny: Path) -> None:  # noqa: F811
    with serve_tiny(tiny, 0, "--engine", ENGINE) as running:
        stream = running.server.open_stream(PATH, LONG | {"max_tokens": 100})
        running.server.process.send_signal(signal.SIGTERM)
        assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert running.server.wait()[0] == 0
