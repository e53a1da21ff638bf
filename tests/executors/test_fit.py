"""A model that a rank's memory cannot hold is refused before its weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx import LLM
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.executors.numpy import build
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint


def test_weights_beyond_the_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path)
    monkeypatch.setattr(build, "available_host_bytes", lambda: 10_000)
    monkeypatch.setattr(build, "NumpySink", lambda **_: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match=r"the weights of rank 0 take .* but this host has 0\.00 GiB for it"):
        LLM(tmp_path, engine="numpy")
