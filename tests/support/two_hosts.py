"""Two hosts made of namespaces on one machine: each has its own network, host name and boot id, and one cable joins them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Host", "TwoHosts", "two_hosts"]

_ADDRESSES = ("10.213.7.1", "10.213.7.2")
_ENTER = """#!/bin/sh
exec ip netns exec {name} unshare --uts \\
    sh -c 'hostname {name} && mount --bind {boot_id} /proc/sys/kernel/random/boot_id && exec "$@"' sh "$@"
"""
_LAUNCH = """#!/bin/sh
# Called like ssh: -x ADDRESS COMMAND. Like ssh, it stays on the first host and passes standard output and error on.
shift 2
{enter} sh -c "exec $*"
"""


@dataclass(frozen=True, slots=True)
class Host:
    """One of them.

    Attributes:
        name: of its network namespace, and its host name.
        enter: a program that runs its arguments there.
    """

    name: str
    address: str
    enter: Path

    def kill_all(self) -> None:
        """End every process of this host at once, as a loss of power does."""
        for pid in _ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """The first host, from which jobs are launched and asked, the second, and the launcher's way to it."""

    first: Host
    second: Host
    launch: Path

    def launcher_flags(self, ranks_per_host: int) -> list[str]:
        """What MPICH's ``mpirun`` needs on the first host to place ranks on both."""
        hosts = ",".join(f"{host.address}:{ranks_per_host}" for host in (self.first, self.second))
        return ["-launcher", "ssh", "-launcher-exec", str(self.launch), "-hosts", hosts]

    def unplug(self) -> None:
        """Cut the cable: packets are lost without an error on either side."""
        _ip("-n", self.second.name, "link", "set", "cable", "down")


@contextlib.contextmanager
def two_hosts(directory: Path) -> Iterator[TwoHosts]:
    """Make them, with this thread on the network of the first; what still runs there at the end is killed.

    Skips the test where namespaces are not permitted.
    """
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"network namespaces need {', '.join(missing)}")
    mark = uuid.uuid4().hex[:8]
    hosts = [_host(directory, f"phalanx-{mark}-{number}", address) for number, address in enumerate(_ADDRESSES)]
    launch = _script(directory / "launch", _LAUNCH.format(enter=hosts[1].enter))
    try:
        _make(hosts)
        with _on_network_of(hosts[0]):
            yield TwoHosts(hosts[0], hosts[1], launch)
    finally:
        for host in hosts:
            if Path("/run/netns", host.name).exists():
                host.kill_all()
                _ip("netns", "del", host.name)


def _host(directory: Path, name: str, address: str) -> Host:
    boot_id = directory / f"{name}.boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    return Host(name, address, _script(directory / f"enter-{name}", _ENTER.format(name=name, boot_id=boot_id)))


def _script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def _make(hosts: list[Host]) -> None:
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        ends = [("cable", "netns", host.name) for host in hosts]
        _ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for host in hosts:
            subprocess.run([host.enter, "true"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    for host in hosts:
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "cable")
        for device in ("lo", "cable"):
            _ip("-n", host.name, "link", "set", device, "up")
    deadline = time.monotonic() + 10
    while not all("state UP" in _ip("-n", host.name, "link", "show", "cable") for host in hosts):  # as MPI asks
        assert time.monotonic() < deadline, "the cable between two namespaces does not come up"


@contextlib.contextmanager
def _on_network_of(host: Host) -> Iterator[None]:
    """Move this thread, and the processes that it starts, to the host's network (setns(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{host.name}") as other:
        assert libc.setns(other.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(own.fileno(), 0) == 0, os.strerror(ctypes.get_errno())


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
