"""fp8 blocks on the CUDA engine: steps of more tokens than kernels stream weights for multiply codes of inputs by blocks of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.cublaslt import GemmProblem
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from tests.support.checkpoints import CheckpointCase, write_checkpoint
from tests.support.fake_cublaslt import FakeCublasLt
from tests.support.fake_cupy import install_fake_device

from . import writers
from .test_checkpoints import CASE, logprobs

WIDE = CheckpointCase(
    "llama-blocks",
    {**CASE.config, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
     "head_dim": 128},
)  # fmt: skip
PROMPT = tuple(int(token) for token in np.random.default_rng(5).integers(0, 100, 70))
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[GemmProblem]:
    """Products of blocks that a model computed, after the first one of a rank, which shows whether there are any."""
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    problems: list[GemmProblem] = []
    run = FakeCublasLt.run

    def recorded(self: FakeCublasLt, problem: GemmProblem, *arguments: Any) -> None:
        if self.problems:
            problems.append(problem)
        run(self, problem, *arguments)

    monkeypatch.setattr(FakeCublasLt, "run", recorded)
    return problems


def written(root: Path, case: CheckpointCase, powers: bool = False) -> tuple[Path, Path]:
    """The checkpoint in blocks, and its values as floats."""
    dense = write_checkpoint(case, root / "dense")
    section = {**BLOCKS, "scale_fmt": "ue8m0"} if powers else BLOCKS
    module = writers.fp8("large block", "weight_scale_inv", powers=powers)
    writers.write(dense, root / "quantised", root / "twin", module, section)
    return root / "quantised", root / "twin"


def generate(path: Path, tp: int = 1, engine: str = "numpy", dtype: Any = "float32", **options: Any) -> np.ndarray:
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, prompt_logprobs=0)

    def rank(comm: Communicator) -> np.ndarray:
        sizes: dict[str, Any] = {
            "block_size": 16, "num_kv_blocks": 8, "max_num_seqs": 2, "max_num_batched_tokens": 70
        }  # fmt: skip
        with LLM(path, tensor_parallel_size=tp, comm=comm, engine=engine, dtype=dtype, **sizes, **options) as llm:
            return np.array(logprobs(llm.generate([PROMPT], params)[0]))

    return run_ranks(tp, rank)[0]


def assert_near(path: Path, tp: int, output: np.ndarray, twin: Path) -> None:
    """Nearer than what codes cost: a last bit moves an input to the next code, and that all later ones; before the first one they agree."""
    expected, plain = generate(path, tp), generate(twin)
    error = np.abs(output - expected)
    assert error.min() < 1e-4
    assert error.mean() < 0.5 * np.abs(plain - expected).mean()


@pytest.mark.parametrize(("tp", "powers"), [(1, False), pytest.param(2, True, marks=pytest.mark.slow)])
def test_steps_of_many_tokens_multiply_blocks_as_the_numpy_engine_does(
    tmp_path: Path, computed: list[GemmProblem], tp: int, powers: bool
) -> None:
    quantised, twin = written(tmp_path, WIDE, powers)
    assert_near(quantised, tp, generate(quantised, tp, "cuda"), twin)
    assert {problem.num_tokens for problem in computed} == {72}, "70 tokens, and 2 rows that are added"
    found = {(problem.out_features, problem.in_features) for problem in computed}
    halves = {(512, 256), (256, 256), (256, 128)}
    assert found == ({(1024, 256), (256, 512), (768, 256), (256, 384)} if tp == 1 else halves)


def test_parts_that_do_not_begin_with_a_block_stay_values(tmp_path: Path, computed: list[GemmProblem]) -> None:
    """320 rows of gates end within a block, so those of ups begin there; the other products are of blocks."""
    quantised, twin = written(tmp_path, CheckpointCase("llama-cut-blocks", {**WIDE.config, "intermediate_size": 320}))
    assert_near(quantised, 1, generate(quantised, 1, "cuda"), twin)
    found = {(problem.out_features, problem.in_features) for problem in computed}
    assert found == {(1024, 256), (256, 512), (256, 320)}
