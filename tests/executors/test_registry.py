"""Engines by name: every place that asks reads one table."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, get_args

import pytest

from phalanx.launch.arguments import add_model_arguments
from phalanx.launch.diagnosis.check import Check
from phalanx.launch.diagnosis.ranks import engine_checks
from phalanx.launch.parser import CommandParser
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.config import EngineConfig, EngineName
from phalanx.runtime.executors.registry import ENGINES, choose_engine, with_default_sizes
from phalanx.runtime.llm import LLM


def test_the_table_has_every_engine_name_but_auto() -> None:
    assert {"auto", *ENGINES} == set(get_args(EngineName))


def test_the_command_line_and_the_doctor_know_the_engines_of_the_table() -> None:
    parser = CommandParser("launch.test")
    add_model_arguments(parser)
    for name in ENGINES:
        assert parser.parse_args(["--engine", name]).engine == name
    assert [check.name for check in engine_checks([])] == [f"engine {name}" for name in ENGINES]


def test_an_engine_is_not_ready_if_one_of_its_own_checks_fails() -> None:
    checks = [Check("Python", "ok", ""), Check("TensorRT", "off", "not installed")]
    assert {check.name: check.status for check in engine_checks(checks)} == {
        "engine numpy": "ok", "engine cuda": "ok", "engine tensorrt": "off",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("quantize", None, "none, fp8, int8"),
        ("quantize", "FP8", "none, fp8, int8"),
        ("kv_cache_dtype", None, "auto, float32, bfloat16, float16, fp8"),
        ("load_format", "safetensors", "auto, dummy"),
        ("dtype", "half", "auto, float32, bfloat16, float16"),
    ],
)
def test_names_that_a_field_does_not_take_are_refused(field: str, value: Any, names: str) -> None:
    """Scripts pass them to `LLM`: any other name of codes was taken for int8."""
    with pytest.raises(ConfigError, match=f"--{field.replace('_', '-')}={value} is unknown; use one of {names}"):
        EngineConfig(**{field: value})


def test_an_unknown_engine_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--engine=cude is unknown; use one of auto, numpy, cuda, tensorrt"):
        EngineConfig(**with_default_sizes({"engine": "cude"}))


def test_auto_is_resolved_before_default_sizes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from phalanx.kernels import device

    for available, engine in ((False, "numpy"), (True, "cuda")):
        monkeypatch.setattr(device, "gpu_is_available", lambda available=available: available)
        assert choose_engine("auto") == engine
        assert with_default_sizes({})["max_num_seqs"] == ENGINES[engine].max_num_seqs


def test_ranks_of_which_one_has_no_gpu_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of two kinds waited for each other without end."""
    from phalanx.kernels import device

    here = threading.local()
    monkeypatch.setattr(device, "gpu_is_available", lambda: here.has_gpu)

    def rank(comm: Communicator) -> str:
        here.has_gpu = comm.rank == 0
        with pytest.raises(
            ConfigError, match=r"differ in the engine that auto becomes, .* \(numpy and cuda\); give"
        ) as caught:
            LLM(comm=comm, tensor_parallel_size=2, max_num_seqs=2)
        return str(caught.value)

    assert len(set(run_ranks(2, rank))) == 1


def test_every_check_that_an_engine_needs_is_one_that_the_doctor_makes() -> None:
    """A misspelt name would never fail, so the engine would count as ready."""
    folder = Path(__file__).resolve().parents[2] / "launch" / "diagnosis"
    source = "".join(file.read_text() for file in folder.glob("*.py"))
    needed = {name for entry in ENGINES.values() for name in entry.checks}
    assert {name for name in needed if f'"{name}"' not in source} == set()
