"""A rank that fails or leaves before MPI is up, or exits in the middle: the others do not wait for it, and somebody says why."""

from __future__ import annotations

import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from phalanx.parallel import start_messenger
from phalanx.parallel.start_messenger import answer
from tests.support.launcher import LAUNCHER_ENVIRONMENT

from ..server.jobs import is_open_mpi
from .commands import MPIRUN, ROOT, needs_mpirun, run

IDS = ("--prompt-token-ids", "5,6", "--max-tokens", "2")
ON_RANK = 'if [ "$PMI_RANK$OMPI_COMM_WORLD_RANK" = {rank} ]; then {instead}; else exec "$@"; fi'
"""Before anything of ours runs: the package is missing on that rank's host, or its start script ends."""
FAULT = """
import sys, launch
from phalanx.launch import {command}
from phalanx.launch.running import run_command
from phalanx.parallel.launcher import launch_info

def main(argv):
    if launch_info().rank == {rank}:
        {fault}
    return {command}.main(argv)

run_command(main, sys.argv[1:])
"""


def start(words: list[str], ranks: int, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **LAUNCHER_ENVIRONMENT, "PYTHONPATH": str(ROOT), **(environ or {})}
    command = [str(MPIRUN), "-n", str(ranks), *words]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_mpirun
@pytest.mark.parametrize(
    ("rank", "command"),
    [
        (0, "generate"), (1, "doctor"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(1, "generate"), (0, "doctor")]),
    ],
)  # fmt: skip
def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_limit(rank: int, command: str) -> None:
    script = ON_RANK.format(rank=rank, instead="exec sleep 30")
    arguments = IDS if command == "generate" else ("--timeout", "2")
    result = start(
        ["sh", "-c", script, "sh", sys.executable, "-m", f"launch.{command}", *arguments], 3,
        {"PHALANX_MPI_START_SECONDS": "2"},
    )  # fmt: skip
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("phalanx: ")]
    assert f"of 3: MPI has not started within 2 s, because rank {rank} did not come; look for its message" in line


@needs_mpirun
def test_ranks_that_do_not_come_are_named_by_whichever_come() -> None:
    """Also where Python takes longer to start than a rank waits after the message is due."""
    script = ON_RANK.format(rank='0 ] || [ "$PMI_RANK$OMPI_COMM_WORLD_RANK" = 1', instead="exec sleep 30")
    result = start(
        ["sh", "-c", script, "sh", sys.executable, "-m", "launch.generate", *IDS], 4, {"PHALANX_MPI_START_SECONDS": "2"}
    )
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("phalanx: ")]
    assert "of 4: MPI has not started within 2 s, because ranks 0, 1 did not come; look for its message" in line


@pytest.mark.parametrize(
    ("sees_all", "said"), [(1, "because ranks 1, 2 did not come"), (0, "because not all ranks came")]
)
def test_ranks_that_do_not_see_each_other_accuse_nobody(sees_all: int, said: str) -> None:
    """In containers with networks of their own each rank is the only one that it knows of."""
    key = uuid.uuid4().hex
    place = answer(key, "0")
    assert place is not None
    with place:
        words = [0, 3, 3, 2, time.monotonic(), key, 0, sees_all]
        assert _said_by_a_messenger(str(os.getppid()), *words) == "", "it speaks for the rank that has started it only"
        assert said in _said_by_a_messenger("$$", *words)


def _said_by_a_messenger(pid: str, *words: object) -> str:
    """What it writes as a child of a shell, which is ``$$``; its standard input stays open."""
    command = f'"{sys.executable}" -ISE "{start_messenger.__file__}" {pid} {" ".join(map(str, words))} "look for its message"; true'
    with subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.wait(60)
        assert process.stderr is not None
        return process.stderr.read()


def test_a_name_that_is_too_long_is_no_other_process() -> None:
    with pytest.raises(OSError, match="too long"):
        answer("h" * 120, "0")


