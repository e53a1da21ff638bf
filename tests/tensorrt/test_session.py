"""The device session as it is, over a stand-in for the device: shapes, addresses, copies and hand-over decide the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.errors import ConfigError, ExecutorError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.tensorrt import buffers as trt_buffers
from phalanx.runtime.executors.tensorrt.executor import TrtExecutor
from phalanx.runtime.executors.tensorrt.log import BuildLog
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.executors.tensorrt.session import DeviceSession, LoadedEngine, SessionGroups
from phalanx.runtime.step import StepResult

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from .devices import HostGroup, InterpretedEngine, Stream, replace_device
from .networks import write_rank_network
from .steps import NUM_DECODE_STEPS, plans, prompts, reference_executor, run

SHAPE = NetworkShape("float32", max_num_seqs=5, max_model_len=40, max_prefill_tokens=8)


def _open(path: Path, topology: Topology, comm: Communicator) -> tuple[DeviceSession, InterpretedEngine, Communicator]:
    tensor_group, pipeline = comm.split(topology.tp_group), comm.split(topology.pp_group)
    written = write_rank_network(path, topology, SHAPE)
    engine = InterpretedEngine(written, tensor_group)
    loaded = LoadedEngine(written.library, BuildLog(), None, None, engine)
    groups = SessionGroups(HostGroup(tensor_group), HostGroup(pipeline))  # type: ignore[arg-type]
    session = DeviceSession(
        loaded, written.request.model, written.request.config, topology, SHAPE, groups, Stream(), Stream()
    )
    return session, engine, pipeline


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=["one-rank", "tp2pp2"])
def test_steps_through_device_memory_give_the_reference_tokens(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_device(monkeypatch)
    path = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model")
    token_ids = prompts(101)
    for tokens in token_ids:
        tokens.extend(np.random.default_rng(3).integers(0, 101, NUM_DECODE_STEPS + 2).tolist())
    steps = list(plans(token_ids))

    def body(comm: Communicator) -> list[StepResult]:
        topology = Topology(layout, comm.rank)
        session, engine, pipeline = _open(path, topology, comm)
        executor = TrtExecutor(session, SHAPE, topology, pipeline)
        results = run(executor, steps, topology.is_leader)
        assert len(engine.contexts) == 5  # 1, 2, 4 and 5 decoding slots, and prefill
        assert all((context.communicator is not None) == (layout.tp > 1) for context in engine.contexts)
        executor.close()
        return results

    found = run_ranks(layout.world_size, body)[0] if layout.world_size > 1 else body(SelfCommunicator())
    expected = run(reference_executor(path, SHAPE), steps)
    assert [one.token_ids.tolist() for one in found] == [one.token_ids.tolist() for one in expected]


def test_closing_releases_contexts_before_the_engine_and_groups_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_device(monkeypatch)
    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    session, _, _ = _open(path, Topology(Layout()), SelfCommunicator())
    loaded, groups = session._loaded, session._groups
    session.close()
    assert loaded.engine is None
    assert loaded.runtime is None
    assert groups.tensor.closed  # type: ignore[attr-defined]
    assert groups.stages.closed  # type: ignore[attr-defined]


def test_refused_shape_or_execution_is_an_executor_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_device(monkeypatch)
    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    session, engine, _ = _open(path, Topology(Layout()), SelfCommunicator())
    with pytest.raises(ExecutorError, match=r"TensorRT refused shape \(1, 9\) of positions"):
        session._set_shapes(session._prefill, 1, 9, 1)
    monkeypatch.setattr(type(engine.contexts[0]), "execute_async_v3", lambda context, stream: False)
    with pytest.raises(ExecutorError, match="TensorRT refused to start a pass: it gave no reason"):
        session._execute(engine.contexts[0])


def test_memory_that_does_not_suffice_says_what_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_device(monkeypatch)

    def no_memory(num_bytes: int) -> None:
        raise ConfigError("there is none")

    monkeypatch.setattr(trt_buffers, "Arena", no_memory)
    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    with pytest.raises(ConfigError, match=r"5 slots of 128 tokens .* need 0\.00 GB .*smaller --max-num-seqs"):
        _open(path, Topology(Layout()), SelfCommunicator())


def test_contexts_share_compiled_kernels_and_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding contexts, which are captured, compile for their shape at once."""
    replace_device(monkeypatch)
    path = write_checkpoint(CASES_BY_NAME["gpt2-plain"], tmp_path / "model")
    written = write_rank_network(path, Topology(Layout()), SHAPE)
    engine, library = InterpretedEngine(written, SelfCommunicator()), written.library
    loaded = LoadedEngine(library, BuildLog(), None, None, engine)
    loaded.kernel_cache, loaded.kernel_path = library.create_kernel_cache(engine, b"kept"), tmp_path / "x.kernels"
    groups = SessionGroups(HostGroup(SelfCommunicator()), HostGroup(SelfCommunicator()))  # type: ignore[arg-type]
    session = DeviceSession(
        loaded, written.request.model, written.request.config, Topology(Layout()), SHAPE, groups, Stream(), Stream()
    )
    configs = [context.config for context in engine.contexts]
    assert all(config is not None and config.cache is loaded.kernel_cache for config in configs)
    strategies = [config.dynamic_shapes_kernel_specialization_strategy for config in configs if config is not None]
    assert [strategy is not None and strategy.name for strategy in strategies] == ["EAGER"] * 4 + [False]
    session.close()
    assert (tmp_path / "x.kernels").read_bytes() == b"kept."
