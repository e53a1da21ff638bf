"""``launch.doctor``: one line a check, with and without mpirun, whatever is missing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.device import Gpu
from phalanx.launch.diagnosis.check import Check, attempt
from phalanx.launch.diagnosis.gpu import gpu_checks
from phalanx.launch.diagnosis.ranks import (
    RankReport,
    collective_checks,
    engine_checks,
    gather_reports,
    merge,
    world_checks,
)
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.parallel.launcher import LaunchInfo
from phalanx.parallel.thread_comm import run_ranks

from .commands import ROOT, needs_mpirun, run


def report(result: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The JSON object, and its checks by name."""
    assert "Traceback" not in result.stderr
    decoded = json.loads(result.stdout)
    return decoded, {check["name"]: check for check in decoded["checks"]}


def test_alone_this_machine_can_run_one_engine() -> None:
    result = run("doctor", "--json")
    decoded, checks = report(result)
    assert (result.returncode, result.stderr, decoded["ok"]) == (0, "", True)
    assert decoded["engines"]["numpy"] is True
    assert checks["ranks"]["detail"].startswith("1 (")
    assert all(check["status"] in ("ok", "warn", "off", "fail") for check in checks.values())
    assert {"Python", "MPI", "GPUs", "TensorRT", "shared memory", "Slurm", "processors", "memory"} <= set(checks)


@needs_mpirun
def test_under_mpirun_one_table_speaks_for_all_ranks() -> None:
    result = run("doctor", ranks=3)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    names = [line[6:].split("  ")[0].strip() for line in lines]
    assert len(names) == len(set(names))
    table = dict(zip(names, lines, strict=True))
    assert "3 started by MPICH, 3 seen by MPI" in table["ranks"]
    assert "3 ranks agree" in table["MPI all-reduce"]
    assert "equal on every rank" in table["versions"]
    assert table["engine numpy"].startswith("ok")


@pytest.mark.parametrize("module", ["numpy", "mpi4py", "msgspec", "cupy", "ml_dtypes"])
def test_a_missing_library_is_a_line_not_a_traceback(module: str) -> None:
    program = f"import sys; sys.modules[{module!r}] = None; from launch.doctor import main; sys.exit(main(['--json']))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    decoded, checks = report(result)
    assert result.returncode == (0 if decoded["ok"] else 1)
    assert decoded["engines"]["numpy"] is (module != "numpy")
    if module == "mpi4py":
        assert (checks["MPI"]["status"], checks["ranks"]["status"]) == ("off", "ok")


def test_a_launcher_of_another_mpi_is_found_out() -> None:
    foreign = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
    if any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK")):
        pytest.skip("inside a launcher already")
    result = run("doctor", "--json", environ=foreign)
    decoded, checks = report(result)
    assert (result.returncode, decoded["ok"]) == (1, False)
    assert "Open MPI started 4 ranks but the MPI library is MPICH" in checks["ranks"]["detail"]
    assert "use the mpirun of this environment" in checks["ranks"]["fix"]


@needs_mpirun
def test_ranks_that_never_answer_are_given_up() -> None:
    result = run("doctor", "--timeout", "0.01", ranks=2)
    assert result.returncode != 0
    assert "within 0.01 s" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_needs_nothing_heavy() -> None:
    program = "import sys, launch.doctor\ntry:\n    launch.doctor.main(['--help'])\nexcept SystemExit as exit_:\n    "
    program += "print(exit_.code, [name for name in ('numpy', 'mpi4py', 'cupy', 'msgspec') if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert result.stdout.splitlines()[-1] == "0 []"


def test_an_error_says_its_way_out_as_the_fix() -> None:
    def probe() -> str:
        raise ConfigError("no MPI library can be loaded; install one: pip install mpich")

    expected = Check("MPI", "fail", "no MPI library can be loaded", "install one: pip install mpich")
    assert attempt("MPI", probe) == expected


def on_ranks(make: Callable[[int], RankReport], size: int = 4) -> list[RankReport]:
    """What every rank sees after the reports went round."""
    seen = run_ranks(size, lambda comm: gather_reports(comm, make(comm.rank)))
    assert all(reports == seen[0] for reports in seen)
    return seen[0]


def rank_report(rank: int, numpy: str = "2.4", gpu: str = "", *checks: Check) -> RankReport:
    return RankReport(f"node{rank // 2}", gpu, {"numpy": numpy}, checks)


