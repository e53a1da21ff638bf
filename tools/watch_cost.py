"""What it costs that ranks watch each other, in processor time, which other work on the machine does not change much.

``make watch-cost`` runs three parts: a rank alone generates, whose steps are the yardstick, as no rank waits for another there; ranks
generate together, and the thread of each that watches says how much processor time it took; a server idles.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_RANKS = 4
NUM_PROMPTS, NEW_TOKENS = 8, 128
STEP_RATE_GOAL, IDLE_GOAL = 0.995, 0.01
"""Least step rate, relative to one without the watch, and most processor of an idle rank."""


def main() -> int:
    """Run all parts and print a table; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    parser.add_argument("--rank-report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_report is not None:
        report_rank(args.rank_report)
        return 0
    alone, together = ranks_that_generate(1)[0], ranks_that_generate(NUM_RANKS)
    stores = max(rank["collectives"] for rank in together) * seconds_of_collective() + seconds_of_step()
    step = alone["processor"] / alone["steps"]
    thread = max(rank["watch"] / rank["seconds"] for rank in together)
    rate = (1 - thread) * step / (step + stores)
    idle = seconds_of_idle_ranks(args.idle_seconds)
    print(f"a step on one rank: {step * 1e3:.2f} ms of processor time")
    print(f"stamps of one step and its collectives, on the rank with most of them: {stores * 1e6:.2f} us")
    print(f"thread that watches, ranks at work: {thread:.4%} of a processor at most")
    print(f"step rate with the watch, relative to one without: {rate:.5f} (goal {STEP_RATE_GOAL})")
    print(
        f"idle server, processor of ranks 0 to {NUM_RANKS - 1}: {', '.join(f'{share:.2%}' for share in idle)} (goal {IDLE_GOAL:.0%})"
    )
    return int(rate < STEP_RATE_GOAL or max(idle) > IDLE_GOAL)


def ranks_that_generate(num_ranks: int) -> list[dict[str, float]]:
    """What `report_rank` says of each rank of a job."""
    with tempfile.TemporaryDirectory() as directory:
        launcher = ["mpirun", "-n", str(num_ranks)] if num_ranks > 1 else []
        command = [*launcher, sys.executable, "-m", "tools.watch_cost", "--rank-report", directory]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [json.loads((Path(directory) / str(rank)).read_text()) for rank in range(num_ranks)]


def report_rank(directory: Path) -> None:
    """Generate, and write how much processor time that and the watch took: of this rank, in seconds, and per step."""
    from phalanx import LLM, SamplingParams
    from phalanx.parallel.launcher import launch_info

    num_ranks = launch_info().size
    with LLM(tensor_parallel_size=min(2, num_ranks), pipeline_parallel_size=max(1, num_ranks // 2)) as llm:
        prompts = [[5 + number, 6] for number in range(NUM_PROMPTS)]
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        llm.generate(prompts[:1], params)
        progress = llm._replica.progress
        before = time.process_time(), seconds_of_watch(), time.monotonic(), progress.step, progress.num_collectives
        llm.generate(prompts, params)
        after = time.process_time(), seconds_of_watch(), time.monotonic(), progress.step, progress.num_collectives
        processor, watch, seconds, steps, collectives = (end - start for start, end in zip(before, after, strict=True))
        report = {
            "processor": processor, "watch": watch, "seconds": seconds, "steps": steps, "collectives": collectives / steps,
        }  # fmt: skip
        (directory / str(launch_info().rank)).write_text(json.dumps(report))


def seconds_of_watch() -> float:
    """Processor time of the thread that watches, so far; 0 on a rank alone, which has none."""
    found = [thread.ident for thread in threading.enumerate() if thread.name == "rank watch"]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in found if ident is not None)


def seconds_of_collective() -> float:
    """What it takes to say in the stamps that a collective begins and ends."""
    from phalanx.parallel.communicator import SelfCommunicator
    from phalanx.parallel.liveness.progress import RankProgress
    from phalanx.parallel.liveness.watched_comm import WatchedCommunicator

    plain = SelfCommunicator()
    watched = WatchedCommunicator(plain, RankProgress())
    return processor_seconds(watched.barrier) - processor_seconds(plain.barrier)


def seconds_of_step() -> float:
    """What it takes to say in the stamps that a step begins and ends."""
    from phalanx.parallel.liveness.progress import RankProgress

    progress = RankProgress()

    def step() -> None:
        progress.begin_step(7)
        progress.end_step(0)

    return processor_seconds(step)


def processor_seconds(call: Callable[[], Any], number: int = 200_000) -> float:
    """Of one call: the best of five rounds."""
    return min(timeit.repeat(call, timer=time.thread_time, number=number, repeat=5)) / number


def seconds_of_idle_ranks(seconds: float) -> list[float]:
    """Share of a processor that each rank of a server takes without requests."""
    command = [
        "mpirun", "-n", str(NUM_RANKS), sys.executable, "-m", "launch.serve", "--tp", "2", "--pp", "2", "--port", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        ranks: list[int] = []
        try:
            while not (line := server.stderr.readline()).startswith("READY"):
                assert line, "the server ended before it was ready"
            ranks = rank_processes(server.pid)
            threading.Event().wait(3.0)  # after the start
            before = [scheduled_seconds(pid) for pid in ranks]
            threading.Event().wait(seconds)
            return [(scheduled_seconds(pid) - start) / seconds for pid, start in zip(ranks, before, strict=True)]
        finally:
            for rank in ranks[:1]:
                os.kill(rank, signal.SIGTERM)
            server.communicate()


def rank_processes(launcher: int) -> list[int]:
    """Process ids of a launcher's ranks, in their order."""
    found = {}
    for pid in descendants(launcher):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        environ = dict(word.split(b"=", 1) for word in words if b"=" in word)
        rank = environ.get(b"OMPI_COMM_WORLD_RANK", environ.get(b"PMI_RANK"))
        if rank is not None and b"launch.serve" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.setdefault(int(rank), pid)
    return [found[rank] for rank in range(NUM_RANKS)]


def descendants(pid: int) -> list[int]:
    """Processes below one, parents first."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [*children, *(below for child in children for below in descendants(child))]


def scheduled_seconds(pid: int) -> float:
    """Processor time of all threads of a process, to the nanosecond (proc(5), schedstat)."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) * 1e-9


if __name__ == "__main__":
    raise SystemExit(main())
