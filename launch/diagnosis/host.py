# SPDX-License-Identifier: Apache-2.0
"""Checks of one process and its host that need no GPU and no other rank."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from phalanx.launch.diagnosis.check import Check, attempt
from phalanx.parallel.launcher import LaunchInfo

__all__ = ["host_checks", "package_versions"]

OLDEST_PYTHON = (3, 11)
SHARED_BYTES_PER_RANK = 64 << 20
"""What MPI and NCCL take of /dev/shm for one rank, generously; Docker gives 64 MiB to all of them."""
BYTES_PER_RANK = 1 << 30
_INSTALL = "pip install -e . in Phalanx's checkout"
_BASE = (
    "mpi4py", "numpy", "ml_dtypes", "msgspec", "tokenizers", "jinja2", "starlette", "uvicorn", "h11",
    "prometheus-client", "rich",
)  # fmt: skip
_OPTIONAL = (
    "phalanx-llm", "cupy-cuda13x", "cupy-cuda12x", "nvmath-python", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "tensorrt", "tensorrt-bindings",
    "tensorrt-rtx-cu13-bindings",
)  # fmt: skip


def host_checks(info: LaunchInfo) -> list[Check]:
    """Everything about this process and, from the first rank on it, about its host."""
    checks = [_python(), _packages(), _slurm(os.environ)]
    if info.local_rank == 0:
        checks += [
            attempt("launcher", lambda: _launcher(info)),
            attempt("processors", lambda: _processors(info)),
            attempt("memory", lambda: _memory(info)),
            attempt("shared memory", lambda: _shared_memory(info), otherwise="warn"),
            attempt(
                "cache directory", _cache, otherwise="warn", fix="set PHALANX_CACHE_DIR to a directory you may write"
            ),
        ]
    return checks


def package_versions() -> dict[str, str]:
    """Python and every package that can change a result, as far as installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in (*_BASE, *_OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _python() -> Check:
    text = f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Check("Python", "fail", text, f"use Python {'.'.join(map(str, OLDEST_PYTHON))} or later")
    return Check("Python", "ok", text)


def _packages() -> Check:
    found = package_versions()
    if missing := [name for name in _BASE if name not in found]:
        return Check("packages", "fail", f"not installed: {', '.join(missing)}", _INSTALL)
    return Check("packages", "ok", ", ".join(f"{name} {found[name]}" for name in ("numpy", "mpi4py", "msgspec")))


def _launcher(info: LaunchInfo) -> str | Check:
    path = shutil.which("mpirun")
    if path is None:
        if info.launcher is not None:
            return f"{info.launcher} (no mpirun on PATH)"
        return Check(
            "launcher", "off", "no mpirun on PATH: one rank only", "pip install mpich, or load your site's MPI module"
        )
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    kind = "Open MPI" if "open" in answer.lower() else "MPICH" if "hydra" in answer.lower() else "unknown"
    return f"{info.launcher or 'none (started by hand)'}; mpirun is {path} ({kind})"


def _processors(info: LaunchInfo) -> str | Check:
    cores = len(os.sched_getaffinity(0))
    text = f"{cores} core(s) for {info.local_size} rank(s) on this host"
    if info.local_size <= cores:
        return text
    return Check(
        "processors", "warn", f"{text}: ranks wait for each other", "start fewer ranks, or ask for more cores per task"
    )


def _memory(info: LaunchInfo) -> str | Check:
    available = _available_bytes()
    text = f"{_gib(available)} available for {info.local_size} rank(s) on this host"
    if available >= BYTES_PER_RANK * info.local_size:
        return text
    return Check("memory", "warn", f"{text}: below 1 GiB a rank", "start fewer ranks, or ask for more memory")


def _available_bytes() -> int:
    """The smaller of what the host has left and what the control group allows."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = (_cgroup_bytes(name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else min(available, limit - used)


def _cgroup_bytes(name: str) -> int | None:
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):  # no cgroup v2 here, or no limit ("max")
        return None


def _shared_memory(info: LaunchInfo) -> str | Check:
    usage = shutil.disk_usage("/dev/shm")
    text = f"/dev/shm has {_gib(usage.free)} free of {_gib(usage.total)}"
    if usage.free >= SHARED_BYTES_PER_RANK * info.local_size:
        return text
    return Check(
        "shared memory", "warn", f"{text}, less than 64 MiB a rank",
        "docker run --shm-size=8g or --ipc=host; otherwise mount -o remount,size=8G /dev/shm",
    )  # fmt: skip


def _cache() -> str:
    from phalanx.kernels.compiler import cache_directory

    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".doctor-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()
    return f"{directory} can be written"


def _slurm(environ: Mapping[str, str]) -> Check:
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return Check("Slurm", "off", "not inside a Slurm job")
    text = ", ".join(
        f"{label} {environ[name]}"
        for label, name in (("job", "SLURM_JOB_ID"), ("step", "SLURM_STEP_ID"), ("nodes", "SLURM_NNODES"),
                            ("tasks", "SLURM_NTASKS"), ("tasks per node", "SLURM_STEP_TASKS_PER_NODE"),
                            ("restarts", "SLURM_RESTART_COUNT"))
        if name in environ
    )  # fmt: skip
    if "SLURM_GPUS_PER_TASK" in environ or "SLURM_TRES_PER_TASK" in environ:
        return Check(
            "Slurm", "warn", f"{text}: GPUs are bound to tasks, which keeps NCCL off NVLink",
            "ask for --gpus-per-node instead of --gpus-per-task and leave --gpu-bind out",
        )  # fmt: skip
    return Check("Slurm", "ok", text)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
