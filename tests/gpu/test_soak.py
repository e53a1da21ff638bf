"""Ten thousand mixed requests on a GPU, of plain weights and in fp8."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.runtime.llm import LLM
from tests.gpu.test_executor import CASES, checkpoint
from tests.support.checkpoints import CheckpointCase, write_checkpoint
from tests.support.soak import Requests, check_ends, check_idle

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

NUM_REQUESTS = 10_000
NUM_REPEATED = 40
SIZES = {"max_num_seqs": 64, "max_num_batched_tokens": 256, "num_kv_blocks": 300}
GROWTH_BYTES = 64 << 20
"""Captured graphs may grow by a few megabytes, nothing else may."""


def test_ten_thousand_mixed_requests_leak_and_drift_nothing(tmp_path: Path) -> None:
    import cupy

    requests = Requests.mixed(NUM_REQUESTS)
    with LLM(checkpoint("llama", "float32", tmp_path), engine="cuda", **SIZES) as llm:
        first = requests[:500].tokens(llm)
        free_before = cupy.cuda.runtime.memGetInfo()[0]
        outputs = requests.generate(llm)
        assert free_before - cupy.cuda.runtime.memGetInfo()[0] < GROWTH_BYTES
        check_idle(llm)
        alone = [requests[index : index + 1].tokens(llm)[0] for index in range(NUM_REPEATED)]
    check_ends(outputs, requests.params)
    tokens = [tuple(output.token_ids) for output in outputs]
    assert tokens[:500] == first
    assert tokens[:NUM_REPEATED] == alone


def test_ten_thousand_mixed_requests_in_fp8_leak_and_drift_nothing(tmp_path: Path) -> None:
    """Weights, activations and cache. Steps of another size may choose another kernel, whose last bit moves a code to its neighbour: what
    has to be the same is what the same steps give, before and after all the others."""
    import cupy

    config = {**CASES["llama"], "intermediate_size": 192, "torch_dtype": "bfloat16"}  # multiples of 16
    directory = write_checkpoint(CheckpointCase("llama-fp8", config, "bfloat16"), tmp_path)
    requests = Requests.mixed(NUM_REQUESTS)
    options = {"quantize": "fp8", "kv_cache_dtype": "fp8", "prefix_caching": False}
    with LLM(directory, engine="cuda", **SIZES, **options) as llm:
        first = requests[:500].tokens(llm)
        free_before = cupy.cuda.runtime.memGetInfo()[0]
        outputs = requests.generate(llm)
        assert free_before - cupy.cuda.runtime.memGetInfo()[0] < GROWTH_BYTES
        check_idle(llm)
        assert requests[:500].tokens(llm) == first
        assert llm.num_saturated() == 0
    check_ends(outputs, requests.params)
