"""Standard streams that a shell closed (``>&-``) or whose encoding lacks characters: no traceback, and lost output is said."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from .commands import ROOT, command_line, run


def run_in_shell(redirections: str, *words: str) -> subprocess.CompletedProcess[str]:
    line = " ".join(f"'{word}'" for word in command_line(*words))
    return subprocess.run(
        ["bash", "-c", f"{line} {redirections}"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("redirections", [">&-", ">&- <&-"])
def test_output_to_a_closed_stream_is_one_line(redirections: str) -> None:
    result = run_in_shell(redirections, "plan")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "phalanx: standard output cannot be written: it is closed; send it to a file" in result.stderr


@pytest.mark.parametrize(("words", "status"), [(("plan",), 0), (("plan", "--tp", "0"), 2), (("plan", "--speed"), 2)])
def test_the_status_is_the_same_without_standard_error(words: tuple[str, ...], status: int) -> None:
    result = run_in_shell("2>&- <&-", *words)
    assert (result.returncode, bool(result.stdout), result.stderr) == (status, status == 0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_text_that_the_encoding_lacks_is_escaped(encoding: str) -> None:
    """As in JSON, so that lines for machines stay JSON in any encoding."""
    text = run(
        "generate", "--prompt", "日\N{GRINNING FACE}", "--max-tokens", "0", environ={"PYTHONIOENCODING": encoding}
    )
    assert (text.returncode, text.stdout, text.stderr) == (0, "\\u65e5\\ud83d\\ude00\n", "")


def test_a_stream_whose_reader_is_gone_ends_no_process_that_is_started_later() -> None:
    """As a supervisor's, whose log nobody reads any more: every launcher would end by SIGPIPE."""
    program = (
        "import os, subprocess; from phalanx.launch.streams import drop_broken_streams; drop_broken_streams(); "
        "print(subprocess.run(['sh', '-c', 'echo kept; echo lost >&2; exit 7'], check=False).returncode)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as broken:
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=broken, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "kept\n7\n")


@pytest.mark.parametrize(
    ("error", "way_out"), [("ENOSPC", "make room"), ("EROFS", "give another path; PHALANX_CACHE_DIR is")]
)
def test_a_file_system_that_takes_nothing_is_one_line_with_the_way_out(error: str, way_out: str) -> None:
    """A container's root that may only be read has room."""
    program = (
        "import errno, os; from phalanx.launch.running import run_command\n"
        f"def main(argv): raise OSError(errno.{error}, os.strerror(errno.{error}), '/x/kernels')\n"
        "run_command(main, [])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    said = f"phalanx: /x/kernels cannot be written: {os.strerror(getattr(errno, error))}; {way_out}"
    assert (result.returncode, result.stderr.startswith(said), result.stderr.count("\n")) == (1, True, 1)
