"""The numbers of a built network, without a GPU: interpreted, they are the NumPy executor's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

from phalanx.parallel.communicator import Communicator, SelfCommunicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.tensorrt.network import NetworkShape
from phalanx.runtime.step import StepPlan, StepResult

from ..support.checkpoints import CASES_BY_NAME, write_checkpoint
from .interpreter import layer_kind
from .networks import Disturbance, interpreted_executor, write_rank_network
from .steps import NUM_DECODE_STEPS, PROMPT_LENGTHS, plans, prompts, reference_executor, run

Array = np.ndarray[Any, Any]

LAYOUTS = (Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2))
FAMILIES = ("llama-grouped-heads", "gpt2-plain", "gemma-one-kv-head")
OTHERS = ("llama-biases-llama3-rope", "llama-yarn-rope", "llama-one-kv-head-tied", "gpt2-untied-odd-width",
          "gemma-several-kv-heads", "mistral-window", "gpt_neox-parallel", "gpt_neox-serial-no-bias", "gptj-plain",
          "gptj-all-rotary", "opt-narrow-norm-last", "falcon-two-norms", "gpt_bigcode-one-kv-head",
          "starcoder2-window", "phi-plain", "qwen2-plain", "phi3-window", "internlm2-plain", "glm-plain", "glm4-plain",
          "chatglm-own-keys", "qwen-plain", "smollm3-plain", "baichuan-7b", "cohere-plain", "cohere2-windows", "nemotron-plain",
          "granite-factors", "megatron-rope", "stablelm-serial", "stablelm-parallel")  # fmt: skip
SHAPE = NetworkShape("float32", max_num_seqs=5, max_model_len=40, max_prefill_tokens=8)

TOLERANCE = 1e-5
"""Of the logits' range. The largest seen over all cases and layouts is 3.8e-6 (a Gemma with one key/value head)."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: write_checkpoint(CASES_BY_NAME[name], tmp_path / name)


def interpreted(
    path: Path, layout: Layout, steps: list[StepPlan], shape: NetworkShape = SHAPE, disturb: Disturbance | None = None
) -> tuple[list[Array], list[StepResult]]:
    """Logits of every pass on the first rank of the last stage, and the leader's results."""

    def body(comm: Communicator) -> tuple[list[Array], list[StepResult]]:
        topology = Topology(layout, comm.rank)
        executor, session = interpreted_executor(path, topology, shape, comm, disturb)
        return session.logits, run(executor, steps, topology.is_leader)

    ranks = run_ranks(layout.world_size, body) if layout.world_size > 1 else [body(SelfCommunicator())]
    return ranks[-layout.tp][0], ranks[0][1]


def reference(
    path: Path, vocab_size: int, rounding: str | None = None
) -> tuple[list[StepPlan], list[Array], list[StepResult]]:
    """Steps of greedy decoding by the NumPy executor, its logits and results."""
    executor = reference_executor(path, SHAPE, rounding)
    token_ids = prompts(vocab_size)
    for tokens in token_ids:
        tokens.extend([0] * (NUM_DECODE_STEPS + 2))
    steps, results = [], []
    for plan in plans(token_ids):  # a generator: it sees the tokens that the steps before it put in
        steps.append(plan)
        results += run(executor, [plan])
        for seq_index, end, token in zip(
            plan.seq_indices[plan.sampling_seqs],
            plan.sampled_positions,
            results[-1].token_ids,
            strict=True,
        ):
            token_ids[{4: 0, 0: 1, 2: 2}[int(seq_index)]][int(end)] = int(token)
    return steps, executor.recorded, results


def difference(found: list[Array], expected: list[Array]) -> float:
    """Largest difference relative to the range of the logits."""
    a, b = np.concatenate(found), np.concatenate(expected)
    assert a.shape == b.shape
    assert len(a) >= NUM_DECODE_STEPS * len(PROMPT_LENGTHS)
    return float(np.abs(a - b).max() / np.ptp(b))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout.tp}pp{layout.pp}")
