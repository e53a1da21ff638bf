"""Many mixed requests through one engine: nothing leaks, nothing drifts, every request ends as it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from tests.gpu.test_executor import checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

NUM_REQUESTS = 10_000
NUM_REPEATED = 40


def request(random: np.random.Generator, index: int) -> tuple[tuple[int, ...], SamplingParams]:
    """Greedy, seeded, filtered and scored requests of all sizes; every fifth begins like another."""
    length = int(random.integers(1, 90))
    prompt = random.integers(3, 101, length)
    if index % 5 == 0:
        prompt[: min(length, 40)] = np.arange(min(length, 40)) + 3
    kind = index % 4
    params = SamplingParams(
        max_tokens=int(random.integers(1, 38)),
        temperature=0.0 if kind == 0 else 0.9,
        seed=index,
        top_k=20 if kind == 2 else 0,
        top_p=0.9 if kind == 2 else 1.0,
        logprobs=2 if kind == 3 else None,
        ignore_eos=index % 3 > 0,
    )
    return tuple(prompt.tolist()), params


def test_ten_thousand_mixed_requests_leak_and_drift_nothing(tmp_path: Path) -> None:
    import cupy

    directory = checkpoint("llama", "float32", tmp_path)
    random = np.random.default_rng(1)
    requests = [request(random, index) for index in range(NUM_REQUESTS)]
    prompts, params = [prompt for prompt, _ in requests], [param for _, param in requests]
    with LLM(directory, engine="cuda", max_num_seqs=64, max_num_batched_tokens=256, num_kv_blocks=300) as llm:
        first = llm.generate(prompts[:500], params[:500])
        free_before = cupy.cuda.runtime.memGetInfo()[0]
        outputs = llm.generate(prompts, params)
        free_after = cupy.cuda.runtime.memGetInfo()[0]
        stats = llm._replica.engine.stats()
        alone = [llm.generate([prompts[index]], params[index])[0] for index in range(NUM_REPEATED)]
    assert stats.kv_blocks_used == 0
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert free_before - free_after < 64 << 20, "captured graphs may grow by a few megabytes, nothing else may"
    for output, param in zip(outputs, params, strict=True):
        if output.finish_reason == "length":
            assert len(output.token_ids) == param.max_tokens
        else:
            assert output.finish_reason == "stop"
            assert output.token_ids[-1] == 2
    assert [output.token_ids for output in outputs[:500]] == [output.token_ids for output in first]
    assert [output.token_ids for output in outputs[:NUM_REPEATED]] == [output.token_ids for output in alone]
