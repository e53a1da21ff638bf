"""``launch.plan --optimise``: the layouts of N GPUs, compared by memory and by the time of their steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phalanx.launch.layouts import GPUS, MEMORY_SHARE, SUM_SECONDS, Estimate, Load, best_layouts, layouts_of
from phalanx.launch.plan import build_parser, main, plan
from phalanx.launch.plan_report import reason
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Layout
from phalanx.runtime.config import EngineConfig
from phalanx.runtime.step_records import StepRecord, record_path

from .test_plan import llama_3_8b

__all__ = ["llama_3_8b"]

MODELS = Path(__file__).parents[1] / "gpu" / "models"


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


@pytest.mark.parametrize("optimise", ["throughput", "latency"])
def test_a_model_that_no_layout_could_use_is_a_mistake(tmp_path: Path, llama_3_8b: Path, optimise: str) -> None:
    """Neither is there a table that says so for each layout, nor do more ranks help."""
    config = json.loads((llama_3_8b / "config.json").read_text()) | {"hidden_size": "4096"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"hidden_size='4096' in config\.json is not a whole number"):
        main(["--model", str(tmp_path), "--optimise", optimise, "--ranks", "4", "--gpu", "h200"])


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
    path = record_path(cache, raw, "bfloat16", EngineConfig(layout=Layout(2, 1, 1)))
    StepRecord("NVIDIA H100 80GB HBM3", (1, 64), (1e-4, 1e-4)).write(path)
    layouts = compared(capsys, llama_3_8b, "--ranks", "2", "--optimise", "throughput")
    assert (layouts[0]["tp"], layouts[0]["source"]) == (2, "measured on NVIDIA H100 80GB HBM3")
    assert layouts[1]["source"] == "roofline"
    path.write_text("{")
    assert StepRecord.read(path) is None


def test_steps_of_another_gpu_or_of_quantised_weights_do_not_count(
    llama_3_8b: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    raw = json.loads((llama_3_8b / "config.json").read_text())
    options = EngineConfig(layout=Layout(1, 1, 1))
    packed = json.loads((MODELS / "llama-3-8b-w4a16" / "config.json").read_text())
    assert record_path(cache, raw, "bfloat16", options) != record_path(cache, packed, "bfloat16", options)
    StepRecord("NVIDIA H200", (1,), (1e-4,)).write(record_path(cache, raw, "bfloat16", options))
    flags = ("--ranks", "1", "--optimise", "latency")
    sources = [compared(capsys, llama_3_8b, *flags, "--gpu", gpu)[0]["source"] for gpu in ("h100", "h200")]
    assert sources == ["roofline", "measured on NVIDIA H200"]


@pytest.mark.parametrize("device", ["NVIDIA A10", "cpu"])
def test_steps_of_a_device_without_a_data_sheet_count_for_this_machine_alone(
    llama_3_8b: Path, cache: Path, device: str
) -> None:
    raw = json.loads((llama_3_8b / "config.json").read_text())
    StepRecord(device, (1,), (1e-4,)).write(record_path(cache, raw, "bfloat16", EngineConfig(layout=Layout(1, 1, 1))))
    flags = ["--model", str(llama_3_8b), "--optimise", "latency", "--ranks", "1", "--gpu-memory-gib", "80"]
    args = build_parser().parse_args(flags)
    sources = [best_layouts(args, plan, GPUS["h100"], Load(1024, 256), here)[0].source for here in (False, True)]
    assert sources == ["roofline", f"measured on {device}"]


def test_a_token_alone_reads_the_weights_of_its_experts_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Mixtral 8x7B's paper: 47 billion parameters, of which a token takes 13 billion (two of eight experts)."""
    flags = ("--ranks", "1", "--gpu", "h200", "--input-len", "1", "--output-len", "1")
    (one,) = compared(capsys, MODELS / "mixtral-8x7b", "--optimise", "latency", *flags)
    assert one["token_seconds"] == pytest.approx(2 * 12.9e9 / (GPUS["h200"].memory * MEMORY_SHARE), rel=0.02)


def test_the_throughput_of_a_mixture_is_estimated_near_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/benchmarks/h200.md: Mixtral 8x7B at tp 2 makes 10,268 tokens a second, 1,024 sequences at once."""
    flags = ("--ranks", "2", "--gpu", "h200", "--input-len", "128", "--output-len", "128", "--max-num-seqs", "1024")
    layouts = compared(capsys, MODELS / "mixtral-8x7b", "--optimise", "throughput", *flags)
    (split,) = [each for each in layouts if each["tp"] == 2]
    assert split["tokens_per_second"] == pytest.approx(10_268, rel=0.35)


@pytest.mark.parametrize(
    ("name", "share"),
    [("llama-3-8b-w4a16", 1.0), ("llama-3-8b-blocks", (0.5 * 6.98 + 0.525) / 7.504)],
)
def test_prompts_cost_the_products_of_values_not_the_bytes_that_they_are_stored_in(
    capsys: pytest.CaptureFixture[str], name: str, share: float
) -> None:
    """Codes of 4 bits are multiplied as 16-bit values; blocks of fp8 as fp8, twice as fast, but for the head."""
    flags = ("--ranks", "1", "--gpu", "h200", "--optimise", "throughput", "--input-len", "8000", "--output-len", "1")
    plain, quantised = (
        compared(capsys, MODELS / each, *flags)[0]["tokens_per_second"] for each in ("llama-3-8b", name)
    )
    assert plain / quantised == pytest.approx(share, rel=0.03)


def test_the_rank_with_the_largest_share_sets_the_pace(capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 7B's 16 heads over 3 ranks: 5, 5 and 6, so two ranks may not hide what the third reads."""
    directory = MODELS / "gemma-7b"
    assert main(["--model", str(directory), "--tp", "3", "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    most = max(rank["weight_bytes"] for rank in ranks)
    assert len({rank["weight_bytes"] for rank in ranks}) > 1
    flags = ("--ranks", "3", "--gpu", "h200", "--input-len", "1", "--output-len", "1", "--optimise", "latency")
    (split,) = [each for each in compared(capsys, directory, *flags) if each["tp"] == 3]
    sums = 2 * 28 * SUM_SECONDS  # of 28 layers
    assert split["token_seconds"] - sums == pytest.approx(most / (GPUS["h200"].memory * MEMORY_SHARE), rel=0.01)


@pytest.mark.parametrize(
    ("optimise", "best", "second", "said"),
    [
        ("throughput", (4, 1, 1), (2, 1, 2), "replicas work without waiting"),
        (
            "throughput",
            (2, 1, 2),
            (4, 1, 1),
            "larger replicas leave more room for sequences, 8 at once each instead of 2",
        ),
        ("throughput", (1, 4, 1), (1, 1, 4), "handing over between stages costs less"),
        ("throughput", (1, 1, 4), (1, 4, 1), "every GPU works on every step"),
        ("latency", (1, 1, 4), (2, 1, 2), "a share of every layer's weights"),
        ("latency", (4, 1, 1), (2, 1, 2), "sums between GPUs cost more"),
        ("latency", (2, 1, 2), (1, 2, 2), "fewer stages"),
    ],
)
def test_the_reason_is_what_the_best_layout_has_that_the_next_lacks(
    optimise: str, best: tuple[int, ...], second: tuple[int, ...], said: str
) -> None:
    first, other = (
        Estimate(tp, pp, dp, speed, 1 / speed, num_seqs, "roofline")
        for (dp, pp, tp), speed, num_seqs in ((best, 2.0, 8), (second, 1.0, 2))
    )
    assert said in reason(optimise, [first, other])


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