@pytest.mark.parametrize("name", FAMILIES)
def test_interpreted_network_gives_the_reference_logits(
    name: str, layout: Layout, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint(name)
    steps, expected, expected_results = reference(path, CASES_BY_NAME[name].config["vocab_size"])
    logits, results = interpreted(path, layout, steps)
    assert difference(logits, expected) <= TOLERANCE
    assert [result.token_ids.tolist() for result in results] == [
        result.token_ids.tolist() for result in expected_results
    ]


@pytest.mark.parametrize("name", OTHERS)
def test_every_feature_of_a_family_is_lowered(name: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(name)
    steps, expected, _ = reference(path, CASES_BY_NAME[name].config["vocab_size"])
    assert difference(interpreted(path, Layout(tp=2), steps)[0], expected) <= TOLERANCE


@pytest.mark.parametrize(("name", "tp"), [("llama-grouped-heads", 3), ("falcon-one-norm", 2)])
def test_ranks_with_more_heads_than_others_give_the_reference_logits(
    name: str, tp: int, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint(name)
    steps, expected, _ = reference(path, CASES_BY_NAME[name].config["vocab_size"])
    assert difference(interpreted(path, Layout(tp=tp), steps)[0], expected) <= TOLERANCE


def test_float16_network_holds_rounded_weights_and_the_same_graph(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama-grouped-heads")
    steps, expected, _ = reference(path, 101, rounding="F16")
    half = NetworkShape("float16", SHAPE.max_num_seqs, SHAPE.max_model_len, SHAPE.max_prefill_tokens)
    assert difference(interpreted(path, Layout(tp=2), steps, half)[0], expected) <= TOLERANCE


def _graph(path: Path, dtype: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Type, output type and output shape of every layer, the compute type written as ``compute``."""
    shape = NetworkShape(dtype, SHAPE.max_num_seqs, SHAPE.max_model_len, SHAPE.max_prefill_tokens)
    written = write_rank_network(path, Topology(Layout(tp=2), 1), shape)
    network, module = written.network.graph.network, written.library.module
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        output = layer.get_output(0)
        kind = "compute" if output.dtype.name in ("HALF", "BF16") else output.dtype.name
        layers.append((layer_kind(module, layer), kind, tuple(output.shape)))
    return layers


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_network_is_the_float16_one_in_another_type(name: str, checkpoint: Callable[[str], Path]) -> None:
    """bfloat16 constants cannot be read back in Python; so its numbers are shown by way of float16."""
    path = checkpoint(name)
    half = _graph(path, "float16")
    assert _graph(path, "bfloat16") == half
    assert {kind for _, kind, _ in half} == {"compute", "FLOAT", "INT32", "INT64", "BOOL"}


def _interleave_rotary(layers: list[Any]) -> None:
    _first(layers, "ROTARY_EMBEDDING").interleaved = True


def _mask_the_past(layers: list[Any]) -> None:
    """The comparison of slot positions with a query's own, behind the attention mask, the other way round."""
    comparison = next(layer for layer in layers if layer.type.name == "ELEMENTWISE" and layer.op.name == "GREATER")
    comparison.op = type(comparison.op).LESS


def _no_softmax(layers: list[Any]) -> None:
    attention = _first(layers, "ATTENTION_INPUT").attention
    attention.norm_op = type(attention.norm_op).NONE


def _larger_epsilon(layers: list[Any]) -> None:
    _first(layers, "NORMALIZATION").epsilon = 1e-2


def _transposed_product(layers: list[Any]) -> None:
    """The first attention output: its weight is square."""
    square = next(
        layer for layer in layers
        if layer.type.name == "MATRIX_MULTIPLY" and layer.get_input(1).shape[0] == layer.get_input(1).shape[1]
    )  # fmt: skip
    square.op1 = type(square.op1).NONE


def _gate_twice(layers: list[Any]) -> None:
    """The up half of the first gated activation starts where the gate does."""
    activation = next(index for index, layer in enumerate(layers) if layer.type.name == "SIGMOID")
    halves = [layer for layer in layers[:activation] if layer.type.name == "SLICE"][-2:]
    halves[1].start = halves[0].start


def _first(layers: list[Any], kind: str) -> Any:
    return next(layer for layer in layers if layer.type.name == kind)


@pytest.mark.parametrize(
    ("name", "disturb"),
    [
        ("llama-plain", _interleave_rotary),
        ("llama-plain", _mask_the_past),
        ("llama-plain", _no_softmax),
        ("llama-plain", _transposed_product),
        ("llama-plain", _gate_twice),
        ("gpt2-plain", _larger_epsilon),
    ],
)
def test_one_disturbed_attribute_is_noticed(name: str, disturb: Disturbance, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(name)
    steps, expected, _ = reference(path, CASES_BY_NAME[name].config["vocab_size"])
    assert difference(interpreted(path, Layout(), steps)[0], expected) <= TOLERANCE
    assert difference(interpreted(path, Layout(), steps, disturb=disturb)[0], expected) > 20 * TOLERANCE
