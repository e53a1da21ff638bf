"""What the planner says of a rank's memory bounds what its arrays take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.checkpoints.formats import ALL_DENSE, DENSE, FormatPlan
from phalanx.checkpoints.quantization.held import HeldValues, held_formats
from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.kernels.step_update import StepArrays
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.cuda.results import ResultLayout
from phalanx.runtime.llm import LLM
from phalanx.runtime.memory import plan_memory, workspace_bytes
from phalanx.runtime.models import find_model
from phalanx.runtime.models.shapes import use_of
from phalanx.runtime.sampling.fields import MAX_TOKEN_BIASES
from phalanx.runtime.state_sizes import ALLOCATION_BYTES, state_bytes
from phalanx.runtime.step import ADMISSION, StepLimits
from tests.quantization.test_checkpoints import ALL, CASE, MIXTRAL, writers, written_experts
from tests.support.checkpoints import write_checkpoint
from tests.support.fake_cupy import install_fake_device


def allocated(num_bytes: int) -> int:
    return -(-num_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


@given(
    st.integers(1, 2048), st.integers(1, 16384), st.integers(1, 200_000), st.sampled_from([1, 16, 64, 256]),
    st.integers(2, 300_000),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_state_of_a_batch_stays_within_its_bound(
    max_num_seqs: int, max_num_tokens: int, max_model_len: int, block_size: int, vocab_size: int
) -> None:
    limits = StepLimits(max_num_seqs, max_num_tokens, max_model_len, block_size, vocab_size)
    taken = [4 * ResultLayout.most_words(limits.max_logit_rows)]

    def array(name: str, shape: tuple[int, ...], dtype: str) -> Any:
        taken.append(allocated(int(np.prod(shape)) * np.dtype(dtype).itemsize))

    StepArrays.allocate(
        array, max_num_seqs=max_num_seqs, max_num_tokens=max_num_tokens, max_logit_rows=limits.max_logit_rows,
        max_blocks_per_seq=limits.blocks_per_seq, max_plan_words=limits.max_plan_words,
        admission_words=ADMISSION.itemsize // 4, max_biases=MAX_TOKEN_BIASES, block_size=block_size,
    )  # fmt: skip
    bound = state_bytes(max_num_seqs, max_num_tokens, limits.blocks_per_seq, block_size, vocab_size)
    assert sum(taken) <= bound <= 1.2 * sum(taken) + 65_536, "and is not far above it"


NAMES = [
    "ct-w4-g16-asymmetric",
    "gptq-4-order",
    "awq",
    "ct-fp8-static",
    "ct-int8",
    "hf-fp8-blocks",
    "modelopt-awq",
    "modelopt-smoothquant",
    "hf-fp8-wide",
]
LAYOUTS = [(1, 1), (2, 2), (2, 1), (1, 2)]
DIAGONAL = [(name, *LAYOUTS[number % 4]) for number, name in enumerate(NAMES)]
OTHERS = [(name, *layout) for name in NAMES for layout in LAYOUTS if (name, *layout) not in DIAGONAL]


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [*DIAGONAL, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)]
)
def test_what_a_quantised_rank_holds_is_what_was_planned(
    name: str, tp: int, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    write_checkpoint(CASE, tmp_path / "dense")
    module, section = ALL[name]
    writers.write(tmp_path / "dense", tmp_path / "model", tmp_path / "twin", module, section)
    check_plan(tmp_path / "model", tp, pp)


@pytest.mark.parametrize(
    ("name", "tp", "options"),
    [("ct-w4-g64-asymmetric", 2, {}), ("none", 2, {"quantize": "fp8"}),
     *(pytest.param(*one, marks=pytest.mark.slow) for one in [("ct-fp8-static", 1, {}), ("hf-fp8-blocks", 2, {"expert_parallel": True})])],
    ids=str,
)  # fmt: skip
def test_what_a_rank_with_experts_holds_is_what_was_planned(
    name: str, tp: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:  # fmt: skip
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    directory = write_checkpoint(MIXTRAL, tmp_path / "dense") if name == "none" else written_experts(tmp_path, name)[0]
    check_plan(directory, tp, 1, **options)


def check_plan(directory: Path, tp: int, pp: int, **options: Any) -> None:
    """Compare the arrays of each rank with the plan."""

    def rank(comm: Communicator) -> tuple[int, int, int, int]:
        sizes = {"max_num_seqs": 3, "max_model_len": 64, "block_size": 16}
        with LLM(
            directory, tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, engine="cuda",
            dtype="float16", kv_cache_dtype="fp8", num_kv_blocks=8, max_num_batched_tokens=8, **sizes, **options,
        ) as llm:  # fmt: skip
            replica: Any = llm._replica
            model, config, topology = replica.family, replica.config, replica.topology
            use = use_of(model, config)
            formats = held_formats(
                replica.checkpoint.formats, options.get("quantize", "none"), use.experts, use.gates, tp
            )
            planned = plan_memory(
                model, config, topology.layout, "float16", formats=formats, kv_itemsize=1, max_num_tokens=8, **sizes
            )[comm.rank]  # fmt: skip
            activations = workspace_bytes(model, config, formats, topology, 3, 8, itemsize=2)
            stage, pages = replica.executor._stage, replica.executor._attention._fp8.values()
            weights = {id(array): num_bytes(array) for array in stage.ops._weights.arrays().values()}
            arrays = [
                getattr(stage.arrays, name) for name in stage.arrays.__dataclass_fields__ if name != "cached_tokens"
            ]
            arrays += [stage.results, replica.executor._attention.saturated, *(one.kv_scales for one in pages)]
            state = sum(allocated(array.nbytes) for array in arrays)
            return planned.weight_bytes, sum(weights.values()), planned.workspace - activations, state

    for planned_weights, weights, planned_state, state in run_ranks(tp * pp, rank):
        assert weights == planned_weights
        assert state <= planned_state


def num_bytes(array: Any) -> int:
    """Of a device array, or of the arrays of a packed weight."""
    if hasattr(array, "nbytes"):
        return int(array.nbytes)
    return sum(one.nbytes for one in (array.codes, array.scale, array.zero, array.blocks) if one is not None)


@given(st.integers(1, 512), st.integers(1, 4096), st.integers(1, 16), st.sampled_from([2, 4]))
@settings(max_examples=50, deadline=None)
def test_inputs_of_a_quantised_router_have_room(hidden: int, num_tokens: int, top_k: int, itemsize: int) -> None:
    """What `round_inputs` makes of the ``[T, D]`` that a router multiplies, whatever the number of experts that a token takes."""
    config = {**MIXTRAL.config, "hidden_size": 4 * hidden, "num_local_experts": 16, "num_experts_per_tok": top_k}
    model = find_model(config)
    router = FormatPlan(lambda spec: HeldValues(RowCodes("fp8")) if spec.owner.endswith(".router") else DENSE)
    with_codes, without = (
        workspace_bytes(model, model.read_config(config), plan, Topology(Layout(1, 1, 1), 0), 1, num_tokens, itemsize)
        for plan in (router, ALL_DENSE)
    )
    assert with_codes - without >= num_tokens * 4 * hidden * itemsize
