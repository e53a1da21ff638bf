"""Generation on real ranks equals generation on one rank, in every layout of this number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phalanx.parallel.communicator import SelfCommunicator
from phalanx.parallel.launcher import launch_info
from phalanx.parallel.mpi_comm import world_communicator
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint
from tests.support.reference import load_reference, prompt_token_ids

pytestmark = pytest.mark.mpi

SIZE = launch_info().size
LAYOUTS = [(tp, pp, SIZE // (tp * pp)) for tp in (1, 2, 4, 8) for pp in (1, 2, 3) if SIZE % (tp * pp) == 0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASES_BY_NAME["gemma-one-kv-head"], tmp_path_factory.mktemp("gemma"))


def prompts() -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(3, 113, length).tolist() for length in (1, 17, 5, 40, 2, 33)]


def params() -> list[SamplingParams]:
    return [
        SamplingParams(
            max_tokens=8 + 3 * index, temperature=0.7 * (index % 2), top_k=20, top_p=0.9, seed=index, logprobs=2
        )
        for index in range(6)
    ]


@pytest.mark.parametrize(("tp", "pp", "dp"), [layout for layout in LAYOUTS if layout[0] <= 4])
def test_tokens_do_not_depend_on_the_layout(directory: Path, tp: int, pp: int, dp: int) -> None:
    options = {"engine": "numpy", "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    with LLM(directory, comm=SelfCommunicator(), **options) as alone:
        expected = [alone.generate([prompt], one)[0] for prompt, one in zip(prompts(), params(), strict=True)]
    comm = world_communicator()
    with LLM(
        directory, comm=comm, tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp, **options
    ) as llm:
        outputs = llm.generate(prompts(), params())
    comm.close()
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert [output.finish_reason for output in outputs] == [output.finish_reason for output in expected]


@pytest.mark.parametrize("name", ["gptj-plain", "bloom-plain", "falcon-two-norms", "gemma3-windows", "mixtral-plain"])
def test_families_answer_alike_on_every_axis_at_once(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With 8 ranks two of each axis; parallel halves, ALiBi, groups of heads, two kinds of attention, experts."""
    tp, pp = (2 if SIZE % 2 == 0 else 1), (2 if SIZE % 4 == 0 else 1)
    case, comm = CASES_BY_NAME[name], world_communicator()
    directory = write_checkpoint(case, tmp_path_factory.mktemp(name))
    with LLM(
        directory, comm=comm, tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=SIZE // (tp * pp),
        engine="numpy", block_size=4,
    ) as llm:  # fmt: skip
        outputs = llm.generate(
            [prompt_token_ids(case)] * 3, SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        )
    comm.close()
    assert {output.token_ids for output in outputs} == {load_reference(case).greedy[:16]}