@needs_mpirun
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_before_mpi_is_named_long_before_the_limit(rank: int) -> None:
    """MPICH's launcher goes on without it, and a start script that fails is a common reason."""
    script = ON_RANK.format(rank=rank, instead="exit 3")
    result = start(["sh", "-c", script, "sh", sys.executable, "-m", "launch.generate", *IDS], 3)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("phalanx: ")]
    if not is_open_mpi():  # whose launcher ends the job at once
        (line,) = said
        assert f"of 3: MPI will not start, because rank {rank} ended before that; look for its message" in line


@needs_mpirun
def test_a_rank_that_is_killed_before_mpi_is_named_where_the_job_may_go_on_without_it() -> None:
    if not is_open_mpi():
        pytest.skip("ULFM is Open MPI's")
    script = ON_RANK.format(rank=1, instead="kill -9 $$")
    words = ["--with-ft", "ulfm", "sh", "-c", script, "sh", sys.executable, "-m", "launch.generate", *IDS]
    (line,) = [line for line in start(words, 2).stderr.splitlines() if line.startswith("phalanx: ")]
    assert "of 2: MPI will not start, because rank 1 ended before that; look for its message" in line


@pytest.mark.parametrize("byte", [b"+", b""], ids=["started", "killed"])
def test_shared_memory_of_a_rank_that_is_killed_in_the_start_of_mpi_is_removed(byte: bytes) -> None:
    """This process is the rank, and MPICH's segment a file that it has mapped."""
    path = Path(f"{start_messenger.SEGMENT}{uuid.uuid4().hex}")
    path.write_bytes(bytes(mmap.PAGESIZE))
    try:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            words = (os.getpid(), 0, 2, 2, "60", time.monotonic() + 60, "test", 0, 1, "")
            command = [sys.executable, "-ISE", start_messenger.__file__, *map(str, words)]
            subprocess.run(command, input=byte, check=True, timeout=60)
            assert path.exists() == bool(byte)
    finally:
        path.unlink(missing_ok=True)


def test_a_rank_that_ends_in_the_start_of_mpi_next_to_full_shared_memory_has_its_reason_said() -> None:
    """This process is the rank. The kernel ends it by a bus error, of which neither it nor MPICH says anything."""
    words = (os.getpid(), 1, 2, 2, "60", time.monotonic() + 60, uuid.uuid4().hex, 0, 1, "")
    full = "from phalanx.parallel import start_messenger as m; m.LEAST_BYTES, m.signal.SIGALRM = 1 << 62, 0; m.main()"
    for byte, said in ((b"", f"phalanx: rank 1 of 2: MPI {start_messenger.FULL}\n"), (b"+", "")):
        command = [sys.executable, "-c", full, *map(str, words)]
        result = subprocess.run(command, input=byte, stderr=subprocess.PIPE, check=True, timeout=60)
        assert result.stderr.decode() == said


@pytest.mark.parametrize(("blocks", "is_short"), [(0, False), (1000, True)], ids=["no limit", "full"])
def test_shared_memory_without_a_limit_is_not_full(
    monkeypatch: pytest.MonkeyPatch, blocks: int, is_short: bool
) -> None:
    room = SimpleNamespace(f_blocks=blocks, f_bavail=0, f_frsize=4096)
    monkeypatch.setattr(start_messenger.os, "statvfs", lambda _: room)
    assert start_messenger._Segment(os.getpid()).is_short_of_room() == is_short


