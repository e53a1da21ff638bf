"""The CUDA executor in every layout that this machine's GPUs allow: against transformers, the NumPy engine and the demo's loss.

Each layout is a real ``mpirun``: hidden states go over NCCL, sums through memory that the GPUs share where they can.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from tests.gpu.test_executor import CASES, prompts
from tests.models.test_against_transformers import log_softmax
from tests.support.checkpoints import CheckpointCase, write_checkpoint
from tests.support.gpus import GPU_TOLERANCE, skip_without_gpus
from tests.support.launcher import ROOT, run_module
from tests.support.reference import Reference, prompt_token_ids, transformers_reference

pytestmark = pytest.mark.gpu

SEED = 3
LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8), (2, 3)]
DEEP = {
    "llama": {**CASES["llama"], "num_hidden_layers": 8},
    "gpt2": {**CASES["gpt2"], "n_layer": 8, "n_embd": 512, "n_head": 8},
    "gemma": {**CASES["gemma"], "num_hidden_layers": 8, "num_attention_heads": 8},
}
"""Heads for eight tensor-parallel ranks, blocks for eight stages."""

HELD_OUT = "modulefinder.txt"


def run_under_mpirun(tp: int, pp: int, command: str, *flags: str | Path) -> list[dict[str, Any]]:
    """Run ``launch.<command>`` on ``tp * pp`` ranks; its JSON lines."""
    layout = ("--tp", str(tp), "--pp", str(pp))
    lines = run_module(
        tp * pp, f"launch.{command}", "--engine", "cuda", *layout, "--num-kv-blocks", "200", "--json", *flags
    )
    return [json.loads(line) for line in lines]


def generate(directory: Path, tp: int, pp: int, requests: list[tuple[int, ...]], *flags: str) -> list[dict[str, Any]]:
    """Run ``launch.generate`` over the prompts, in chunks smaller than the longest of them."""
    file = directory / "requests.jsonl"
    file.write_text("\n".join(json.dumps({"prompt_token_ids": prompt, "seed": SEED}) for prompt in requests))
    return run_under_mpirun(
        tp, pp, "generate", "--model", directory, "--input-file", file, "--max-num-seqs", "8",
        "--max-num-batched-tokens", "64", "--ignore-eos", *flags,
    )  # fmt: skip


@pytest.fixture(scope="module", params=DEEP)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointCase:
    case = CheckpointCase(request.param, DEEP[request.param])
    write_checkpoint(case, tmp_path_factory.getbasetemp() / case.name)
    return case


@pytest.fixture(scope="module")
def directory(family: CheckpointCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / family.name


@pytest.fixture(scope="module")
def transformers_values(family: CheckpointCase, directory: Path) -> Reference:
    return transformers_reference(family, directory, device="cuda")


@pytest.fixture(scope="module")
def numpy_tokens(family: CheckpointCase, directory: Path) -> list[list[int]]:
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    with LLM(directory, engine="numpy", max_num_seqs=8, num_kv_blocks=200) as llm:
        return [list(output.token_ids) for output in llm.generate(prompts(97), params)]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_layouts_equal_transformers_on_the_gpu(
    family: CheckpointCase, directory: Path, transformers_values: Reference, tp: int, pp: int
) -> None:
    skip_without_gpus(tp * pp)
    prompt = prompt_token_ids(family)
    flags = ("--max-tokens", str(len(transformers_values.greedy)), "--temperature", "0", "--prompt-logprobs", "5")
    (line,) = generate(directory, tp, pp, [prompt], *flags)
    assert tuple(line["token_ids"]) == transformers_values.greedy
    expected = log_softmax(transformers_values.logits)
    tolerance = GPU_TOLERANCE * float(np.ptp(transformers_values.logits))
    for position, entry in enumerate(line["prompt_logprobs"][1:], 1):
        row = expected[position - 1]
        assert entry["token_id"] == prompt[position]
        assert abs(entry["logprob"] - row[entry["token_id"]]) <= tolerance, position
        ids, values = (np.array(column) for column in zip(*entry["top"], strict=True))
        np.testing.assert_allclose(values, row[ids.astype(int)], rtol=0, atol=tolerance)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:5], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_layouts_give_the_numpy_engines_tokens(
    directory: Path, numpy_tokens: list[list[int]], tp: int, pp: int
) -> None:
    skip_without_gpus(tp * pp)
    lines = generate(directory, tp, pp, prompts(97), "--max-tokens", "24", "--temperature", "0")
    assert [line["token_ids"] for line in lines] == numpy_tokens


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (8, 1), (4, 2)])
def test_sampling_with_filters_does_not_depend_on_the_layout(tp: int, pp: int, tmp_path: Path) -> None:
    skip_without_gpus(tp * pp)
    directory = write_checkpoint(CheckpointCase("llama", DEEP["llama"]), tmp_path)
    params = SamplingParams(max_tokens=16, temperature=0.9, top_k=12, top_p=0.9, seed=SEED, ignore_eos=True, logprobs=2)
    with LLM(directory, engine="numpy", max_num_seqs=8, num_kv_blocks=200) as llm:
        expected = [list(output.token_ids) for output in llm.generate(prompts(97), params)]
    flags = ("--max-tokens", "16", "--temperature", "0.9", "--top-k", "12", "--top-p", "0.9", "--logprobs", "2")
    assert [line["token_ids"] for line in generate(directory, tp, pp, prompts(97), *flags)] == expected


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (8, 1), (4, 2)])
def test_penalties_do_not_depend_on_the_layout(tp: int, pp: int, tmp_path: Path) -> None:
    skip_without_gpus(tp * pp)
    directory = write_checkpoint(CheckpointCase("llama", DEEP["llama"]), tmp_path)
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, **penalties)
    with LLM(directory, engine="numpy", max_num_seqs=8, num_kv_blocks=200) as llm:
        expected = [list(output.token_ids) for output in llm.generate(prompts(97), params)]
    flags = [word for name, value in penalties.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    lines = generate(directory, tp, pp, prompts(97), "--max-tokens", "16", "--temperature", "0", *flags)
    assert [line["token_ids"] for line in lines] == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_demo_checkpoints_loss_is_that_of_transformers(dtype: str, tp: int, pp: int) -> None:
    skip_without_gpus(tp * pp)
    recorded = json.loads((ROOT / "tests/demo/reference.json").read_text())["held_out"]
    expected = next(entry["loss"] for entry in recorded if entry["file"] == HELD_OUT)
    tolerance = {"float32": 1e-4, "bfloat16": 0.02}[dtype]
    text = ROOT / "tests/demo/held_out" / HELD_OUT
    (report,) = run_under_mpirun(tp, pp, "eval", "--dtype", dtype, "--text", text)
    assert report["loss"] == pytest.approx(expected, abs=tolerance)
