"""``launch.plan --optimise``: the layouts of N GPUs, compared by memory and by the time of their steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phalanx.launch.layouts import layouts_of
from phalanx.launch.plan import main
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models import find_model
from phalanx.runtime.step_records import StepRecord, record_path

from .test_plan import llama_3_8b

__all__ = ["llama_3_8b"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compared(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> list[dict[str, Any]]:
    assert main(["--model", str(path), "--json", *flags]) == 0
    layouts: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["layouts"]
    return layouts


def test_every_layout_of_the_ranks_is_compared() -> None:
    assert sorted(layouts_of(4)) == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
    assert list(layouts_of(1)) == [(1, 1, 1)]


def test_replicas_give_throughput_and_tensor_parallel_ranks_latency(
    llama_3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--ranks", "8", "--gpu", "h200", "--input-len", "128", "--output-len", "128")
    best = compared(capsys, llama_3_8b, *flags, "--optimise", "throughput")[0]
    assert (best["dp"], best["pp"], best["tp"]) == (8, 1, 1)
    best = compared(capsys, llama_3_8b, *flags, "--optimise", "latency")[0]
    assert (best["dp"], best["pp"], best["tp"]) == (1, 1, 8)


def test_one_h200_is_estimated_near_what_was_measured(llama_3_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/benchmarks/h200.md: 18,944 tokens a second, 4.35 ms a token of one request."""
    flags = ("--ranks", "1", "--gpu", "h200", "--input-len", "128", "--output-len", "128", "--optimise", "throughput")
    (one,) = compared(capsys, llama_3_8b, *flags)
    assert one["tokens_per_second"] == pytest.approx(18_944, rel=0.35)
    assert one["token_seconds"] == pytest.approx(4.35e-3, rel=0.1)


def test_a_layout_that_does_not_fit_comes_last_with_the_reason(
    llama_3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--ranks", "2", "--gpu-memory-gib", "16", "--optimise", "throughput", "--max-num-batched-tokens", "512")
    layouts = compared(capsys, llama_3_8b, *flags)
    assert not layouts[0]["problem"]
    assert layouts[-1]["dp"] == 2
    assert "needs GPUs of" in layouts[-1]["problem"]
    assert main(["--model", str(llama_3_8b), *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("use --dp 1 ")


def test_measured_steps_replace_the_roofline(llama_3_8b: Path, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    raw = json.loads((llama_3_8b / "config.json").read_text())
    config = find_model(raw).read_config(raw)
    path = record_path(cache, config, "bfloat16", "none", 2, 1)
    StepRecord("a test GPU", (1, 64), (1e-4, 1e-4)).write(path)
    layouts = compared(capsys, llama_3_8b, "--ranks", "2", "--optimise", "throughput")
    assert (layouts[0]["tp"], layouts[0]["source"]) == (2, "measured on a test GPU")
    assert layouts[1]["source"] == "roofline"
    path.write_text("{")
    assert StepRecord.read(path) is None


def test_measured_times_are_interpolated_and_grow_in_proportion_beyond_the_last() -> None:
    record = StepRecord("x", (1, 3), (1.0, 2.0))
    assert [record.seconds(count) for count in (1, 2, 3, 6)] == [1.0, 1.5, 2.0, 4.0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "--optimise needs --ranks N"),
        (["--ranks", "0"], "--ranks=0 is out of range; use the number of GPUs, 1 to 1,048,576"),
        (["--ranks", "1", "--output-len", "0"], "must be at least 1"),
    ],
)
def test_a_comparison_of_nothing_is_refused(llama_3_8b: Path, flags: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        main(["--model", str(llama_3_8b), "--optimise", "latency", *flags])
