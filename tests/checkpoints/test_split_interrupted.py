"""A split that is killed, at every write, open, mkdir and rename: nothing loads, and the next split replaces what it left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.parallel.errors import CheckpointError
from tests.checkpoints.splitting import read_all, split
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_CALLS = ("mkdir", "open", "pwrite", "rename", "unlink", "write", "close", "listdir")
KILLED = 77


def run_until_call(number: int, action: Callable[[], Any]) -> bool:
    """Run ``action`` in a child that ends itself, like SIGKILL, just before its ``number``-th system call that matters.

    Returns False if it got to the end.
    """
    child = os.fork()
    if child == 0:
        left = number

        def counting(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(KILLED)
                return real(*args, **kwargs)

            return call

        try:
            for name in SYSTEM_CALLS:
                setattr(os, name, counting(getattr(os, name)))
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


def assert_nothing_loads(directory: Path, but: str) -> None:
    """No directory below ``directory`` opens as a checkpoint, under its name or another, except ``but``."""
    for path in directory.iterdir():
        if path.name == but:
            continue
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_killed_at_any_system_call_it_leaves_nothing_that_loads(tmp_path: Path) -> None:
    case = CASES_BY_NAME["gpt2-plain"]
    path = write_checkpoint(replace(case, config=case.config | {"n_layer": 1}), tmp_path / "model")
    (path / "tokenizer.json").write_text("{}")
    stored = read_all(path)
    number = 0
    while run_until_call(number, lambda: split(path, tmp_path / "s", 2, 1)):
        if (tmp_path / "s").exists():  # killed after the rename: then it is complete
            break
        assert_nothing_loads(tmp_path, but="model")
        number += 1
    assert number > 40
    assert {file.name for file in tmp_path.iterdir()} == {"model", "s"}
    for name, values in read_all(tmp_path / "s").items():
        assert values.tobytes() == stored[name].tobytes()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_partial_directory_does_not_load_under_another_name_either(tmp_path: Path) -> None:
    path = write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path / "model")
    seen = 0
    for number in range(40, 400, 20):
        if not run_until_call(number, lambda: split(path, tmp_path / "s", 2, 2)):
            break
        (tmp_path / "s.partial").rename(tmp_path / "renamed")
        if (tmp_path / "renamed" / "manifest.json").exists():
            break  # everything was written and checked: renaming is what the split itself does next
        assert_nothing_loads(tmp_path, but="model")
        (tmp_path / "renamed").rename(tmp_path / "s.partial")
        seen += 1
    assert seen >= 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_leftovers_are_replaced_and_reported(tmp_path: Path) -> None:
    path = write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path / "model")
    assert run_until_call(60, lambda: split(path, tmp_path / "s", 2, 2))
    assert list((tmp_path / "s.partial").iterdir())
    assert split(path, tmp_path / "s", 1, 1).replaced_leftovers is True
    assert {file.name for file in tmp_path.iterdir()} == {"model", "s"}
    assert read_all(tmp_path / "s").keys() == read_all(path).keys()


def test_sigkill_of_the_command_at_random_moments(tmp_path: Path) -> None:
    path = write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path / "model")
    command = [sys.executable, "-m", "launch.split", "--model", str(path), "--output", str(tmp_path / "s"), "--tp", "4"]
    moments = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.15, 0.5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (tmp_path / "s").exists():
            assert read_all(tmp_path / "s").keys() == read_all(path).keys()
            break
        assert_nothing_loads(tmp_path, but="model")
    else:
        assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == 0
        assert read_all(tmp_path / "s").keys() == read_all(path).keys()


def test_ctrl_c_removes_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path / "model")

    def interrupted(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("phalanx.checkpoints.splitter._copy_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        split(path, tmp_path / "s", 2, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
