"""A Slurm on this machine: a controller and two nodes with two fake GPUs each, in a directory, for the one user who started it.

Needs root, as Slurm's daemons do, and the packages that `install.sh` installs. Nothing outside the directory is written, every port
is a free one, and all processes end with the ``with`` block.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["Cluster", "missing", "start_cluster", "wait_until"]

NODES = ("n1", "n2")
GPUS_PER_NODE = 2
START_SECONDS = 30.0
KILL_WAIT_SECONDS = 30  # Slurm's default: what a drain has
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_CONFIG = """
ClusterName=phalanx
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
KillWait={kill_wait}
JobRequeue=1
MpiDefault=none
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Runs Slurm's commands against the controller in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI", "OMPI_"))},
            "SLURM_CONF": str(directory / "etc" / "slurm.conf"),
        }

    def run(self, *words: str | Path, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Standard output of a command that must succeed."""
        result = subprocess.run(
            [*map(str, words)], env={**self.environ, **(environ or {})}, cwd=cwd or self.directory, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert result.returncode == 0, (words, result.stdout, result.stderr)
        return result.stdout.strip()

    def submit(self, *words: str | Path, environ: Mapping[str, str], cwd: Path) -> str:
        """``sbatch``; the job's number."""
        return self.run("sbatch", "--parsable", *words, environ=environ, cwd=cwd)

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by field."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_state(self, number: str, *states: str, seconds: float = 60.0) -> dict[str, str]:
        """The job's fields, once it is in one of ``states``."""
        wait_until(lambda: self.job(number)["JobState"] in states, f"job {number} in {states}", seconds)
        return self.job(number)

    def end_jobs(self) -> None:
        """Kill what still runs or waits, until both nodes are free."""
        self.run("scancel", "--user=root", "--signal=KILL", "--full")
        self.run("scancel", "--user=root")
        wait_until(lambda: _idle_nodes(self) == len(NODES), "the jobs' end", KILL_WAIT_SECONDS + 30)


def missing() -> str:
    """Why there can be no cluster here; empty = there can."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_SYSTEM_PATH) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): tests/slurm/install.sh"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


def wait_until(holds: Callable[[], bool], what: str, seconds: float) -> None:
    """Look every 0.1 s until it holds.

    Raises:
        AssertionError: it did not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        pause.wait(0.1)


@contextmanager
def start_cluster(directory: Path) -> Iterator[Cluster]:
    """Start munge, controller and nodes; at the end cancel what runs and stop them."""
    _write_files(directory)
    cluster = Cluster(directory)
    with ExitStack() as stack:
        munge = directory / "munge"
        stack.enter_context(
            _daemon(
                directory, "munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
                f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log",
            )
        )  # fmt: skip
        wait_until((munge / "socket").exists, "munge's socket", START_SECONDS)
        stack.enter_context(_daemon(directory, "slurmctld", "-D", "-i", conf="etc"))
        for node in NODES:
            stack.enter_context(_daemon(directory, "slurmd", "-D", "-N", node, conf=f"etc-{node}"))
        wait_until(lambda: _idle_nodes(cluster) == len(NODES), "idle nodes", START_SECONDS)
        try:
            yield cluster
        finally:
            cluster.end_jobs()


def _idle_nodes(cluster: Cluster) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    result = subprocess.run(command, env=cluster.environ, capture_output=True, text=True, timeout=30, check=False)
    return result.stdout.split().count("idle")


def _write_files(directory: Path) -> None:
    config = _CONFIG.format(
        host=socket.gethostname().partition(".")[0], directory=directory, gpus=GPUS_PER_NODE, ports=_free_ports(3),
        kill_wait=KILL_WAIT_SECONDS,
    )  # fmt: skip
    for name in ("state", "munge", "etc", *(f"{kind}-{node}" for kind in ("spool", "etc", "tmp") for node in NODES)):
        (directory / name).mkdir(mode=0o755)
    key = directory / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    for gpu in range(GPUS_PER_NODE):  # /dev/null under names that end in a number, as those of real GPUs do
        os.mknod(directory / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for name in ("etc", *(f"etc-{node}" for node in NODES)):
        etc = directory / name
        (etc / "slurm.conf").write_text(config)
        (etc / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={directory}/gpu[0-{GPUS_PER_NODE - 1}]\n")
        # Two nodes on one machine would share the directory of PMIx.
        (etc / "mpi.conf").write_text(f"PMIxCliTmpDirBase={directory}/{name.replace('etc-', 'tmp-')}\n")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _daemon(directory: Path, program: str, *words: str, conf: str = "etc") -> Iterator[None]:
    path = shutil.which(program, path=_SYSTEM_PATH)
    assert path is not None
    environ = {**os.environ, "SLURM_CONF": str(directory / conf / "slurm.conf")}
    with (directory / f"{program}.out").open("ab") as output:
        process = subprocess.Popen(
            [path, *words], env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
