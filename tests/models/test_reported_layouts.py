"""Faults reported against other engines in fused matrices, in shares of ranks and in decoding; see also test_reported_faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.runtime.executors.numpy.ops import NumpyOps
from phalanx.runtime.executors.numpy.scores import AttentionKind
from phalanx.runtime.llm import LLM
from phalanx.runtime.models import declarations
from phalanx.runtime.request import Logprob, SamplingParams
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.reference import load_reference, prompt_token_ids

from .test_against_transformers import TOLERANCE
from .test_reported_faults import deviation

BY_HEAD = {
    "falcon-two-norms": "vllm#321, #1164; lmdeploy#582",
    "gpt_bigcode-own-keys": "vllm#806",
    "internlm2-plain": "vllm#8017, #8055; mlc#3058",
}
STACKED = {"qwen-plain": "lorax#120", "baichuan-7b": "", "phi3-window": ""}


@pytest.mark.parametrize("name", [*BY_HEAD, *STACKED])
def test_rows_of_q_k_and_v_in_another_order_are_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of each key/value head together read as one matrix after the other, or the other way round."""
    case = CASES_BY_NAME[name]
    directory = write_checkpoint(case, tmp_path)
    read, taken_for = ("fused_qkv", "stacked_qkv") if name in BY_HEAD else ("stacked_qkv", "fused_qkv")
    monkeypatch.setattr(declarations, read, getattr(declarations, taken_for))
    assert deviation(case, directory) > 3 * TOLERANCE


AT_LAYOUTS = {
    "InternLM 2's q, k and v under tensor parallelism (vllm#8017, #8055; mlc#3058)": ("internlm2-plain", (2, 4)),
    "Qwen 1's q, k and v under tensor parallelism (lorax#120)": ("qwen-plain", (2, 3)),
    "more ranks than ChatGLM has key/value heads (vllm#2572, #1735)": ("chatglm-groups", (4,)),
    "more ranks than norms of key heads (vllm#38191, sglang#20967)": ("cohere-head-norms", (4,)),
    "more ranks than StarCoder has key/value heads (vllm#49987)": ("gpt_bigcode-one-kv-head", (4,)),
    "a projection of narrower token rows (TGI#1060)": ("opt-narrow-norm-last", (2,)),
}


@pytest.mark.parametrize("fault", AT_LAYOUTS)
def test_layouts_that_others_got_wrong_equal_transformers(fault: str, tmp_path: Path) -> None:
    name, sizes = AT_LAYOUTS[fault]
    directory = write_checkpoint(CASES_BY_NAME[name], tmp_path)
    for tp in sizes:
        assert deviation(CASES_BY_NAME[name], directory, tp) <= TOLERANCE, tp


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("opt-narrow-norm-last", "model."), ("bloom-plain", "transformer."), ("gpt2-plain", "transformer.")],
)
def test_files_without_the_prefix_of_the_whole_model_are_read(name: str, prefix: str, tmp_path: Path) -> None:
    """TGI#1060, metaseq#388."""
    directory = write_checkpoint(CASES_BY_NAME[name], tmp_path)
    tensors = load_file(directory / "model.safetensors")
    assert any(tensor.startswith(prefix) for tensor in tensors)
    save_file(
        {tensor.removeprefix(prefix): value for tensor, value in tensors.items()}, directory / "model.safetensors"
    )
    assert deviation(CASES_BY_NAME[name], directory, tp=2) <= TOLERANCE


def without_slopes(kind: AttentionKind) -> AttentionKind:
    return replace(kind, slopes=None)


def without_window(kind: AttentionKind) -> AttentionKind:
    return replace(kind, spec=replace(kind.spec, window=0))


IN_DECODING: dict[str, tuple[tuple[str, ...], Callable[[AttentionKind], AttentionKind]]] = {
    "ALiBi lost in decoding (HabanaAI/vllm-fork#437)": (
        ("bloom-six-heads", "mpt-scaled", "baichuan-13b", "falcon-alibi"), without_slopes,
    ),
    "no window in decoding (vllm#2064)": (("mistral-window", "gemma3-windows"), without_window),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, (names, _) in IN_DECODING.items() for name in names]
)
def test_what_is_lost_in_decoding_alone_is_noticed(
    fault: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of one token for each sequence against the same tokens read as a prompt, at every position."""
    case, forget = CASES_BY_NAME[name], IN_DECODING[fault][1]
    directory, shape_scores = write_checkpoint(case, tmp_path), AttentionKind.shape_scores
    assert decoding_differs(case, directory) <= TOLERANCE

    def planted(kind: AttentionKind, scores: Any, queries: Any, *rest: Any, **options: Any) -> None:
        shape_scores(forget(kind) if len(queries) == 1 else kind, scores, queries, *rest, **options)

    monkeypatch.setattr(AttentionKind, "shape_scores", planted)
    assert decoding_differs(case, directory) > 3 * TOLERANCE


def decoding_differs(case: CheckpointCase, directory: Path) -> float:
    """The largest difference between log-probabilities of decoded tokens and of the same read, as a share of the logits' range."""
    prompt, params = prompt_token_ids(case), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
    with LLM(directory, engine="numpy", block_size=4) as llm:
        decoded = llm.generate([prompt], params)[0]
        text = (*prompt, *decoded.token_ids)
        read = llm.generate([text], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))[0]
    assert decoded.logprobs is not None
    assert read.prompt_logprobs is not None
    differences = values(decoded.logprobs) - values(read.prompt_logprobs[len(prompt) :])
    return float(np.abs(differences).max() / np.ptp(load_reference(case).logits))


def values(entries: Sequence[Logprob | None]) -> np.ndarray:
    return np.array([entry.logprob for entry in entries if entry is not None])


@pytest.mark.parametrize("name", ["gemma-one-kv-head", "gemma2-caps", "gemma3-windows"])
@pytest.mark.parametrize("dropped", ["root of D on the embeddings", "1 added to the weights of norms"])
def test_gemmas_own_factors_are_noticed_if_they_are_dropped(
    dropped: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers#29402, litgpt#1031."""
    embedding, rms_norm = NumpyOps.embedding, NumpyOps.rms_norm
    directory = write_checkpoint(CASES_BY_NAME[name], tmp_path)
    if dropped.startswith("root"):
        monkeypatch.setattr(NumpyOps, "embedding", lambda ops, name, scale=1.0: embedding(ops, name))
    else:
        monkeypatch.setattr(NumpyOps, "rms_norm", lambda ops, x, name, eps, offset=0.0: rms_norm(ops, x, name, eps))
    assert deviation(CASES_BY_NAME[name], directory) > 3 * TOLERANCE
