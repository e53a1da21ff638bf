"""The CUDA executor on a GPU against the NumPy engine: tokens, log-probabilities, capture, chunks, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.runtime.llm import LLM
from phalanx.runtime.request import Logprob, RequestOutput, SamplingParams
from tests.executors.test_rows_after_attention import BLOCKS, write_model
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint

pytestmark = pytest.mark.gpu

_LLAMA, _GPT2, _GEMMA = (CASES_BY_NAME[name].config for name in ("llama-plain", "gpt2-plain", "gemma-one-kv-head"))
CASES = {
    "llama": {**_LLAMA, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "llama-128": {**_LLAMA, "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128},
    "gpt2": {**_GPT2, "n_embd": 256, "n_head": 4},
    "gemma": {**_GEMMA, "hidden_size": 256, "head_dim": 256, "vocab_size": 1009},
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ROUNDINGS = 6
"""A log-probability may be off by this many roundings, in the storage type, of the largest: every layer adds some."""

PROMPT_LENGTHS = (1, 2, 17, 40, 33, 5, 64, 90)


def checkpoint(name: str, dtype: str, directory: Path) -> Path:
    return write_checkpoint(CheckpointCase(name, {**CASES[name], "torch_dtype": dtype}, dtype), directory)


def prompts(vocab_size: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng(5)
    return [tuple(random.integers(3, vocab_size, length).tolist()) for length in PROMPT_LENGTHS]


def generate(
    directory: Path,
    requests: list[tuple[int, ...]],
    params: SamplingParams | list[SamplingParams],
    engine: str = "cuda",
    **options: object,
) -> list[RequestOutput]:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "num_kv_blocks": 200, "block_size": 16, **options}
    with LLM(directory, engine=engine, **sizes) as llm:
        return llm.generate(requests, params)


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prompt_logprobs_equal_the_numpy_engines(name: str, dtype: str, tmp_path: Path) -> None:
    directory = checkpoint(name, dtype, tmp_path)
    requests = prompts(CASES[name]["vocab_size"])
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    expected = generate(directory, requests, params, engine="numpy")
    outputs = generate(directory, requests, params)
    assert_close_logprobs(outputs, expected, dtype)


def assert_close_logprobs(outputs: list[RequestOutput], expected: list[RequestOutput], dtype: str) -> None:
    actual, wanted = (np.concatenate([_values(output) for output in some]) for some in (outputs, expected))
    tolerance = max(2e-4, ROUNDINGS * float(ml_dtypes.finfo(DTYPES[dtype]).eps) * np.abs(wanted).max())
    assert np.abs(actual - wanted).max() < tolerance


def _values(output: RequestOutput) -> np.ndarray:
    scored: Sequence[Logprob | None] = output.prompt_logprobs or ()
    return np.array([entry.logprob for entry in scored[1:] if entry is not None])


@pytest.mark.parametrize("name", CASES)
def test_greedy_continuations_equal_the_numpy_engines_in_float32(name: str, tmp_path: Path) -> None:
    directory = checkpoint(name, "float32", tmp_path)
    requests = prompts(CASES[name]["vocab_size"])
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    assert tokens(generate(directory, requests, params)) == tokens(
        generate(directory, requests, params, engine="numpy")
    )


def test_sampled_continuations_equal_the_numpy_engines_in_float32(tmp_path: Path) -> None:
    directory = checkpoint("llama", "float32", tmp_path)
    requests = prompts(101)
    for params in (
        SamplingParams(max_tokens=30, temperature=0.9, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=1.1, seed=4, top_k=20, top_p=0.9, min_p=0.01, ignore_eos=True),
    ):
        expected = generate(directory, requests, params, engine="numpy")
        assert tokens(generate(directory, requests, params)) == tokens(expected)


CHANGED_LOGITS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "presence and frequency": {"presence_penalty": 0.6, "frequency_penalty": 0.4, "logprobs": 2},
    "bad words": {"bad_token_ids": ((32, 32), (60,), (7, 8, 9)), "presence_penalty": 1.5},
    "allowed tokens": {"allowed_token_ids": tuple(range(0, 101, 3)), "frequency_penalty": 1.0},
    "everything": {
        "allowed_token_ids": tuple(range(0, 101, 2)), "bad_token_ids": ((32, 40), (60,)), "logit_bias": {40: 3.0},
        "repetition_penalty": 0.8, "frequency_penalty": 1.3, "temperature": 0.9, "seed": 3, "top_k": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED_LOGITS)
def test_what_changes_logits_gives_the_numpy_engines_tokens(name: str, tmp_path: Path) -> None:
    """Twice the same prompts, so that blocks are shared, next to one request without; graphs are replayed."""
    directory = checkpoint("llama", "float32", tmp_path)
    requests = prompts(101) * 2
    plain = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    params = [plain, *[dataclasses.replace(plain, **CHANGED_LOGITS[name])] * (len(requests) - 1)]
    for sizes in ({}, {"max_num_batched_tokens": 24, "num_kv_blocks": 40}):
        expected = tokens(generate(directory, requests, params, engine="numpy", **sizes))
        assert tokens(generate(directory, requests, params, **sizes)) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_graphs_and_eager_steps_give_the_same_tokens(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phalanx.runtime.executors.cuda.graphs import GraphCache

    directory = checkpoint("llama", dtype, tmp_path)
    requests = prompts(101) * 2
    scored = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, logprobs=2)
    filtered = SamplingParams(max_tokens=30, temperature=0.9, seed=3, top_k=20, top_p=0.9, ignore_eos=True)
    kinds: list[Any] = [
        scored,
        filtered,
        [*[filtered] * (len(requests) - 1), dataclasses.replace(filtered, temperature=0.0)],
    ]
    captured = [generate(directory, requests, params) for params in kinds]
    monkeypatch.setattr(GraphCache, "_capture", lambda *_: False)
    eager = [generate(directory, requests, params) for params in kinds]
    assert [tokens(outputs) for outputs in captured] == [tokens(outputs) for outputs in eager]
    assert [output.logprobs for output in captured[0]] == [output.logprobs for output in eager[0]]


def test_prompts_in_chunks_give_the_same_tokens_as_whole(tmp_path: Path) -> None:
    directory = checkpoint("gemma", "float32", tmp_path)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    whole = generate(directory, prompts(1009), params, max_num_batched_tokens=512)
    chunked = generate(directory, prompts(1009), params, max_num_batched_tokens=24)
    assert tokens(whole) == tokens(chunked)


@pytest.mark.parametrize("name", BLOCKS)
def test_branches_that_meet_after_the_last_attention_give_the_numpy_engines_tokens(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model_file": write_model(name, tmp_path), "load_format": "dummy", "dtype": "float32"}
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    expected = generate(tmp_path, prompts(101), params, engine="numpy", **options)
    assert tokens(generate(tmp_path, prompts(101), params, **options)) == tokens(expected)


def test_dummy_weights_equal_the_hosts(tmp_path: Path) -> None:
    directory = checkpoint("llama", "bfloat16", tmp_path)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    on_host = generate(directory, prompts(101), params, engine="numpy", load_format="dummy", seed=9)
    on_device = generate(directory, prompts(101), params, load_format="dummy", seed=9)
    assert_close_logprobs(on_device, on_host, "bfloat16")


def test_memory_returns_when_an_engine_closes(tmp_path: Path) -> None:
    import cupy

    directory = checkpoint("llama", "bfloat16", tmp_path)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    free = []
    for _ in range(5):  # what is leaked grows; what other processes take does not
        generate(directory, prompts(101), params, num_kv_blocks=4000)
        cupy.get_default_memory_pool().free_all_blocks()
        free.append(cupy.cuda.runtime.memGetInfo()[0])
    assert max(free[2:]) >= free[1] - (8 << 20), free
