"""Rules for every test: a failure on one rank ends all ranks; what needs torch or a GPU is skipped where there is none."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings

from phalanx.parallel.launcher import launch_info

ROOT = Path(__file__).resolve().parent.parent

if launch_info().size > 1:
    # Each rank is a pytest of its own; in one folder one would remove old directories while another lists them.
    _root = Path(tempfile.gettempdir()) / f"phalanx-tests-{os.getuid()}-rank{launch_info().rank}"
    _root.mkdir(exist_ok=True)
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(_root)

# Tests start commands some thousand times. Without bytecode files each start would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell's background jobs and nohup ignore Ctrl-C, and so would every process that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests compare rank counts; a BLAS that starts a thread per core in each rank only makes them slow.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# A machine that does other things, too, takes longer for an example than Hypothesis allows.
settings.register_profile("phalanx", deadline=None)
settings.load_profile("phalanx")


def _has_torch() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def _has_gpu() -> bool:
    from phalanx.kernels.device import gpu_is_available

    return gpu_is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip by what this machine lacks, and slow tests unless they are asked for."""
    has_torch, has_gpu = _has_torch(), _has_gpu()
    run_slow = "slow" in (config.getoption("-m") or "")
    for item in items:
        if item.get_closest_marker("torch") and not has_torch:
            item.add_marker(pytest.mark.skip(reason="torch and transformers are not installed"))
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
        if item.get_closest_marker("slow") and not run_slow:
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))


EXPECTED_SKIPS = {
    "slow": "run with -m slow",
    "no class of the oracle's": "families that transformers never took in",
    "--with-mpi": "run by tests/run_mpi.sh on 2, 3, 4 and 8 ranks",
    "no NVIDIA GPU": "run by tests/gpu/run_gpu.sh on a machine with one",
    "cupy": "run by tests/gpu/run_gpu.sh on a machine with a GPU",
    "torch": "installed and run by .ci/run",
    "transformers": "installed and run by .ci/run",
    "TensorRT": "installed and run by .ci/run",
    "tensorrt": "installed and run by .ci/run",
    "sentencepiece": "installed and run by .ci/run",
    "tiktoken": "installed and run by .ci/run",
    "network namespaces": "needs root and iproute2",
    "mount namespaces": "needs root",
    "Open MPI": "run by .ci/run with Open MPI",
    "Slurm": "installed and run by .ci/run as root",
    "GPU": "of machines with another number of GPUs",
}
"""Words of a reason, and what runs such a test. A skip for another reason is one to look at."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end what was skipped and whether that is expected."""
    counts: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        known = next(
            (f"expected, {way}" for word, way in EXPECTED_SKIPS.items() if word in reason), f"NOT EXPECTED: {reason}"
        )
        counts[known] = counts.get(known, 0) + 1
    for known, count in sorted(counts.items()):
        terminalreporter.write_line(f"skipped {count}: {known}")


def pytest_exception_interact(node: pytest.Item, call: pytest.CallInfo[object], report: pytest.TestReport) -> None:
    """Under mpirun, end every rank on the first failure: the others would wait for this one forever."""
    from phalanx.parallel.mpi_comm import abort_world

    info = launch_info()
    if info.size > 1 and getattr(report, "failed", True):
        sys.stderr.write(f"\nrank {info.rank}: {node.nodeid} failed\n{report.longreprtext}\n")
        sys.stderr.flush()
        time.sleep(0.5)  # MPICH's launcher kills its ranks without having read what they wrote
        abort_world(1)
