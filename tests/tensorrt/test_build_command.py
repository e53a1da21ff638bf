"""``launch.build`` as a user meets it: flags, mistakes, help."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import build
from phalanx.parallel.errors import ConfigError

needs_rtx = pytest.mark.usefixtures("rtx")


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")


@needs_rtx
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "2", "--rank", "2"], r"--rank 2 is outside 0\.\.1 of tp=2 x pp=1; leave --rank out"),
        (["--tp", "9"], r"query heads cannot be shared by tp_size=9"),
        (["--target-compute-capability", "9.0"], r"compute capability 9\.0 is not supported by tensorrt_rtx"),
        (["--max-model-len", "4097"], r"--max-model-len=4097 is beyond the 2048 positions"),
        (["--max-num-seqs", "0"], r"max_num_seqs=0 of an engine is below 1"),
        (["--stripped"], r"--stripped is not supported by tensorrt_rtx"),
        (["--model", "/nowhere"], r"/nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_refused_before_anything_is_written(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "engines"
    target = [] if "--target-compute-capability" in arguments else ["--target-compute-capability", "8.9"]
    with pytest.raises((ConfigError, ValueError), match=message):
        build.main(["--output", str(output), *target, *arguments])
    assert not output.exists() or not list(output.glob("*.engine"))


@pytest.mark.parametrize("text", ["8", "8.x", "sm_80", ""])
def test_target_must_look_like_a_compute_capability(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a compute capability like 8\.9"):
        build.main(["--output", "x", "--target-compute-capability", text])
