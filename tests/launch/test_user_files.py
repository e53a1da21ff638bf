"""Files that a user names: rank 0 reads them, since only its disk and standard input are the user's. Whatever is wrong with one is a
line and status 2; it never hangs, on however many ranks."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from phalanx.launch import sharing
from phalanx.launch.sharing import read_input, read_text
from phalanx.parallel.communicator import SelfCommunicator
from phalanx.parallel.errors import ConfigError
from tests.server.jobs import is_open_mpi

from .commands import ROOT, command_line, messages, needs_mpirun, run

LINES = '{"prompt": "def main("}\n{"prompt": "import "}\n'
GENERATE = ("generate", "--json", "--max-tokens", "2", "--input-file")
EVAL = ("eval", "--json", "--text")
TEXT = "def main():\n    return 0\n"
READERS = {"generate --input-file": (GENERATE, LINES), "eval --text": (EVAL, TEXT)}
ranks = pytest.mark.parametrize("ranks", [0, 2])
readers = pytest.mark.parametrize("reader", READERS)


def answer(reader: str, path: str | Path, ranks: int, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    words = command_line(*READERS[reader][0], path, ranks=ranks)
    return subprocess.run(words, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def assert_answered(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()]


def assert_one_line(result: subprocess.CompletedProcess[str], *said: str) -> None:
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert len(messages(result.stderr)) == 1, result.stderr
    assert is_open_mpi() or len(result.stderr.splitlines()) == 1, (
        result.stderr
    )  # its mpirun has a page of its own to say
    assert all(words in result.stderr for words in said), result.stderr


@needs_mpirun
@ranks
@readers
@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_is_a_file_too(reader: str, ranks: int, name: str) -> None:
    if ranks and is_open_mpi():
        pytest.skip("Open MPI 5.0.11's mpirun does not pass on the end of standard input: a plain cat waits, too")
    assert_answered(answer(reader, name, ranks, stdin=READERS[reader][1]))


def test_a_wait_for_the_end_of_a_file_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sharing, "SILENT_SECONDS", 0.01)
    pipe, read, said = tmp_path / "pipe", [], ""
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(read_input(SelfCommunicator(), "--text", pipe)))
    reader.start()
    with pipe.open("wb") as writer:
        while "waiting for the end of --text" not in said:
            said += capfd.readouterr().err
        writer.write(b"text")
    reader.join()
    assert read == [b"text"]


@needs_mpirun
@readers
def test_a_pipe_is_read_once(reader: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(READERS[reader][1],))
    writer.start()
    assert_answered(answer(reader, pipe, 2))
    writer.join()


@needs_mpirun
@readers
def test_a_file_that_only_rank_0_has_is_enough(reader: str, tmp_path: Path) -> None:
    """Rank 1 runs where the name leads nowhere, as on another host."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text(READERS[reader][1])
    (tmp_path / "there").mkdir()
    command = " ".join(f"'{word}'" for word in command_line(*READERS[reader][0], "file"))
    script = f'cd "$([ "$PMI_RANK$OMPI_COMM_WORLD_RANK" = 0 ] && echo here || echo there)" && exec {command}'
    words = [*command_line("main", ranks=2)[:3], "sh", "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert_answered(
        subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    )


@needs_mpirun
@ranks
@readers
def test_a_directory_is_one_line(reader: str, ranks: int, tmp_path: Path) -> None:
    assert_one_line(answer(reader, tmp_path, ranks), "is a directory", "- for standard input")


@needs_mpirun
@readers
def test_a_missing_file_is_one_line(reader: str, tmp_path: Path) -> None:
    assert_one_line(answer(reader, tmp_path / "nowhere", 2), "cannot be read: No such file", "check the path")


@readers
def test_a_file_that_cannot_be_read_is_one_line(reader: str) -> None:
    """Memory of a process that reads as an error, for root too."""
    assert_one_line(answer(reader, "/proc/self/mem", 0), "cannot be read")


@readers
def test_latin_1_is_one_line(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "latin-1"
    path.write_bytes('{"prompt": "\xe9"}'.encode("latin-1"))
    assert_one_line(answer(reader, path, 0), "UTF-8")


@readers
def test_a_byte_order_mark_is_skipped(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "marked"
    path.write_text(READERS[reader][1], "utf-8-sig")
    assert_answered(answer(reader, path, 0))


def test_a_lone_surrogate_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"prompt": "\\ud800"}\n')
    assert_one_line(answer("generate --input-file", path, 0), "line 1", "surrogate")


@needs_mpirun
def test_a_prompt_that_is_no_text_is_one_line() -> None:
    """The command line as bytes that are not UTF-8."""
    words = [os.fsencode(word) for word in command_line("generate", "--prompt", ranks=2)]
    result = subprocess.run([*words, b"\xe9"], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert result.returncode == 2, result.stderr
    assert b"prompt 0: the prompt is not valid Unicode" in result.stderr
    assert is_open_mpi() or result.stderr.count(b"\n") == 1


@needs_mpirun
def test_a_configuration_that_only_rank_0_has_is_enough(tmp_path: Path) -> None:
    (tmp_path / "phalanx.toml").write_text('prompt = ["def main("]\nmax_tokens = 2\njson = true\n')
    result = run("generate", "--config", tmp_path / "phalanx.toml", ranks=2)
    assert_answered(result)


@pytest.mark.parametrize(("most", "text"), [(-1, "aé"), (4, "a"), (5, "a"), (6, "aé"), (7, "aé")])
def test_a_text_of_which_less_is_read_ends_with_a_whole_character(tmp_path: Path, most: int, text: str) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffaé".encode())
    assert read_text(SelfCommunicator(), "--calibration", path, most) == text


def test_a_text_that_ends_within_a_character_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("aé".encode()[:2])
    with pytest.raises(ConfigError, match=r"text is not UTF-8 \(byte 1\)"):
        read_text(SelfCommunicator(), "--calibration", tmp_path / "text", 3)
