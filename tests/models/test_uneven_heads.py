"""Any tensor-parallel size up to the number of heads: ranks with more heads than others compute what one rank does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phalanx.parallel.sharding import local_heads, local_kv_heads
from phalanx.parallel.topology import Layout
from phalanx.runtime.memory import plan_memory
from phalanx.runtime.models import find_model
from tests.checkpoints.splitting import load_rank, read_all, split
from tests.models.test_against_transformers import log_softmax, run_layout
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint
from tests.support.reference import load_reference, prompt_token_ids

SIZES = [
    ("llama-plain", 3),  # 4 heads of their own: 1, 1, 2
    ("llama-grouped-heads", 3),  # 2 key/value heads: one on the first rank, the other on the rest
    ("llama-grouped-heads", 5),
    ("gemma-one-kv-head", 3),
    ("bloom-six-heads", 4),  # slopes by global head
    ("bloom-six-heads", 5),
    ("gpt_neox-parallel", 3),  # stored head by head
    ("falcon-one-norm", 2),  # 3 key/value heads
    ("falcon-alibi", 4),
    ("qwen3-windows", 3),  # norms of heads
    ("mixtral-plain", 3),
]


@pytest.mark.parametrize(("name", "tp"), SIZES)
def test_uneven_heads_give_transformers_values(name: str, tp: int, tmp_path: Path) -> None:
    case = CASES_BY_NAME[name]
    reference, prompt = load_reference(case), prompt_token_ids(case)
    output = run_layout(write_checkpoint(case, tmp_path), tp, 1, prompt, len(reference.greedy))
    assert output.token_ids == reference.greedy
    assert output.prompt_logprobs is not None
    expected = log_softmax(reference.logits)[np.arange(len(prompt) - 1), prompt[1:]]
    values = [entry.logprob for entry in output.prompt_logprobs[1:] if entry is not None]
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-4 * float(np.ptp(reference.logits)))


@pytest.mark.parametrize(("name", "tp"), SIZES[2:8])
def test_uneven_splits_hold_every_byte_and_load_at_any_size(name: str, tp: int, tmp_path: Path) -> None:
    original = write_checkpoint(CASES_BY_NAME[name], tmp_path / "model")
    split(original, tmp_path / "uneven", tp, 1)
    split(tmp_path / "uneven", tmp_path / "again", 2, 1)
    stored = read_all(original)
    for directory in ("uneven", "again"):
        held = read_all(tmp_path / directory)
        assert held.keys() == stored.keys()
        assert all(np.array_equal(held[tensor], stored[tensor]) for tensor in stored)
    for rank in range(tp):
        ours, theirs = load_rank(tmp_path / "again", tp, 1, rank), load_rank(original, tp, 1, rank)
        assert all(np.array_equal(ours[weight], theirs[weight]) for weight in theirs)


def test_the_planner_counts_each_ranks_own_heads() -> None:
    case = CASES_BY_NAME["falcon-one-norm"]  # 6 heads, 3 of keys and values
    model = find_model(case.config)
    config = model.read_config(case.config)
    ranks = plan_memory(
        model, config, Layout(tp=2), "float32", max_num_seqs=2, max_num_tokens=16, max_model_len=32, block_size=16
    )
    per_head = 3 * 2 * 16 * 16 * 4  # layers, keys and values, tokens, C, bytes
    assert ranks[1].kv_block_bytes - ranks[0].kv_block_bytes == per_head
    for rank, memory in enumerate(ranks):
        heads, kv_heads = local_heads(6, 3, rank, 2).size, local_kv_heads(3, rank, 2).size
        assert memory.weights["attention"] == 3 * 4 * 96 * (heads + 2 * kv_heads + heads) * 16
    assert [local_kv_heads(3, rank, 2).size for rank in range(2)] == [1, 2]
