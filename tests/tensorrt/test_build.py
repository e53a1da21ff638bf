"""Engines build with the real TensorRT for RTX on a machine without a GPU."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

from launch import build
from phalanx.runtime.models.user_file import model_from_file

from ..quantization import writers
from ..quantization.test_checkpoints import ALL
from ..quantization.test_checkpoints import CASE as QUANTISED
from ..support.checkpoints import ARCEE, CASES_BY_NAME, write_checkpoint

FAMILIES = ("llama-bfloat16", "gpt2-float16", "gemma-wide-heads-bfloat16", "demo")
LAYOUTS = tuple(itertools.product((1, 2, 4), (1, 2)))
DTYPES = ("float16", "bfloat16")
TARGETS = ("8.0", "8.9", "12.0")
SIZES = ("--max-num-seqs", "4", "--max-model-len", "64")


@pytest.fixture
def run_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Path]]:
    """Runs ``launch.build`` on a case (``demo`` = the demo checkpoint); returns the engines that it printed."""
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path / "cache"))

    def run(case: str, *arguments: str, output: str = "engines") -> list[Path]:
        model = []
        if case != "demo":
            model = ["--model", str(write_checkpoint(CASES_BY_NAME[case], tmp_path / case))]
        assert build.main([*model, "--output", str(tmp_path / output), *SIZES, *arguments]) == 0
        return [Path(line) for line in capsys.readouterr().out.splitlines()]

    return run


def _build_matrix_cell(
    run_build: Callable[..., list[Path]], case: str, tp: int, pp: int, dtype: str, target: str
) -> None:
    engines = run_build(
        case, "--tp", str(tp), "--pp", str(pp), "--dtype", dtype, "--target-compute-capability", target
    )  # fmt: skip
    assert [engine.name for engine in engines] == [
        f"{case}_{dtype}_tp{tp}_pp{pp}_rank{rank}.engine" for rank in range(tp * pp)
    ]
    for engine in engines:
        assert engine.stat().st_size > 100_000
    config = json.loads((engines[0].parent / "config.json").read_text())
    assert config["target_compute_capabilities"] == [target]
    assert (config["dtype"], config["tensor_parallel_size"], config["pipeline_parallel_size"]) == (dtype, tp, pp)


@pytest.mark.parametrize(
    ("case", "tp", "pp", "dtype", "target"),
    [
        ("llama-bfloat16", 2, 1, "bfloat16", "8.0"),
        ("llama-bfloat16", 1, 1, "float16", "12.0"),
        ("gpt2-float16", 2, 1, "float16", "8.9"),
        ("gpt2-float16", 1, 2, "bfloat16", "8.0"),
        ("gemma-wide-heads-bfloat16", 1, 2, "float16", "8.9"),
        ("gemma-wide-heads-bfloat16", 2, 1, "bfloat16", "12.0"),
        ("demo", 2, 2, "bfloat16", "8.9"),
    ],
)
def test_engines_build_without_a_gpu(
    run_build: Callable[..., list[Path]], case: str, tp: int, pp: int, dtype: str, target: str
) -> None:
    _build_matrix_cell(run_build, case, tp, pp, dtype, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layout", "dtype", "target"), list(itertools.product(FAMILIES, LAYOUTS, DTYPES, TARGETS))
)
def test_every_family_layout_dtype_and_target_builds(
    run_build: Callable[..., list[Path]], case: str, layout: tuple[int, int], dtype: str, target: str
) -> None:
    _build_matrix_cell(run_build, case, *layout, dtype, target)


def test_one_engine_serves_several_compute_capabilities(run_build: Callable[..., list[Path]]) -> None:
    (several,) = run_build("gpt2-float16", "--target-compute-capability", "8.0,8.9", output="several")
    (one,) = run_build("gpt2-float16", "--target-compute-capability", "8.0", output="one")
    assert several.stat().st_size > one.stat().st_size
    config = json.loads((several.parent / "config.json").read_text())
    assert config["target_compute_capabilities"] == ["8.0", "8.9"]


def test_one_rank_can_be_built_alone_beside_the_others(run_build: Callable[..., list[Path]]) -> None:
    target = ("--tp", "2", "--target-compute-capability", "8.9")
    (second,) = run_build("gpt2-float16", *target, "--rank", "1")
    key = json.loads((second.parent / "config.json").read_text())["key"]
    assert [path.name for path in second.parent.glob("*.engine")] == ["gpt2-float16_float16_tp2_pp1_rank1.engine"]
    run_build("gpt2-float16", *target, "--rank", "0")
    assert len(list(second.parent.glob("*.engine"))) == 2
    assert json.loads((second.parent / "config.json").read_text())["key"] == key


def test_engines_of_a_model_file_carry_its_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_from_file(ARCEE.model_file)
    assert model is not None
    path, output = write_checkpoint(ARCEE, tmp_path / "arcee"), tmp_path / "engines"
    arguments = ["--model", str(path), "--model-file", str(ARCEE.model_file), "--output", str(output), *SIZES]
    assert build.main([*arguments, "--dtype", "float16", "--target-compute-capability", "8.9"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(output / "arcee_float16_tp1_pp1_rank0.engine")]
    assert json.loads((output / "config.json").read_text())["model_code"] == model.code


def test_dummy_weights_need_no_checkpoint_but_a_config(run_build: Callable[..., list[Path]], tmp_path: Path) -> None:
    run_build("llama-plain", "--load-format", "dummy", "--dtype", "float16", "--target-compute-capability", "8.6")
    (tmp_path / "llama-plain" / "model.safetensors").unlink()
    engines = build.main(
        ["--model", str(tmp_path / "llama-plain"), "--load-format", "dummy", "--output", str(tmp_path / "dummy"),
         *SIZES, "--dtype", "float16", "--target-compute-capability", "8.6"]
    )  # fmt: skip
    assert engines == 0


def test_a_quantised_checkpoint_builds_as_it_is_and_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path / "cache"))
    write_checkpoint(QUANTISED, tmp_path / "dense")
    module, section = ALL["awq"]
    writers.write(tmp_path / "dense", tmp_path / "model", tmp_path / "twin", module, section)
    output = str(tmp_path / "engines")
    arguments = ["--model", str(tmp_path / "model"), "--dtype", "float16", "--target-compute-capability", "8.0", *SIZES]
    assert build.main([*arguments, "--output", output]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [f"{output}/model_float16_tp1_pp1_rank0.engine"]
    assert "weights: int4 in groups of 16" in shown.err
    formats = json.loads((tmp_path / "engines" / "config.json").read_text())["formats"]
    assert formats
    assert all(one.startswith("GroupCodes(label='int4'") for one in formats)


def test_timing_cache_and_nothing_partial_is_left_behind(run_build: Callable[..., list[Path]]) -> None:
    (engine,) = run_build("gpt2-float16", "--target-compute-capability", "8.9")
    names = sorted(path.name for path in engine.parent.iterdir())
    assert names == ["config.json", "gpt2-float16_float16_tp1_pp1_rank0.engine", "model.cache"]
    assert (engine.parent / "model.cache").stat().st_size > 0


def test_build_reports_progress_of_the_library(tmp_path: Path) -> None:
    from phalanx.parallel.topology import Layout, Topology
    from phalanx.runtime.executors.tensorrt.builder import build_engine
    from phalanx.runtime.executors.tensorrt.network import NetworkShape

    from .networks import open_request

    seen: list[tuple[str, int, int]] = []
    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    library, request, source = open_request(path, NetworkShape("float16", 2, 32, 16))
    report = build_engine(
        library, request, source, Topology(Layout()), tmp_path / "engine", tmp_path / "cache",
        lambda *step: seen.append(step),
    )  # fmt: skip
    assert any(phase == "Building engine" and step == num_steps > 0 for phase, step, num_steps in seen)
    assert report.engine_bytes == (tmp_path / "engine").stat().st_size
    assert report.shard_bytes > 0
    assert report.peak_bytes > report.shard_bytes


@pytest.mark.slow
def test_peak_memory_is_two_shards_and_a_constant(tmp_path: Path) -> None:
    """0.8 GB of weights, in a process of its own. With the 4 GB of Llama-3-8B's quarter the same is 2.17 shards."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 5632, "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "launch.build", "--model", str(tmp_path / "model"), "--load-format", "dummy",
               "--target-compute-capability", "8.9", "--output", str(tmp_path / "engines")]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    report = re.search(r"shard ([\d.]+) GB .* peak host memory ([\d.]+) GB", result.stderr)
    assert report is not None, result.stderr
    shard, peak = (float(group) for group in report.groups())
    assert shard > 0.75
    assert peak <= 2 * shard + 0.6
