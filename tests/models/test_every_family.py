"""Agreements that hold for every family: chunked = whole, preempted = not, decoded = read as a prompt, split = unsplit, resaved = not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.llm import LLM
from phalanx.runtime.models import MODELS, find_model
from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.checkpoints.splitting import load_rank, read_all, split
from tests.support.checkpoints import CASES, CheckpointCase, write_checkpoint
from tests.support.reference import PREFIX_END, load_reference, prompt_token_ids

from .test_against_transformers import NUM_GREEDY, TOLERANCE, log_softmax, run_layout

FIRST = {find_model(case.config).architecture: case for case in reversed(CASES)}
"""One configuration of each family."""
EVERY = [case if case in FIRST.values() else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
"""All configurations; those that are not the first of their family take part where slow tests run."""
SIX_LAYOUTS = {(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (3, 1)}
"""Tensor-parallel and pipeline-parallel size."""
THREE_UNITS = ("qwen2_moe-odd-every-second-renormalised", "qwen3_moe-odd-narrow-experts")
"""Experts whose columns are three units, which four ranks cannot share."""
MISREAD = ("falcon-odd-old-keys", "mpt-odd-scaled-logits")
"""Whose sizes transformers takes for its defaults whatever the file says; their oracles put it right."""
NUM_TOKENS = 12


def by_name(case: CheckpointCase) -> str:
    return case.name


def test_no_family_is_left_out() -> None:
    assert FIRST.keys() == MODELS.keys()


@pytest.mark.parametrize("case", EVERY, ids=by_name)
def test_every_family_equals_transformers_at_six_layouts(case: CheckpointCase, tmp_path: Path) -> None:
    """Those that test_against_transformers leaves out: heads and columns that three or four ranks share unevenly, too."""
    reference, prompt = load_reference(case), prompt_token_ids(case)
    expected, directory = log_softmax(reference.logits), write_checkpoint(case, tmp_path)
    for tp, pp in sorted(SIX_LAYOUTS - set(case.layouts)):
        if case.name in THREE_UNITS and tp == 4:
            with pytest.raises(ConfigError, match="cannot be shared by tp_size=4; use a tp_size of at most 3"):
                run_layout(directory, tp, pp, prompt, NUM_GREEDY)
            continue
        output = run_layout(directory, tp, pp, prompt, NUM_GREEDY, case.max_model_len)
        assert output.token_ids == reference.greedy[:NUM_GREEDY], (tp, pp)
        assert output.prompt_logprobs is not None
        values = [entry.logprob for entry in output.prompt_logprobs[1:] if entry is not None]
        wanted = expected[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(values, wanted, rtol=0, atol=TOLERANCE * float(np.ptp(reference.logits)))


@pytest.mark.parametrize("case", EVERY, ids=by_name)
def test_neither_chunks_nor_preemptions_nor_decoding_step_by_step_change_a_result(
    case: CheckpointCase, tmp_path: Path
) -> None:
    directory, prompt = write_checkpoint(case, tmp_path), prompt_token_ids(case)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, prompt_logprobs=1, logprobs=1)
    prompts, num_tokens, longest = [prompt, prompt[:5], prompt[3:]], 5, case.max_model_len and 36
    if case.prefix_end:  # which is never cut
        prompts, num_tokens = [prompt, prompt[8:], prompt[3:]], PREFIX_END + len(case.prefix_end) + 2
    with LLM(directory, engine="numpy", block_size=4, max_model_len=longest) as llm:
        roomy = llm.generate(prompts, params)
        texts = [(*output.prompt_token_ids, *output.token_ids) for output in roomy]
        read = llm.generate(texts, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
    with LLM(
        directory, engine="numpy", block_size=4, num_kv_blocks=9, max_num_seqs=3, max_num_batched_tokens=num_tokens,
        max_model_len=longest,
    ) as llm:  # fmt: skip
        tight = llm.generate(prompts, params)
        engine = llm._replica.engine
        assert engine is not None
        assert engine.scheduler.stats().num_preemptions > 0
    tolerance = 1e-5 * float(np.ptp(load_reference(case).logits))
    for one, other, whole in zip(roomy, tight, read, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(_logprobs(other), _logprobs(one), rtol=0, atol=tolerance)
        assert whole.prompt_logprobs is not None
        expected = [entry.logprob for entry in whole.prompt_logprobs[1:] if entry is not None]
        np.testing.assert_allclose(_logprobs(one), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", EVERY, ids=by_name)
def test_blocks_that_an_earlier_request_left_give_the_same_result(case: CheckpointCase, tmp_path: Path) -> None:
    directory, prompt = write_checkpoint(case, tmp_path), prompt_token_ids(case)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=1)
    with LLM(directory, engine="numpy", block_size=4, max_model_len=case.max_model_len) as llm:
        first, second = (llm.generate([prompt], params)[0] for _ in range(2))
        engine = llm._replica.engine
        assert engine is not None
        assert engine.scheduler.stats().prefix_hit_tokens == 16
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert first.token_ids == second.token_ids
    pairs = zip(first.logprobs, second.logprobs, strict=True)
    tolerance = 1e-5 * float(np.ptp(load_reference(case).logits))
    assert max(abs(one.logprob - other.logprob) for one, other in pairs) <= tolerance


def _logprobs(output: RequestOutput) -> list[float]:
    """Of the prompt from its second token on, then of the generated tokens."""
    assert output.prompt_logprobs is not None
    assert output.logprobs is not None
    return [entry.logprob for entry in (*output.prompt_logprobs[1:], *output.logprobs) if entry is not None]


@pytest.mark.parametrize("case", EVERY, ids=by_name)
def test_a_split_split_again_holds_the_same_bytes_and_gives_ranks_the_same_weights(
    case: CheckpointCase, tmp_path: Path
) -> None:
    original = write_checkpoint(case, tmp_path / "model")
    (tp, pp), most = max(case.layouts), max(tp for tp, _ in case.layouts)
    split(original, tmp_path / "first", tp, pp)
    split(tmp_path / "first", tmp_path / "second", 1, 3)
    stored, again = load_file(original / "model.safetensors"), read_all(tmp_path / "second")
    assert stored.keys() == again.keys()
    assert all(stored[name].tobytes() == again[name].tobytes() for name in stored)
    for rank in range(most):
        ours, theirs = (load_rank(path, most, 1, rank) for path in (tmp_path / "second", original))
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs), rank


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_a_checkpoint_saved_again_by_transformers_is_the_same_model(case: CheckpointCase, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if case.config["model_type"] not in transformers.CONFIG_MAPPING or case.name in MISREAD:
        pytest.skip("no class of the oracle's reads this file")
    directory, saved = write_checkpoint(case, tmp_path / "model"), tmp_path / "saved"
    auto = "AutoModelForImageTextToText" if "text_config" in case.config else "AutoModelForCausalLM"
    getattr(transformers, auto).from_pretrained(directory, dtype="auto").save_pretrained(saved)
    reference = load_reference(case)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    with LLM(saved, engine="numpy", max_model_len=case.max_model_len) as llm:
        output = llm.generate([prompt_token_ids(case)], params)[0]
    assert output.token_ids == reference.greedy[:8]
    expected = log_softmax(reference.logits)
    assert output.prompt_logprobs is not None
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry is not None
        assert abs(entry.logprob - expected[position, entry.token_id]) < 1e-5 * np.ptp(reference.logits)
