# SPDX-License-Identifier: Apache-2.0
"""Checks that need all ranks, and one report made of all of theirs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from phalanx.launch.diagnosis.check import Check, Status, attempt
from phalanx.parallel.launcher import LaunchInfo

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator

__all__ = ["RankReport", "collective_checks", "engine_checks", "gather_reports", "join_ranks", "merge", "world_checks"]


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank found.

    Attributes:
        gpu: bus number of the GPU that this rank would use; empty = none.
    """

    host: str
    gpu: str
    versions: dict[str, str]
    checks: tuple[Check, ...]


def join_ranks(info: LaunchInfo) -> tuple[Communicator | None, list[Check]]:
    """The job's ranks, and whether MPI could be had; None where not even a group of one can be made (no NumPy)."""
    found: list[Communicator] = []

    def ranks() -> str:
        from phalanx.parallel.mpi_comm import world_communicator

        found.append(world_communicator())
        if info.launcher is None:
            return "1 (started by hand; mpirun -n N starts more)"
        return f"{found[0].size} started by {info.launcher}, {found[0].size} seen by MPI"

    joined = attempt("ranks", ranks)
    library = attempt("MPI", _mpi_library, "fail" if info.size > 1 else "off")
    return (found[0] if found else None), [library, joined]


def _mpi_library() -> str:
    from phalanx.parallel.mpi_comm import mpi_library

    library = mpi_library()
    return f"{library.vendor}, MPI {library.standard}, {library.path}"


def collective_checks(world: Communicator, device: int | None) -> list[Check]:
    """All-reduces over all ranks, on GPUs where every rank has one (``device`` is this rank's). *Collective.*"""
    import numpy as np

    if world.size == 1:
        return []
    checks = [attempt("MPI all-reduce", lambda: _host_all_reduce(world))]
    num_devices = int(world.all_reduce(np.array([int(device is not None)]))[0])
    if device is not None and num_devices == world.size:
        checks.append(
            attempt(
                "NCCL all-reduce", lambda: _device_all_reduce(world, device), fix="set NCCL_DEBUG=WARN and run again"
            )
        )
        checks.append(attempt("peer memory", lambda: _peer_memory(world, device), "warn"))
    return checks


def _host_all_reduce(world: Communicator) -> str:
    import numpy as np

    from phalanx.parallel.errors import CommunicatorError

    total = world.all_reduce(np.full(1000, world.rank + 1, np.float64))
    expected = world.size * (world.size + 1) / 2
    if not (total == expected).all():
        raise CommunicatorError(f"the sum over {world.size} ranks is {total[0]:g}, not {expected:g}; reinstall MPI")
    return f"{world.size} ranks agree"


def _device_all_reduce(world: Communicator, device: int) -> str:
    from phalanx.kernels.probe import probe_all_reduce

    probe_all_reduce(world, device)
    return f"{world.size} GPUs agree"


def _peer_memory(world: Communicator, device: int) -> Check:
    """Among the ranks of each host, where tensor-parallel groups are."""
    from phalanx.kernels.peer_memory import neighbours
    from phalanx.kernels.probe import probe_peer_memory

    host = world.split(neighbours(world))
    try:
        reason = probe_peer_memory(host, device) if host.size > 1 else "the ranks before and after are on other hosts"
    finally:
        host.close()
    who = f"{host.size} GPUs of the host" if host.size > 1 else "this GPU"
    if reason:
        return Check("peer memory", "off", f"{who}: {reason}; NCCL sums short messages too")
    return Check("peer memory", "ok", f"{who} write into each other's memory")


def gather_reports(world: Communicator, report: RankReport) -> list[RankReport]:
    """Gather the reports of all ranks, by rank. *Collective.*"""
    from phalanx.parallel.communicator import gather_bytes

    return [_decode(row) for row in gather_bytes(world, json.dumps(asdict(report)).encode())]


def _decode(data: bytes) -> RankReport:
    fields: dict[str, Any] = json.loads(data)
    return RankReport(**{**fields, "checks": tuple(Check(**check) for check in fields["checks"])})


def world_checks(reports: Sequence[RankReport]) -> list[Check]:
    """What only shows when reports are compared."""
    hosts = Counter(report.host for report in reports)
    checks = [Check("hosts", "ok", ", ".join(f"{host}: {count} rank(s)" for host, count in hosts.items()))]
    if len(reports) > 1:
        checks.append(_equal_versions(reports))
    if all(report.gpu for report in reports):
        checks.append(_mapping(reports))
    return checks


def _equal_versions(reports: Sequence[RankReport]) -> Check:
    digests = {
        hashlib.sha256(json.dumps(report.versions, sort_keys=True).encode()).hexdigest()[:12] for report in reports
    }
    if len(digests) == 1:
        return Check("versions", "ok", f"equal on every rank ({digests.pop()})")
    names = sorted({name for report in reports for name in report.versions})
    different = []
    for name in names:
        values = [report.versions.get(name, "none") for report in reports]
        if odd := next((rank for rank, value in enumerate(values) if value != values[0]), None):
            different.append(f"{name} {values[0]} on rank 0 and {values[odd]} on rank {odd} ({reports[odd].host})")
    return Check("versions", "fail", "; ".join(different), "install the same environment on every host")


def _mapping(reports: Sequence[RankReport]) -> Check:
    users = Counter((report.host, report.gpu) for report in reports)
    shared = next((place for place, count in users.items() if count > 1), None)
    if shared is None:
        pairs = (f"{rank} on {report.host} {report.gpu}" for rank, report in enumerate(reports))
        return Check("GPU mapping", "ok", f"a GPU for each rank: {', '.join(pairs)}")
    host, gpu = shared
    ranks = [rank for rank, report in enumerate(reports) if (report.host, report.gpu) == shared]
    return Check(
        "GPU mapping", "fail", f"ranks {_ranges(ranks)} on {host} share GPU {gpu}",
        "start at most as many ranks on a host as it has GPUs, and let every rank see all of them",
    )  # fmt: skip


def merge(reports: Sequence[RankReport]) -> list[Check]:
    """One check for all ranks that found the same; where those that looked differ, each says which ranks it is about."""
    merged: list[Check] = []
    names = dict.fromkeys(check.name for report in reports for check in report.checks)
    for name in names:
        groups: dict[Check, list[int]] = {}
        for rank, report in enumerate(reports):
            for check in report.checks:
                if check.name == name:
                    groups.setdefault(check, []).append(rank)
        for check, ranks in groups.items():
            where = f"[ranks {_ranges(ranks)}] " if len(groups) > 1 else ""
            merged.append(Check(name, check.status, f"{where}{check.detail}", check.fix))
    return merged


def engine_checks(checks: Sequence[Check]) -> list[Check]:
    """For each engine, whether everything that it needs works."""
    from phalanx.runtime.executors.registry import ENGINES

    return [
        _engine(engine, [check for check in checks if check.name in entry.checks]) for engine, entry in ENGINES.items()
    ]


def _engine(engine: str, needed: Sequence[Check]) -> Check:
    missing = {check.name: check.status for check in needed if check.status in ("off", "fail")}
    if not missing:
        return Check(f"engine {engine}", "ok", "ready")
    status: Status = "fail" if "fail" in missing.values() else "off"
    return Check(f"engine {engine}", status, f"not ready: see {', '.join(missing)}")


def _ranges(ranks: Sequence[int]) -> str:
    """``0-3, 6`` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