def test_equal_results_are_one_line_and_different_ones_name_their_ranks() -> None:
    def one(rank: int) -> RankReport:
        odd = Check("MPI", "fail", "broken" * (20 + rank // 3), "mend")
        return rank_report(rank, "2.4", "", Check("Python", "ok", "3.11"), odd)

    merged = merge(on_ranks(one))
    assert merged[0] == Check("Python", "ok", "3.11")
    assert [check.detail[:14] for check in merged[1:]] == ["[ranks 0-2] br", "[ranks 3] brok"]


def test_different_versions_fail_with_rank_and_host() -> None:
    reports = on_ranks(lambda rank: rank_report(rank, "2.5" if rank == 3 else "2.4"))
    (check,) = [check for check in world_checks(reports) if check.name == "versions"]
    assert (check.status, check.detail) == ("fail", "numpy 2.4 on rank 0 and 2.5 on rank 3 (node1)")


def test_two_ranks_on_one_gpu_are_found_out_and_equal_numbers_on_two_hosts_are_not() -> None:
    def status(buses: str) -> list[tuple[str, str]]:
        reports = on_ranks(lambda rank: rank_report(rank, "2.4", f"0000:{buses[rank]}"))
        return [(check.status, check.detail) for check in world_checks(reports) if check.name == "GPU mapping"]

    pairs = "0 on node0 0000:A, 1 on node0 0000:B, 2 on node1 0000:A, 3 on node1 0000:B"
    assert status("ABAB") == [("ok", f"a GPU for each rank: {pairs}")]
    assert status("ABCC") == [("fail", "ranks 2-3 on node1 share GPU 0000:C")]


def test_a_wrong_sum_is_found_out() -> None:
    class Forgetful:
        rank, size = 0, 2

        def all_reduce(self, array: Any) -> Any:
            return array

    (check,) = collective_checks(Forgetful(), None)  # type: ignore[arg-type]
    assert (check.name, check.status) == ("MPI all-reduce", "fail")
    assert "is 1, not 3" in check.detail


def test_collective_checks_skip_nccl_where_a_rank_has_no_gpu() -> None:
    def names(comm: Communicator) -> list[str]:
        return [check.name for check in collective_checks(comm, 0 if comm.rank else None)]

    assert run_ranks(2, names) == [["MPI all-reduce"]] * 2


OTHER_HOSTS = ("off", "this GPU: the ranks before and after are on other hosts; NCCL sums short messages too")


@pytest.mark.parametrize(
    ("hosts", "reason", "expected"),
    [
        ("AABB", "", [("ok", "2 GPUs of the host write into each other's memory")] * 4),
        ("AABB", "no way", [("off", "2 GPUs of the host: no way; NCCL sums short messages too")] * 4),
        ("ABAB", "", [OTHER_HOSTS] * 4),
        ("AAAB", "", [("ok", "3 GPUs of the host write into each other's memory")] * 3 + [OTHER_HOSTS]),
    ],
)
def test_gpus_share_memory_within_each_host_or_the_reason_is_named(
    hosts: str, reason: str, expected: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = threading.local()
    monkeypatch.setattr("phalanx.parallel.hosts._BOOT_ID", SimpleNamespace(read_text=lambda: thread.host))
    monkeypatch.setattr("phalanx.kernels.probe.probe_all_reduce", lambda host, device: None)

    def probe(host: Communicator, device: int) -> str:
        places = host.all_gather(np.frombuffer(thread.host.encode(), np.uint8))
        assert (places == places[0]).all()
        return reason

    monkeypatch.setattr("phalanx.kernels.probe.probe_peer_memory", probe)

    def last(comm: Communicator) -> tuple[str, str]:
        thread.host = hosts[comm.rank]
        check = collective_checks(comm, comm.rank)[-1]
        assert check.name == "peer memory"
        return check.status, check.detail

    assert run_ranks(4, last) == expected


def test_an_engine_is_ready_only_when_all_that_it_needs_is() -> None:
    fine = [Check(name, "ok", "") for name in ("Python", "packages", "ranks", "GPUs", "kernels", "cuBLASLt")]
    states = [check.status for check in engine_checks([*fine, Check("TensorRT", "off", "")])]
    assert states == ["ok", "ok", "off"]
    broken = [*fine, Check("NCCL all-reduce", "fail", ""), Check("TensorRT", "warn", "")]
    numpy, cuda, tensorrt = engine_checks(broken)
    assert (numpy.status, cuda.status, tensorrt.status) == ("ok", "fail", "fail")
    assert cuda.detail == "not ready: see NCCL all-reduce"


GPU = Gpu(index=0, name="NVIDIA H200", bus_id="0000:0A", compute_capability="90", memory_bytes=141 << 30)


@pytest.fixture
def host_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Check]]:
    """Checks of a pretended host, by name: its GPUs, or what CUDA says instead of any."""

    def checks(*gpus: Gpu, error: str = "", local_rank: int = 0) -> dict[str, Check]:
        def visible() -> tuple[Gpu, ...]:
            if error:
                raise ConfigError(error)
            return gpus

        monkeypatch.setattr("phalanx.kernels.device.driver_is_installed", lambda: True)
        monkeypatch.setattr("phalanx.kernels.device.visible_gpus", visible)
        monkeypatch.setattr("phalanx.kernels.device.peers_out_of_reach", lambda gpus: [(0, 1)] if len(gpus) > 1 else [])
        monkeypatch.setattr("phalanx.kernels.probe.probe_kernel", lambda device: None)
        monkeypatch.setattr("phalanx.kernels.probe.probe_cublaslt", lambda device: (130100 + device, device == 1))
        monkeypatch.setattr("phalanx.parallel.nccl_comm.nccl_version", lambda: "2.32.3")
        found, _ = gpu_checks(LaunchInfo(local_rank=local_rank))
        return {check.name: check for check in found}

    return checks


def test_a_driver_without_cupy_fails_with_what_to_install(host_with: Callable[..., dict[str, Check]]) -> None:
    checks = host_with(error="no GPU can be used (No module named 'cupy'); pip install -e '.[cuda13]'")
    expected = Check("GPUs", "fail", "no GPU can be used (No module named 'cupy')", "pip install -e '.[cuda13]'")
    assert checks == {"GPUs": expected}
    assert [check.status for check in engine_checks([expected])] == ["ok", "fail", "fail"]


def test_a_rank_looks_at_the_gpu_of_its_local_number(host_with: Callable[..., dict[str, Check]]) -> None:
    checks = host_with(GPU, dataclasses.replace(GPU, index=1, bus_id="0000:0B"), local_rank=1)
    assert checks["GPUs"].detail == "2 visible: NVIDIA H200 (141 GiB)"
    assert checks["cuBLASLt"].detail == "version 130101; fp8 blocks are multiplied as codes"
    assert checks["NCCL"].detail == "version 2.32.3"
    assert (checks["peer access"].status, checks["peer access"].detail) == (
        "warn", "1 pair(s) without direct access: 0-1",
    )  # fmt: skip


def test_a_gpu_that_cannot_multiply_blocks_says_what_it_takes(host_with: Callable[..., dict[str, Check]]) -> None:
    detail = "version 130100; fp8 blocks are multiplied as values (as codes on compute capability 9.0, from version 120900 on)"
    assert host_with(GPU)["cuBLASLt"].detail == detail


@pytest.mark.parametrize(("capability", "has_fp8"), [("90", True), ("89", True), ("80", False)])
def test_a_gpu_is_told_which_quantised_weights_it_multiplies(
    host_with: Callable[..., dict[str, Check]], capability: str, has_fp8: bool
) -> None:
    detail = host_with(dataclasses.replace(GPU, compute_capability=capability))["quantisation"].detail
    assert detail.startswith("fp8 and int8 products" if has_fp8 else "int8 products")
    assert ("fp8 products need compute capability 8.9" in detail) == (not has_fp8)


def test_a_gpu_before_ampere_is_too_old(host_with: Callable[..., dict[str, Check]]) -> None:
    old = dataclasses.replace(GPU, name="Tesla T4", compute_capability="75")
    checks = host_with(old)
    assert (checks["compute capability"].status, checks["compute capability"].detail) == ("fail", "7.5 is below 8.0")
    assert checks["kernel compiler"].status == "fail"
    assert "--engine numpy" in checks["kernel compiler"].fix


def test_a_kernel_that_computes_wrong_values_fails(
    host_with: Callable[..., dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(device: int) -> None:
        raise ExecutorError("a kernel gave 3 wrong values of 1048576; the GPU or its driver is faulty")

    host_with(GPU)
    monkeypatch.setattr("phalanx.kernels.probe.probe_kernel", wrong)
    found, own = gpu_checks(LaunchInfo())
    assert own == GPU
    (check,) = [check for check in found if check.name == "kernels"]
    assert (check.status, check.fix) == ("fail", "the GPU or its driver is faulty")
