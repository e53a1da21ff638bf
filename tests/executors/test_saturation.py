"""Keys and values that an fp8 cache cannot hold are counted, by every engine and at every layout, and told of."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.parallel.communicator import Communicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from tests.server.jobs import serve
from tests.support.fake_cupy import install_fake_device
from tests.support.float64_llama import Array, Float64Llama
from tests.support.short_demo import write_short_demo

PROMPT = [0, 5, 17, 3, 99, 42, 8, 61, 1021, 77, 4030]


class CountingLlama(Float64Llama):
    """``cached``: rotated keys and values."""

    def cached(self, token_ids: list[int]) -> list[Array]:
        self._rotations: list[Array] = []
        self._values: list[Array] = []
        self.log_probabilities(token_ids)
        return [*self._rotations[1::2], *self._values]

    def _project(self, hidden: Array, name: str) -> Array:
        projected = super()._project(hidden, name)
        if name.endswith("v_proj"):
            self._values.append(projected)
        return projected

    def _rotated(self, heads: Array) -> Array:
        self._rotations.append(super()._rotated(heads))
        return self._rotations[-1]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose keys and values are 256 and 2,048 times the demo's: about a third of them beyond 448."""

    def enlarge(tensors: dict[str, Array]) -> None:
        for side, factor in (("k", 256), ("v", 2048)):
            weight = tensors[f"model.layers.0.self_attn.{side}_proj.weight"]
            weight *= weight.dtype.type(factor)

    return write_short_demo(tmp_path_factory.mktemp("large") / "model", 1, enlarge)


def count(model: Path, tp: int = 1, pp: int = 1, **options: Any) -> list[int]:
    """What every rank is told after a prompt that was read in pieces."""

    def rank(comm: Communicator) -> int:
        sizes = {"block_size": 16, "max_num_seqs": 2, "max_num_batched_tokens": 8, "num_kv_blocks": 8}
        with LLM(
            model, tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, **{**sizes, **options}
        ) as llm:  # fmt: skip
            llm.generate([PROMPT], SamplingParams(max_tokens=1, temperature=0.0))
            return llm.num_saturated()

    return run_ranks(tp * pp, rank)


def test_every_engine_counts_what_a_float64_model_does(
    large: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    cached = CountingLlama(large).cached(PROMPT)
    expected = sum(int((np.abs(each) > 448).sum()) for each in cached)
    assert 0.1 * sum(each.size for each in cached) < expected < 0.6 * sum(each.size for each in cached)
    assert count(large, engine="numpy", kv_cache_dtype="fp8") == [expected]
    assert f"{expected:,} keys or values were too large for the fp8 cache" in caplog.text
    assert count(large, 2, engine="numpy", kv_cache_dtype="fp8") == [expected] * 2
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    (found,) = count(large, engine="cuda", dtype="float16", kv_cache_dtype="fp8")
    assert found == pytest.approx(expected, rel=0.02), "but for values that float16 moves over the bound"


def test_stages_count_together(tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, Array]) -> None:
        for layer in range(2):
            weight = tensors[f"model.layers.{layer}.self_attn.v_proj.weight"]
            weight *= weight.dtype.type(2048)

    model = write_short_demo(tmp_path / "model", 2, enlarge)
    (one,) = count(model, engine="numpy", kv_cache_dtype="fp8")
    assert count(model, 1, 2, engine="numpy", kv_cache_dtype="fp8") == [one, one]
    assert one > 0


def test_a_cache_that_holds_everything_counts_nothing(large: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert count(large, engine="numpy") == [0]
    assert "fp8 cache" not in caplog.text


def test_a_servers_metrics_and_log_tell_of_every_ranks_cache(large: Path) -> None:
    params = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "add_special_tokens": False}
    (expected,) = count(large, engine="numpy", kv_cache_dtype="fp8")
    flags = ("--engine", "numpy", "--kv-cache-dtype", "fp8", "--tp", "2")
    with serve(2, "--model", str(large), *flags) as job:
        assert job.server.post("/v1/completions", params).status == 200
        limit, line = time.monotonic() + 60, f"phalanx_kv_saturated_total {expected:.1f}\n"
        while line not in (
            shown := job.server.get("/metrics").body.decode()
        ):  # other ranks' counts come a moment later
            assert time.monotonic() < limit, shown
        errors = job.server.drain()[1]
    assert "keys or values were too large for the fp8 cache" in errors
