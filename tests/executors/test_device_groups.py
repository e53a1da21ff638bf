"""How groups of GPUs end: NCCL is released once, whatever is called again, and nobody is waited for after `abort`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.parallel import nccl_comm
from phalanx.parallel.communicator import SelfCommunicator
from phalanx.parallel.nccl_comm import NcclCommunicator
from phalanx.runtime.executors.cuda import all_reduce as cuda_all_reduce
from phalanx.runtime.executors.cuda.all_reduce import PeerAllReduce, PeerCommunicator
from tests.support.fake_cupy import install_fake_device

TYPES = ("FLOAT32", "FLOAT16", "BFLOAT16", "INT32", "UINT64", "UINT8")


class Recorder:
    """Takes the place of NCCL's communicator, the shared memory and the host group; writes down who is released how."""

    addresses = (256, 512)
    fails = ""

    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name = calls, name

    def __getattr__(self, method: str) -> Any:
        def call() -> None:
            self._calls.append(f"{self._name}.{method}")
            if self.fails == self._calls[-1]:
                raise RuntimeError("the device failed")

        return call


class Host(SelfCommunicator):
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def close(self) -> None:
        self._calls.append("host.close")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What groups do at their end. NCCL, its memory and the device are fakes."""
    install_fake_device(monkeypatch, tmp_path)
    calls: list[str] = []
    nccl = SimpleNamespace(
        get_unique_id=lambda: bytes(128), NcclCommunicator=lambda *_: Recorder(calls, "nccl"), NcclError=RuntimeError,
        **{f"NCCL_{name}": number for number, name in enumerate(TYPES)},
    )  # fmt: skip
    monkeypatch.setattr(nccl_comm, "_nccl", lambda: nccl)
    monkeypatch.setattr(
        cuda_all_reduce, "open_peer_all_reduce",
        lambda library, host: PeerAllReduce(library, Recorder(calls, "memory"), host.rank, 64),
    )  # fmt: skip
    return calls


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (["close"], ["nccl.destroy"]),
        (["close", "close"], ["nccl.destroy"]),
        (["abort", "abort"], ["nccl.abort"]),
        (["abort", "close"], ["nccl.abort"]),
        (["close", "abort"], ["nccl.destroy"]),
    ],
)
def test_nccl_is_released_once(ends: list[str], expected: list[str], calls: list[str]) -> None:
    group = NcclCommunicator(SelfCommunicator())
    for end in ends:
        getattr(group, end)()
    assert calls == expected


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (["close"], ["memory.close", "nccl.destroy", "host.close"]),
        (["abort", "abort"], ["nccl.abort"]),
        (["abort", "close"], ["nccl.abort", "memory.abandon"]),
        (["abort", "abort", "close"], ["nccl.abort", "memory.abandon"]),
    ],
)
def test_a_group_with_shared_memory_waits_for_nobody_after_abort(
    ends: list[str], expected: list[str], calls: list[str]
) -> None:
    group = PeerCommunicator(SimpleNamespace(), Host(calls))  # type: ignore[arg-type]
    for end in ends:
        getattr(group, end)()
    assert calls == expected
    assert group._peers is not None
    assert bool(group._peers._abort_word[0]) is ("abort" in ends)


def test_a_device_that_failed_keeps_no_rank_from_the_collectives_of_closing(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "fails", "memory.close")
    with pytest.raises(RuntimeError, match="the device failed"):
        PeerCommunicator(SimpleNamespace(), Host(calls)).close()  # type: ignore[arg-type]
    assert calls == ["memory.close", "nccl.destroy", "host.close"]
