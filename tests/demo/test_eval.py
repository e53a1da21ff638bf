# SPDX-License-Identifier: Apache-2.0
"""`launch.eval` as users call it: what it prints, where, and what it says to mistakes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.launch.eval import Evaluation
from phalanx.launch.scoring import windows_over

REPOSITORY = Path(__file__).resolve().parents[2]
EXCERPT = "importlib.metadata._functools.txt"
LAUNCHERS = [path for path in (shutil.which("mpirun", path=str(Path(sys.executable).parent)),
                               shutil.which("mpirun")) if path]  # fmt: skip


def run_eval(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    prefix = [LAUNCHERS[0], "-n", str(ranks)] if ranks > 1 else []
    command = [*prefix, sys.executable, "-m", "launch.eval", "--engine", "numpy", *map(str, arguments)]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
    )


@pytest.fixture
def recorded(reference: dict[str, Any]) -> dict[str, Any]:
    """The recorded values of the shortest excerpt."""
    return next(entry for entry in reference["held_out"] if entry["file"] == EXCERPT)


def assert_report(output: str, recorded: dict[str, Any]) -> dict[str, Any]:
    (line,) = output.splitlines()
    report = json.loads(line)
    assert report["loss"] == pytest.approx(recorded["loss"], abs=1e-3)
    assert report["num_tokens"] == recorded["num_tokens"] - 1
    assert report["num_bytes"] == recorded["num_bytes"]
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    bits = report["loss"] * report["num_tokens"] / math.log(2) / report["num_bytes"]
    assert report["bits_per_byte"] == pytest.approx(bits)
    return report


def test_json_is_one_line_on_standard_output_and_nothing_else(held_out: Path, recorded: dict[str, Any]) -> None:
    finished = run_eval("--text", held_out / EXCERPT, "--json")
    assert (finished.returncode, finished.stderr) == (0, "")
    report = assert_report(finished.stdout, recorded)
    assert (report["tp"], report["pp"], report["dp"]) == (1, 1, 1)
    assert (report["context"], report["stride"]) == (2048, 2047)


@pytest.mark.skipif(not LAUNCHERS, reason="no mpirun")
def test_four_ranks_report_once_and_the_same(held_out: Path, recorded: dict[str, Any]) -> None:
    finished = run_eval("--text", held_out / EXCERPT, "--json", "--tp", 2, "--pp", 2, ranks=4)
    assert finished.returncode == 0, finished.stderr
    report = assert_report(finished.stdout, recorded)
    assert (report["tp"], report["pp"], report["dp"]) == (2, 2, 1)


@pytest.mark.skipif(not LAUNCHERS, reason="no mpirun")
def test_replicas_share_the_windows_of_one_text(held_out: Path, reference: dict[str, Any]) -> None:
    recorded = reference["windowed"]
    arguments = ["--context", recorded["context"], "--stride", recorded["stride"], "--dp", 2, "--json"]
    finished = run_eval("--text", held_out / recorded["file"], *arguments, ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["loss"] == pytest.approx(recorded["loss"], abs=1e-3)


def test_people_get_a_summary(held_out: Path, recorded: dict[str, Any]) -> None:
    finished = run_eval("--text", held_out / EXCERPT)
    assert finished.returncode == 0, finished.stderr
    assert "256 tokens, 884 bytes" in finished.stdout
    assert f"{recorded['loss']:.4f} nats a token" in finished.stdout


def test_terminal_shows_progress(held_out: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "launch.eval", "--engine", "numpy", "--text", str(held_out / EXCERPT), "--json"]
    finished = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120, check=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as screen:
        while piece := screen.read(4096):  # fails, rather than ends, when the other side is closed
            shown += piece
    assert "256/256" in shown.decode()
    assert json.loads(finished.stdout)["num_tokens"] == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "/nonexistent.txt"], "--text /nonexistent.txt cannot be read: No such file or directory"),
        (["--text", sys.executable], "is not UTF-8"),
        (["--text", os.devnull], "the text has fewer than two tokens"),
        (["--text", __file__, "--context", "4096"], "--context=4096 is outside 2 to 2048"),
        (["--text", __file__, "--context", "64", "--stride", "64"], "--stride=64 is outside 1 to 63"),
        ([], "the following arguments are required: --text"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(Path(word).name for word in value),
)
def test_mistakes_get_one_line_and_status_2(arguments: list[str], message: str) -> None:
    finished = run_eval(*arguments)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_checkpoint_without_a_tokenizer_is_refused(demo: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo, model, ignore=shutil.ignore_patterns("tokenizer*"))
    finished = run_eval("--text", __file__, "--model", model)
    assert finished.returncode == 2
    assert "has no tokenizer.json" in finished.stderr


@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_windows_score_every_token_but_the_first_once(num_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored: Counter[int] = Counter()
    for window in windows_over(num_tokens, context, stride):
        assert 0 <= window.start < window.first_scored < window.stop <= num_tokens, "each is scored after another"
        assert window.stop - window.start <= context
        if window.start:
            assert window.first_scored - window.start >= context - stride, "the promised look back"
        scored.update(range(window.first_scored, window.stop))
    assert scored == Counter(range(1, num_tokens))


def test_figures_follow_from_the_summed_loss() -> None:
    evaluation = Evaluation(num_tokens=4, num_bytes=16, total_loss=8 * math.log(2))
    assert evaluation.loss == pytest.approx(2 * math.log(2))
    assert evaluation.perplexity == pytest.approx(4.0)
    assert evaluation.bits_per_byte == pytest.approx(0.5)
    assert Evaluation(1, 1, 1e6).perplexity == math.inf


def processor_seconds(command: list[str]) -> tuple[str, float]:
    """What a command printed, and the processor time it took: what one idle core would need at most."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return finished.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_first_run_prints_a_python_program_within_ten_seconds() -> None:
    command = [sys.executable, "-m", "launch.generate", "--prompt", "def main("]
    text, seconds = processor_seconds(command)
    assert text.startswith("def main():\n    ")
    compile(text, "generated", "exec")
    assert seconds < 10


def test_one_core_generates_thirty_tokens_a_second() -> None:
    command = [sys.executable, "-m", "launch.generate", "--engine", "numpy", "--prompt", "class Stack:\n"]
    output, seconds = processor_seconds([*command, "--max-tokens", "300", "--ignore-eos", "--json"])
    assert len(json.loads(output)["token_ids"]) == 300
    assert 300 / seconds >= 30, "the start counted in"


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("", (), "the text has fewer than two tokens"),
        ("some text", ("--stride", 0), "--stride=0 is outside 1 to"),
        ("some text", ("--context", 1), "--context=1 is outside 2 to"),
        ("some text", ("--context", 1 << 20), "--context=1048576 is outside 2 to"),
        ("some text", ("--context", 8, "--stride", 8), "--stride=8 is outside 1 to 7"),
    ],
)
def test_what_cannot_be_scored_is_found_before_weights_are_read(
    demo: Path, tmp_path: Path, text: str, flags: tuple[object, ...], said: str
) -> None:
    """There are none to read."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(demo / name, tmp_path)
    (tmp_path / "text").write_text(text)
    finished = run_eval("--text", tmp_path / "text", "--model", tmp_path, *flags)
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert said in finished.stderr
