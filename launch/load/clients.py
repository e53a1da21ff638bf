# SPDX-License-Identifier: Apache-2.0
"""Starts the client processes of ``launch.bench serve``, together, and gathers what they report."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from phalanx.launch.children import same_code
from phalanx.launch.load.messages import Answer, Answers, ClientMessage, Load, Ready, Tokens
from phalanx.parallel.errors import CommunicatorError

__all__ = ["run_clients"]

COMMAND = (sys.executable, "-P", "-m", "launch.load_client")
START_SECONDS = 0.2
"""From the moment that all clients are ready to their common start."""

_decode = msgspec.json.Decoder(ClientMessage).decode


def run_clients(loads: Sequence[Load], on_tokens: Callable[[int], None]) -> tuple[list[Answer], float]:
    """All answers, and the time of the start (`time.monotonic`). ``on_tokens`` is told of tokens as they come, one call at a time.

    Raises:
        CommunicatorError: a client ended without its answers.
    """
    with _started(loads) as processes:
        for process in processes:
            _expect(process, Ready)
        start = time.monotonic() + START_SECONDS
        for process in processes:
            _write(process, msgspec.json.encode(start))
        return _gather(processes, on_tokens), start


@contextlib.contextmanager
def _started(loads: Sequence[Load]) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for load in loads:
            processes.append(subprocess.Popen(COMMAND, env=same_code(), stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            _write(processes[-1], msgspec.json.encode(load))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()


def _expect(process: subprocess.Popen[bytes], kind: type[ClientMessage]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line or not isinstance(_decode(line), kind):
        raise _gone(process)


def _gather(processes: Sequence[subprocess.Popen[bytes]], on_tokens: Callable[[int], None]) -> list[Answer]:
    answers: list[Answer] = []
    finished: set[int] = set()
    lock = threading.Lock()

    def read(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with lock:
                match _decode(line):
                    case Tokens(count):
                        on_tokens(count)
                    case Answers(given):
                        answers.extend(given)
                        finished.add(process.pid)

    readers = [threading.Thread(target=read, args=(process,)) for process in processes]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for process in processes:
        if process.pid not in finished:
            raise _gone(process)
    return answers


def _gone(process: subprocess.Popen[bytes]) -> CommunicatorError:
    return CommunicatorError(f"client process {process.pid} ended early; see its message above, then start again")
