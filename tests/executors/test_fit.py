"""A model that a rank's memory cannot hold is refused before its weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx import LLM
from phalanx.checkpoints.formats import ALL_DENSE
from phalanx.checkpoints.quantization.held import held_formats
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Layout
from phalanx.runtime.executors.cuda import build as cuda_build
from phalanx.runtime.executors.numpy import build
from phalanx.runtime.memory import plan_memory
from phalanx.runtime.models import find_model
from phalanx.runtime.models.shapes import use_of
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint
from tests.support.fake_cupy import install_fake_device


def test_weights_beyond_the_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path)
    monkeypatch.setattr(build, "available_host_bytes", lambda: 10_000)
    monkeypatch.setattr(build, "NumpySink", lambda **_: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match=r"the weights of rank 0 take .* but this host has 0\.00 GiB for it"):
        LLM(tmp_path, engine="numpy")


class LoadingStarts(Exception):
    pass


def starts_to_load(*_: object) -> None:
    raise LoadingStarts


def test_the_largest_stack_of_floats_must_fit_next_to_the_codes_that_become_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    case = CASES_BY_NAME["mixtral-plain"]
    write_checkpoint(case, tmp_path)
    model = find_model(case.config)
    config = model.read_config(case.config)
    formats = held_formats(ALL_DENSE, "fp8", use_of(model, config).experts)
    (plan,) = plan_memory(
        model, config, Layout(1, 1, 1), "float16", formats=formats, max_num_seqs=1, max_num_tokens=1, max_model_len=16, block_size=16
    )  # fmt: skip
    names = ("num_local_experts", "intermediate_size", "hidden_size")
    num_experts, intermediate_size, hidden_size = (case.config[name] for name in names)
    needed = plan.weight_bytes + num_experts * 2 * intermediate_size * hidden_size * 2
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    monkeypatch.setattr(cuda_build, "_load", starts_to_load)
    for free, outcome, message in (
        (needed - 1, ConfigError, "the weights of rank 0 take .* while they are loaded, but its GPU has"),
        (needed, LoadingStarts, None),
    ):
        monkeypatch.setattr(cuda_build, "_free_bytes", lambda free=free: free)
        with pytest.raises(outcome, match=message):
            LLM(tmp_path, engine="cuda", dtype="float16", quantize="fp8")
