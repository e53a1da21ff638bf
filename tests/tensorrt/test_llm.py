"""The TensorRT executor behind scheduler, slots and engine: only the device is replaced."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

from phalanx import LLM, SamplingParams
from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.executors.tensorrt import build as trt_build
from phalanx.runtime.executors.tensorrt.builder import network_shape
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.network import NetworkShape

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from .networks import InterpretedSession, write_rank_network

LIMITS = {"max_num_seqs": 3, "max_model_len": 48, "max_num_batched_tokens": 12}


def _interpret(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let the executor open a session that interprets its network."""

    def open_session(spec: RankSpec, library: TensorRT) -> tuple[InterpretedSession, NetworkShape]:
        topology = spec.topology
        shape = network_shape(spec.config, spec.options.dtype, LIMITS["max_num_seqs"], LIMITS["max_model_len"], 5)
        groups = spec.comm.split(topology.tp_group), spec.comm.split(topology.pp_group)
        return InterpretedSession(write_rank_network(path, topology, shape), topology, *groups), shape

    monkeypatch.setattr(trt_build, "open_session", open_session)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=["one-rank", "tp2pp2"])
def test_requests_that_come_and_go_get_the_numpy_engines_tokens(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven prompts through three slots, prefill in chunks, greedy and sampled: each as the NumPy engine continues it."""
    path = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model")
    _interpret(monkeypatch, path)
    random = np.random.default_rng(5)
    prompts = [random.integers(3, 101, length).tolist() for length in (7, 1, 20, 3, 13, 2, 9)]
    params = [
        SamplingParams(max_tokens=9, temperature=0.9 if index % 2 else 0.0, seed=index, logprobs=2)
        for index in range(len(prompts))
    ]
    params[::3] = [
        dataclasses.replace(one, min_tokens=6, stop_token_ids=tuple(range(3, 60)), logprobs=None) for one in params[::3]
    ]
    params[1::3] = [
        dataclasses.replace(
            one, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, bad_token_ids=((3, 4), (7,))
        )
        for one in params[1::3]
    ]

    params[2::3] = [dataclasses.replace(one, allowed_token_ids=tuple(range(0, 101, 7))) for one in params[2::3]]

    def body(engine: str, comm: Communicator) -> list[tuple[list[int], str | None]]:
        sizes = {"tensor_parallel_size": layout.tp, "pipeline_parallel_size": layout.pp} if comm.size > 1 else {}
        with LLM(path, comm=comm, engine=engine, **sizes, **LIMITS) as llm:
            outputs = llm.generate(prompts, params)
        return [(list(output.token_ids), output.finish_reason) for output in outputs]

    expected = body("numpy", SelfCommunicator())
    if layout.world_size > 1:
        found = run_ranks(layout.world_size, lambda comm: body("tensorrt", comm))
    else:
        found = [body("tensorrt", SelfCommunicator())]
    assert all(rank == expected for rank in found)


def test_engines_larger_than_what_is_asked_for_serve_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model")
    _interpret(monkeypatch, path)
    with LLM(path, comm=SelfCommunicator(), engine="tensorrt", max_num_seqs=2, max_model_len=20) as llm:
        assert llm.max_model_len == 20
        (output,) = llm.generate([[3, 4, 5]], SamplingParams(max_tokens=17, temperature=0.0, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (17, "length")
