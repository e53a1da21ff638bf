"""Models as rows of segments: interpreted between the NumPy executor's operations, they give its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.tensorrt.graph import Graph
from phalanx.runtime.executors.tensorrt.library import TensorRT
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.executors.tensorrt.segments.lowering import write_segment
from phalanx.runtime.executors.tensorrt.segments.plans import digest, profile_sizes, read_plans, write_plans
from phalanx.runtime.executors.tensorrt.segments.program import Between, SegmentCall
from phalanx.runtime.executors.tensorrt.segments.programs import check_segments
from phalanx.runtime.models import find_model
from phalanx.runtime.step import StepPlan, StepResult

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from .interpreter import layer_kind
from .segments import composing_library, segmented_executor
from .steps import plans, prompts, reference_executor, run

Array = np.ndarray[Any, Any]

SHAPE = NetworkShape("float32", max_num_seqs=5, max_model_len=40, max_prefill_tokens=16)
CASES = ("llama-grouped-heads", "gpt2-plain", "gemma-one-kv-head", "llama-biases-llama3-rope", "mistral-window",
         "gpt_neox-parallel", "gptj-plain", "falcon-two-norms", "starcoder2-window", "phi-plain", "qwen2-plain",
         "opt-narrow-norm-last", "nemotron-biases", "mpt-clipped",
         "granite-factors", "qwen2_moe-renormalised-every-second", "phi3-longrope-short")  # fmt: skip
TOLERANCE = 1e-5
"""Of the logits' range, as for whole networks."""


def _steps(vocab_size: int) -> list[StepPlan]:
    token_ids = prompts(vocab_size)
    for tokens in token_ids:
        tokens.extend(np.random.default_rng(3).integers(0, vocab_size, 20).tolist())
    return list(plans(token_ids))


def _run(path: Path, layout: Layout, steps: list[StepPlan]) -> tuple[list[Array], list[StepResult]]:
    library = composing_library()

    def body(comm: Communicator) -> tuple[list[Array], list[StepResult]]:
        topology = Topology(layout, comm.rank)
        executor, programs, runner = segmented_executor(path, topology, SHAPE, comm, library)
        results = run(executor, steps, topology.is_leader)
        assert runner.num_written <= len(programs.segments)
        return getattr(executor, "recorded", []), results

    ranks = run_ranks(layout.world_size, body) if layout.world_size > 1 else [body(SelfCommunicator())]
    return ranks[-layout.tp][0], ranks[0][1]


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, Layout()) for name in CASES), *((name, Layout(tp=2, pp=2)) for name in CASES[:3])],
    ids=lambda value: value if isinstance(value, str) else f"tp{value.tp}pp{value.pp}",
)
def test_segments_give_the_reference_tokens_and_logits(name: str, layout: Layout, tmp_path: Path) -> None:
    path = write_checkpoint(CASES_BY_NAME[name], tmp_path / name)
    steps = _steps(CASES_BY_NAME[name].config["vocab_size"])
    reference = reference_executor(path, SHAPE)
    expected = run(reference, steps)
    logits, results = _run(path, layout, steps)
    assert [one.token_ids.tolist() for one in results] == [one.token_ids.tolist() for one in expected]
    if layout == Layout():  # ranks of a group compare their best tokens, not logits
        found, wanted = np.concatenate(logits), np.concatenate(reference.recorded)
        assert float(np.abs(found - wanted).max() / np.ptp(wanted)) <= TOLERANCE


@pytest.mark.parametrize(("layout", "num_different"), [(Layout(), 3), (Layout(tp=2), 4)], ids=["alone", "tp2"])
def test_segments_are_cut_at_attention_and_sums_and_shared_by_layers(
    layout: Layout, num_different: int, tmp_path: Path
) -> None:
    """A rank alone: one segment from one attention to the next. With sums: three a block."""
    path = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model")

    def body(comm: Communicator) -> list[Any]:
        executor, programs, _ = segmented_executor(path, Topology(layout, comm.rank), SHAPE, comm, composing_library())
        executor.close()
        return [programs, executor._config.num_layers]

    programs, num_layers = (run_ranks(layout.world_size, body) if layout.tp > 1 else [body(SelfCommunicator())])[0]
    steps = programs.blocks.steps
    calls = [step for step in steps if isinstance(step, SegmentCall)]
    between = [step.call.operation for step in steps if isinstance(step, Between)]
    assert len(calls) == (3 * num_layers if layout.tp > 1 else num_layers + 1)
    assert between.count("attention") == num_layers
    assert between.count("all_reduce") == (2 * num_layers if layout.tp > 1 else 0)
    assert len(set(programs.blocks.segments)) == num_different
    assert not any(a == b == SegmentCall for a, b in zip(map(type, steps), map(type, steps[1:]), strict=False))


class NotingTensorRT(TensorRT):
    """Notes what layers are told of their types."""

    told: ClassVar[list[tuple[Any, Any]]] = []

    def keep_type(self, layer: Any, dtype: Any) -> None:
        self.told.append((layer, dtype))


@pytest.mark.parametrize("name", ["llama-grouped-heads", "gpt2-plain"])
def test_every_layer_is_told_the_type_that_a_strongly_typed_network_gives_it(name: str, tmp_path: Path) -> None:
    """TensorRT 8.6 would compute in float32 what it is not told: every product is told float16."""
    path = write_checkpoint(CASES_BY_NAME[name], tmp_path / name)
    composing = composing_library()
    _, programs, _ = segmented_executor(path, Topology(Layout()), SHAPE, SelfCommunicator(), composing)
    library = NotingTensorRT(composing.module, composing.flavour, composing.version)
    library.told.clear()
    builder = library.module.Builder(library.logger(lambda severity, message: None))
    graphs = [Graph(library, library.create_network(builder)) for _ in programs.segments]
    for graph, segment in zip(graphs, programs.segments, strict=True):
        write_segment(graph, segment, np.dtype(np.float16))
    assert all(layer.get_output(0).dtype == dtype for layer, dtype in library.told)
    products = [dtype for layer, dtype in library.told if layer_kind(library.module, layer) == "MATRIX_MULTIPLY"]
    assert len(products) >= 6
    assert set(products) == {library.module.DataType.HALF}


def test_profiles_cover_every_number_of_tokens_once() -> None:
    assert profile_sizes(256, 2048) == (8, 64, 256, 2048)
    assert profile_sizes(5, 16) == (5, 8, 16)
    assert profile_sizes(256, 1) == (1,)


def test_a_file_of_plans_gives_back_what_was_written_and_refuses_damage(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    size = write_plans(path, {"a": b"first", "b": b"second"}, lambda path, content: path.write_bytes(content) and None)
    assert path.stat().st_size == size
    assert read_plans(path, ["b", "a"]) == {"b": b"second", "a": b"first"}
    with pytest.raises(ConfigError, match="damaged or of another model"):
        read_plans(path, ["c"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="it is cut short"):
        read_plans(path, ["b"])


def test_a_digest_is_the_same_in_every_process_and_differs_by_option(tmp_path: Path) -> None:
    path = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path / "model")
    library = composing_library()
    programs = [segmented_executor(path, Topology(Layout()), SHAPE, SelfCommunicator(), library)[1] for _ in range(2)]
    names = [[digest(segment) for segment in one.segments] for one in programs]
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0])


def test_bfloat16_is_refused_with_the_type_to_use_instead() -> None:
    raw = CASES_BY_NAME["llama-grouped-heads"].config
    model = find_model(raw)
    with pytest.raises(ConfigError, match="use --dtype float16"):
        check_segments(model, model.read_config(raw), "bfloat16")