@pytest.mark.parametrize(("catches_usr1", "said"), [(False, ""), (True, "inside\n")], ids=["at once", "afterwards"])
def test_a_sigusr1_in_the_start_of_mpi_ends_the_rank(catches_usr1: bool, said: str) -> None:
    """MPICH catches it in its start and drops it, so that such a signal to all ranks was lost, unless there was a handler."""
    program = (
        "import os, signal; from phalanx.parallel.launcher import LaunchInfo; "
        "from phalanx.parallel.mpi_start import waiting_for_all_ranks\n"
        f"with waiting_for_all_ranks(LaunchInfo(0, 2, 0, 2, 'MPICH'), {catches_usr1}):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1); print('inside', flush=True)\n"
        "print('after', flush=True)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGUSR1, said, "")


@needs_mpirun
def test_full_shared_memory_is_named() -> None:
    if is_open_mpi():
        pytest.skip("Open MPI says so itself, and works without")
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not permitted")
    result = subprocess.run(
        [*mount, str(MPIRUN), "-n", "2", sys.executable, "-m", "launch.generate", *IDS],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode not in (0, 2)
    assert f"MPI {start_messenger.FULL}" in result.stderr


@pytest.mark.parametrize(
    ("here", "size", "local_size", "said"),
    [
        ([0, 2, 3], 4, 4, "rank 1 did not come"),
        ([3], 4, 4, "ranks 0, 1, 2 did not come"),
        ([4, 6], 8, 4, "2 of the 4 ranks of HOST did not come (there: 4, 6)"),
        ([4, 5, 6, 7], 8, 4, "a rank of another host than HOST did not come"),
        ([0, None, 2], 4, 4, "1 of the 4 ranks of HOST did not come (there: 0, 2)"),
    ],
)
def test_who_did_not_come_is_said_as_far_as_one_host_can_know(
    here: list[int | None], size: int, local_size: int, said: str
) -> None:
    words = start_messenger._in_words(here, size, local_size, "did not come")
    assert words == said.replace("HOST", socket.gethostname())


@needs_mpirun
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise ZeroDivisionError('planted')", "ZeroDivisionError: planted"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("raise PermissionError(13, 'Permission denied', 'locked/model')", "'locked/model' cannot be used: Permission denied; change its permissions"),
        ("from phalanx.parallel.errors import ConfigError; raise ConfigError('a file of one host')", "a file of one host"),
    ],
)  # fmt: skip
def test_a_failure_of_one_rank_before_mpi_ends_all(rank: int, fault: str, said: str, tmp_path: Path) -> None:
    script = tmp_path / "fault.py"
    script.write_text(FAULT.format(command="generate", rank=rank, fault=fault))
    result = start([sys.executable, str(script), *IDS], 3)
    assert result.returncode in (1, 2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("phalanx: ")]
    assert re.match(
        rf"phalanx: rank {rank} (on {socket.gethostname()}: |\({socket.gethostname()}, pid \d+\) failed: )", line
    )
    assert said in line


@needs_mpirun
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exit_of_one_rank_in_the_middle_ends_all(rank: int, tmp_path: Path) -> None:
    script = tmp_path / "fault.py"
    fault = "import phalanx.runtime.llm as llm; llm.LLM = lambda *_, **__: sys.exit(0)"
    script.write_text(FAULT.format(command="generate", rank=rank, fault=fault))
    result = start([sys.executable, str(script), *IDS], 3)
    assert result.returncode == 1
    (line,) = [
        line
        for line in result.stderr.splitlines()
        if line.startswith(f"phalanx: rank {rank} ({socket.gethostname()}, pid ")
    ]
    assert line.endswith(") failed: SystemExit: 0")


def test_a_limit_that_is_no_number_is_one_line() -> None:
    result = run("generate", *IDS, ranks=2, environ={"PHALANX_MPI_START_SECONDS": "soon"})
    assert result.returncode == 2
    assert "PHALANX_MPI_START_SECONDS='soon' is not a positive number of seconds" in result.stderr


def test_a_step_of_slurm_without_a_pmi_is_refused_in_one_sentence() -> None:
    """``srun --mpi=none``: MPICH would start as many jobs of one rank, Open MPI would end with a page of its own words."""
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}
    first, second = (run("generate", *IDS, environ={**step, "SLURM_PROCID": rank}) for rank in "01")
    assert (first.returncode, first.stdout, first.stderr.count("\n")) == (2, "", 1)
    assert "phalanx: Slurm started 4 ranks but" in first.stderr
    assert "or srun --mpi=pmix (Open MPI) / --mpi=pmi2 (MPICH)" in first.stderr
    assert (second.returncode, second.stdout, second.stderr) == (2, "", "")
