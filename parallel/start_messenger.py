# SPDX-License-Identifier: Apache-2.0
"""Says why MPI does not start: a child of a rank, as MPI's start keeps the rank's own interpreter from running anything.

``python start_messenger.py PID RANK SIZE LOCAL_SIZE SECONDS DEADLINE KEY AGENT SEES_ALL WAY_OUT``; needs the standard library only. It reads a
byte when MPI has started; if its standard input ends without one, the rank has. The first messenger of a host speaks and the others are
silent. DEADLINE is on the host's monotonic clock; SEES_ALL is 1 where ranks of this host are known to see each other's names.

It also removes the shared memory of a rank that is killed meanwhile: MPICH creates it at the beginning of its start, and ranks unlink
it at the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Collection
from pathlib import Path

__all__ = ["NAME", "answer"]

NAME = "phalanx-start-{key}-{what}"
"""Of abstract sockets, which vanish with their process: one for each rank of the host that has come, one for who speaks."""
POLL_SECONDS = 0.5
MAPS_SECONDS = 0.02
"""Between two looks at what the rank has mapped, until there is a segment."""
SEGMENT = "/dev/shm/mpich_shm_"
SHARED_MEMORY = "/dev/shm"
LEAST_BYTES = 1 << 16
FULL = (
    f"could not start, because {SHARED_MEMORY} is full; give it more room (docker run --shm-size=8g or --ipc=host), or remove what killed "
    "jobs have left there"
)
ENDED_SECONDS = 2.0
"""For so long a process must be missing before it counts as ended: a launcher starts them one after the other."""
CLAIM_SECONDS = 1.0


def answer(key: str, what: str) -> socket.socket | None:
    """Be listed under ``what`` until the socket is closed; None if another process is.

    Raises:
        OSError: the name cannot be had for another reason.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.bind(f"\0{NAME.format(key=key, what=what)}")
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return sock


def _listed(key: str) -> set[int]:
    """Ranks that have come."""
    prefix = "@" + NAME.format(key=key, what="")
    words = Path("/proc/net/unix").read_text().split()
    names = (word.removeprefix(prefix) for word in words if word.startswith(prefix))
    return {int(name) for name in names if name.isdigit()}


def _running(agent: int) -> list[int | None]:
    """What the launcher's ``agent`` has started on this host and has not ended: ranks, None where a process does not show its own."""
    found: list[int | None] = []
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(_rank_of(pid))
    return found


def _rank_of(pid: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = word.partition(b"=")
            if name in (b"PMI_RANK", b"OMPI_COMM_WORLD_RANK"):
                return int(value)
    return None


def _in_words(here: Collection[int | None], size: int, local_size: int, verb: str) -> str:
    """Who is not among the ranks ``here``, by number where this host has all ranks."""
    host, known = socket.gethostname(), sorted(rank for rank in here if rank is not None)
    if len(here) >= local_size:
        return f"a rank of another host than {host} {verb}"
    if local_size < size or len(known) < len(here):
        return (
            f"{local_size - len(here)} of the {local_size} ranks of {host} {verb} (there: {', '.join(map(str, known))})"
        )
    absent = sorted(set(range(size)).difference(known))
    return f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))} {verb}"


class _Segment:
    """MPICH's shared memory of this host, as ``rank`` has mapped it."""

    def __init__(self, rank: int) -> None:
        self._rank, self._path = rank, ""

    def find(self) -> bool:
        """Look for it; whether it is known."""
        if not self._path:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{self._rank}/maps").read_text().split()
                self._path = next((word for word in words if word.startswith(SEGMENT)), "")
        return bool(self._path)

    def is_short_of_room(self) -> bool:
        """Whether the rank may have ended because it touched memory that is not there: a bus error, without a word."""
        with contextlib.suppress(OSError):
            room = os.statvfs(SHARED_MEMORY)
            return room.f_blocks > 0 and room.f_bavail * room.f_frsize < LEAST_BYTES
        return False

    def remove(self) -> None:
        """Do what a rank that has been killed could not.

        What it had mapped cannot be looked up any more: its number may be another process's by now.
        """
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def _reason(
    size: int, local_size: int, seconds: str, deadline: float, key: str, agent: int, sees_all: bool, segment: _Segment
) -> str:  # fmt: skip
    """Why MPI does not start, once that is certain; empty if it has started or the rank has ended."""
    last_complete = last_look = time.monotonic()
    while True:
        left = deadline - time.monotonic()
        pause = POLL_SECONDS if segment.find() else MAPS_SECONDS
        if select.select([sys.stdin], [], [], max(0.0, min(left, pause)))[0]:
            if os.read(sys.stdin.fileno(), 1):
                return ""
            is_full = segment.is_short_of_room()
            segment.remove()
            return FULL if is_full else ""
        if agent and time.monotonic() > last_look + POLL_SECONDS:
            last_look = time.monotonic()
            running = _running(agent)
            if len(running) >= local_size:
                last_complete = last_look
            elif last_look > last_complete + ENDED_SECONDS:
                return f"will not start, because {_in_words(running, size, local_size, 'ended before that')}"
        if left <= 0:
            absent = _in_words(_listed(key), size, local_size, "did not come") if sees_all else "not all ranks came"
            return f"has not started within {seconds} s, because {absent}"


def _is_first(key: str) -> bool:
    """Whether no other messenger of this host has spoken; until this process ends, others are told that it has."""
    try:
        claim = answer(key, "speaks")
    except OSError:
        return True
    if claim is not None:
        claim.detach()
    return claim is not None


def main() -> None:
    """Wait, and speak if it was in vain."""
    pid, rank, size, local_size = map(int, sys.argv[1:5])
    seconds, deadline, key, agent, sees_all, way_out = sys.argv[5:]
    why = _reason(size, local_size, seconds, float(deadline), key, int(agent), sees_all == "1", _Segment(pid))
    is_gone = os.getppid() != pid
    if not why or (is_gone and why != FULL) or not _is_first(key):
        return
    sys.stderr.write(f"phalanx: rank {rank} of {size}: MPI {why if why == FULL else f'{why}; {way_out}'}\n")
    sys.stderr.close()
    os.close(2)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGALRM)
    time.sleep(CLAIM_SECONDS)


if __name__ == "__main__":
    main()
