"""``--expert-parallel``: ranks own experts whole, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.loader import load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.parallel.topology import Layout
from phalanx.runtime.llm import LLM
from phalanx.runtime.memory import plan_memory
from phalanx.runtime.models import find_model
from phalanx.runtime.models.expert_parallel import with_expert_parallel
from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.fake_cupy import install_fake_device
from tests.support.reference import load_reference, prompt_token_ids

MIXTRAL = CASES_BY_NAME["mixtral-plain"]  # five experts: no two ranks' shares are equal
SHARED = CASES_BY_NAME["qwen2_moe-one-dense-layer"]


def generate(directory: Path, tp: int, prompt: tuple[int, ...], length: int, **options: object) -> RequestOutput:
    def rank(comm: Communicator) -> RequestOutput:
        with LLM(directory, tensor_parallel_size=tp, comm=comm, num_kv_blocks=20, **options) as llm:  # type: ignore[arg-type]
            params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, logprobs=1)
            return llm.generate([prompt], params)[0]

    return run_ranks(tp, rank)[0]


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("case", [MIXTRAL, SHARED], ids=lambda case: case.name)
def test_owned_experts_give_transformers_tokens(case: CheckpointCase, tp: int, tmp_path: Path) -> None:
    reference = load_reference(case)
    output = generate(
        write_checkpoint(case, tmp_path), tp, prompt_token_ids(case), len(reference.greedy), engine="numpy",
        expert_parallel=True,
    )  # fmt: skip
    assert output.token_ids == reference.greedy


@pytest.mark.parametrize("case", [MIXTRAL, SHARED], ids=lambda case: case.name)
def test_the_cuda_engine_adds_up_owned_experts_too(
    case: CheckpointCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    directory, prompt = write_checkpoint(case, tmp_path), prompt_token_ids(case)
    output = generate(
        directory, 2, prompt, 4, engine="cuda", expert_parallel=True, max_num_seqs=2, max_num_batched_tokens=8
    )
    assert output.token_ids == load_reference(case).greedy[:4]


def test_each_expert_is_on_one_rank_whole(tmp_path: Path) -> None:
    directory = write_checkpoint(MIXTRAL, tmp_path)
    model = find_model(MIXTRAL.config)
    config = with_expert_parallel(model, model.read_config(MIXTRAL.config), True)
    with open_checkpoint(directory) as checkpoint:
        whole = NumpySink()
        load_weights(checkpoint.source, model.weights(config), 0, 1, whole)
        parts = []
        for rank in range(2):
            parts.append(NumpySink())
            load_weights(checkpoint.source, model.weights(config), rank, 2, parts[-1])
    for name in ("layers.1.experts.gate_up.weight", "layers.1.experts.down.weight"):
        shares = [part.weights[name] for part in parts]
        np.testing.assert_array_equal(np.concatenate(shares), whole.weights[name])
        assert [len(share) * 5 // len(whole.weights[name]) for share in shares] == [2, 3]


def test_the_planner_counts_the_experts_that_a_rank_owns() -> None:
    model = find_model(MIXTRAL.config)
    config = model.read_config(MIXTRAL.config)
    sizes = {"max_num_seqs": 4, "max_num_tokens": 64, "max_model_len": 64, "block_size": 16}
    owned, shared = (
        [
            rank.weights["mlp"]
            for rank in plan_memory(
                model, with_expert_parallel(model, config, wanted), Layout(tp=2), "float32", **sizes
            )
        ]
        for wanted in (True, False)
    )
    assert sum(owned) == sum(shared)
    router, expert = 5 * 48, 3 * 48 * 80
    assert owned == [3 * 4 * (router + 2 * expert), 3 * 4 * (router + 3 * expert)]


def test_more_ranks_than_experts_are_refused(tmp_path: Path) -> None:
    few = CheckpointCase("few", {**MIXTRAL.config, "num_local_experts": 2})
    with pytest.raises(ConfigError, match="2 experts cannot be shared by tp_size=4; use a tp_size of at most 2"):
        generate(write_checkpoint(few, tmp_path), 4, (3, 4), 1, engine="numpy", expert_parallel=True)


def test_a_model_without_experts_is_refused() -> None:
    case = CASES_BY_NAME["llama-plain"]
    model = find_model(case.config)
    with pytest.raises(ConfigError, match="--expert-parallel: LlamaForCausalLM has no experts; leave it out"):
        with_expert_parallel(model, model.read_config(case.config), True)
