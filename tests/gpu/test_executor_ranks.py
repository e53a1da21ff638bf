"""The CUDA executor over NCCL: every layout that the GPUs of this machine allow gives the NumPy engine's tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from tests.gpu.test_executor import checkpoint, prompts

pytestmark = pytest.mark.gpu

SEED = 3
ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2), (8, 1), (4, 2), (2, 3)]


def num_gpus() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def generate_under_mpirun(directory: Path, tp: int, pp: int, tmp_path: Path, *flags: str) -> list[dict[str, object]]:
    """Run ``launch.generate`` on ``tp * pp`` ranks; its JSON lines."""
    requests = tmp_path / "requests.jsonl"
    lines = [json.dumps({"prompt_token_ids": prompt, "seed": SEED}) for prompt in prompts(97)]
    requests.write_text("\n".join(lines))
    command = [
        "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(tp * pp), sys.executable, "-m", "launch.generate",
        "--model", str(directory), "--engine", "cuda", "--tp", str(tp), "--pp", str(pp), "--input-file", str(requests),
        "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--num-kv-blocks", "200", "--ignore-eos", "--json",
        *flags,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=os.environ, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_layouts_give_the_numpy_engines_tokens(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    if tp * pp > num_gpus():
        pytest.skip(f"needs {tp * pp} GPUs")
    if name == "gpt2" and tp > 4:
        pytest.skip("its four heads cannot be shared by more ranks")
    directory = checkpoint(name, "float32", tmp_path)
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    with LLM(directory, engine="numpy", max_num_seqs=8, num_kv_blocks=200) as llm:
        expected = [list(output.token_ids) for output in llm.generate(prompts(97), params)]
    lines = generate_under_mpirun(directory, tp, pp, tmp_path, "--max-tokens", "24", "--temperature", "0")
    assert [line["token_ids"] for line in lines] == expected


def test_sampling_with_filters_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    if num_gpus() < 2:
        pytest.skip("needs 2 GPUs")
    directory = checkpoint("llama", "float32", tmp_path)
    params = SamplingParams(max_tokens=16, temperature=0.9, top_k=12, top_p=0.9, seed=SEED, ignore_eos=True, logprobs=2)
    with LLM(directory, engine="numpy", max_num_seqs=8, num_kv_blocks=200) as llm:
        expected = [list(output.token_ids) for output in llm.generate(prompts(97), params)]
    flags = ["--max-tokens", "16", "--temperature", "0.9", "--top-k", "12", "--top-p", "0.9", "--logprobs", "2"]
    for tp, pp in ((2, 1), (1, 2)):
        lines = generate_under_mpirun(directory, tp, pp, tmp_path, *flags)
        assert [line["token_ids"] for line in lines] == expected, (tp, pp)
