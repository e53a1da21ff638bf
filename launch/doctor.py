# SPDX-License-Identifier: Apache-2.0
"""``python -m launch.doctor``: what works on this machine or allocation, with a fix for each failure."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from phalanx.launch.arguments import CommandParser, run_command
from phalanx.launch.settings import Settings
from phalanx.parallel.launcher import LaunchInfo, launch_info
from phalanx.parallel.mpi_start import START_SECONDS_VARIABLE

if TYPE_CHECKING:
    from phalanx.launch.diagnosis.check import Check

__all__ = ["diagnose", "main"]


MOST_SECONDS = 1e6
"""What timers of the system can take is more, and longer than anybody waits."""


def build_parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        prog="launch.doctor",
        description="What works here, one line a check, with a fix for each failure. Start it the way you will start "
        "the server (mpirun, srun) to check all ranks. Exit status 0 when at least one engine is ready, 1 when none is.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="give up when ranks do not answer within this time (default: 120)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, the same on every rank."""
    parser = build_parser()
    args = parser.parse_settings(Settings.read(sys.argv[1:] if argv is None else argv, parser.command))
    if not 0 < args.timeout < MOST_SECONDS:
        parser.error(
            f"--timeout={args.timeout:g} is out of range; use seconds above 0 and below {MOST_SECONDS:g}, for example 120"
        )
    os.environ[START_SECONDS_VARIABLE] = str(args.timeout)
    watchdog = threading.Timer(args.timeout, _give_up, [args.timeout])
    watchdog.daemon = True
    watchdog.start()
    info = launch_info()
    checks = diagnose(info)
    watchdog.cancel()
    engines = {
        check.name.removeprefix("engine "): check.status == "ok" for check in checks if check.name.startswith("engine ")
    }
    status = 0 if any(engines.values()) else 1
    if info.rank == 0:
        report = {"ok": not status, "engines": engines, "checks": [asdict(check) for check in checks]}
        print(json.dumps(report) if args.json else _table(checks))
    return status


def diagnose(info: LaunchInfo) -> list[Check]:
    """Every check, engines last, over all ranks that could be reached. *Collective.*"""
    from phalanx.launch.diagnosis.gpu import gpu_checks, tensorrt_check
    from phalanx.launch.diagnosis.host import host_checks, package_versions
    from phalanx.launch.diagnosis.ranks import (
        RankReport,
        collective_checks,
        engine_checks,
        gather_reports,
        join_ranks,
        merge,
        world_checks,
    )  # fmt: skip

    world, joined = join_ranks(info)
    on_gpu, gpu = gpu_checks(info)
    checks = [*host_checks(info), *joined, *on_gpu, tensorrt_check()]
    if world is not None:
        checks += collective_checks(world, None if gpu is None else gpu.index)
    report = RankReport(socket.gethostname(), "" if gpu is None else gpu.bus_id, package_versions(), tuple(checks))
    reports = [report] if world is None else gather_reports(world, report)
    merged = [*merge(reports), *world_checks(reports)]
    return [*merged, *engine_checks(merged)]


def _table(checks: Sequence[Check]) -> str:
    width = max(len(check.name) for check in checks)
    return "\n".join(
        f"{check.status:<4}  {check.name:<{width}}  {check.detail}" + (f"  -> {check.fix}" if check.fix else "")
        for check in checks
    )


def _give_up(seconds: float) -> None:
    """Runs in a thread while the main one waits for a rank or a library that does not answer."""
    sys.stderr.write(
        f"phalanx doctor: rank {launch_info().rank}: no answer within {seconds:g} s; a rank or a driver hangs: try fewer "
        "ranks, one host, or a longer --timeout\n"
    )
    sys.stderr.flush()
    try:
        from phalanx.parallel.mpi_comm import abort_world

        abort_world(1)
    finally:  # even where the main thread is in the middle of importing or starting the same
        os._exit(1)


if __name__ == "__main__":
    run_command(main)
