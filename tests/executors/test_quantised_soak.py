"""Mixed requests through the NumPy engine with quantised weights, activations and cache; tests/gpu/test_soak.py has ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.runtime.llm import LLM
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint
from tests.support.soak import Requests, check_ends, check_idle


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_mixed_requests_of_quantised_models_leak_and_drift_nothing(tmp_path: Path, scheme: str) -> None:
    """The same steps give the same tokens; in other steps a last bit of an input's sum may move its code to the neighbour.

    The cache has few blocks, so that sequences are preempted and begin again.
    """
    directory = write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path)
    requests = Requests.mixed(40)
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_kv_blocks": 30, "block_size": 16}
    with LLM(directory, engine="numpy", quantize=scheme, kv_cache_dtype="fp8", prefix_caching=False, **sizes) as llm:
        outputs = requests.generate(llm)
        check_idle(llm)
        again = requests.tokens(llm)
        assert llm.num_saturated() == 0
    check_ends(outputs, requests.params)
    assert again == [tuple(output.token_ids) for output in outputs]
