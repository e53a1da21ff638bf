"""A model of fp8 blocks at real widths: steps of 2,000 tokens, and of 96 sequences and fewer as graphs, against the NumPy engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.cublaslt import CublasLt, GemmProblem
from phalanx.runtime.executors.cuda.graphs import GraphCache, StepKey
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import Logprob, SamplingParams
from tests.kernels.devices import has_gpu

cupy = pytest.importorskip("cupy")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU")]

CONFIG = json.loads((Path(__file__).parent / "models" / "qwen3-8b-blocks" / "config.json").read_text())
WIDE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "vocab_size": 2003,
}  # fmt: skip
"""Matrices of a megabyte and more, which are timed when the engine starts."""
SIZES: dict[str, Any] = {
    "max_num_seqs": 128, "max_num_batched_tokens": 2048, "num_kv_blocks": 512, "block_size": 16, "prefix_caching": False
}  # fmt: skip

Requests = list[tuple[int, ...]]


def prompts(vocab_size: int, count: int) -> Requests:
    """Of 3 to 50 tokens; 96 of them are 2,544."""
    random = np.random.default_rng(11)
    return [tuple(random.integers(3, vocab_size, 3 + i % 48).tolist()) for i in range(count)]


def values(entries: tuple[Logprob | None, ...] | None) -> list[float]:
    return [entry.logprob for entry in entries or () if entry is not None]


def scored(llm: LLM, sequences: Requests) -> list[np.ndarray]:
    """Log-probabilities of every token but the first, computed as prompts."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    return [np.array(values(output.prompt_logprobs)) for output in llm.generate(sequences, params)]


def written(root: Path, sizes: dict[str, Any]) -> tuple[Path, Path]:
    """The model, and one of the same dummy weights whose inputs are not quantised."""
    plain = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "ignore": ["lm_head"]}
    paths = root / "blocks", root / "plain"
    for path, section in zip(paths, (CONFIG["quantization_config"], plain), strict=True):
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**CONFIG, **sizes, "quantization_config": section}))
    return paths


def compared(paths: tuple[Path, Path], requests: Requests, dtype: str, options: dict[str, Any]) -> list[float]:
    """Mean differences from the NumPy engine: of what was decoded, of the same tokens as prompts, and of inputs that are not quantised."""
    # Sequences end one after the other, so that there are steps of many numbers of them.
    params = [
        SamplingParams(max_tokens=2 + i % 12, temperature=0.0, ignore_eos=True, logprobs=0)
        for i in range(len(requests))
    ]
    with LLM(paths[0], engine="cuda", dtype=dtype, load_format="dummy", **options) as llm:
        for _ in range(3):  # eagerly, captured, and from graphs
            outputs = llm.generate(requests, params)
        sequences = [request + output.token_ids for request, output in zip(requests, outputs, strict=True)]
        prompted = scored(llm, sequences)
    references = []
    for path in paths:
        with LLM(path, engine="numpy", load_format="dummy", **options) as llm:
            references.append(scored(llm, sequences))
    expected, plain = references
    decoded = [np.array(values(output.logprobs)) for output in outputs]
    ends = [one[-len(some) :] for one, some in zip(expected, decoded, strict=True)]
    pairs = ((decoded, ends), (prompted, expected), (plain, expected))
    return [float(np.abs(np.concatenate(one) - np.concatenate(other)).mean()) for one, other in pairs]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_steps_of_every_size_follow_the_numpy_engine(
    kv_cache_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that a GPU generated, scored by the NumPy engine; a last bit of an input moves its code, on both."""
    computed, versions, replayed = set[GemmProblem](), set[int](), set[int]()
    multiply, run = CublasLt.run, GraphCache.run

    def recorded(self: CublasLt, problem: GemmProblem, *arguments: Any) -> None:
        computed.add(problem)
        versions.add(self.version)
        multiply(self, problem, *arguments)

    def recorded_step(self: GraphCache[Any], key: StepKey, *arguments: Any, **options: Any) -> Any:
        if (entry := self._entries.get(key)) is not None and entry.graph is not None:
            replayed.add(key.num_rows)
        return run(self, key, *arguments, **options)

    monkeypatch.setattr(CublasLt, "run", recorded)
    monkeypatch.setattr(GraphCache, "run", recorded_step)
    options = {**SIZES, "kv_cache_dtype": kv_cache_dtype}
    decoded, prompted, plain = compared(written(tmp_path, WIDE), prompts(WIDE["vocab_size"], 96), "bfloat16", options)
    print(f"mean differences: decoded {decoded:.2e}, prompts {prompted:.2e}, inputs that are not quantised {plain:.2e}")
    assert max(decoded, prompted) < 2 * plain
    assert replayed & set(range(72, 97, 8)), "graphs of products of codes"
    assert replayed & set(range(8, 65, 8)), "graphs of streamed weights"
    assert max(replayed) > 1000, "graphs of prompts"
    if cupy.cuda.Device().compute_capability == "90" and min(versions) >= 120900:
        sizes = {one.num_tokens for one in computed if one.has_blocks}
        assert any(size < 128 for size in sizes), "sizes that no tuner times"
        assert max(sizes) == 2048
