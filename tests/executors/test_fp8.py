"""``--quantize fp8`` and fp8 caches: the NumPy engine by definition, the CUDA executor (emulated) against it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.scheme import KV_CACHE_SCHEME
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.parallel.thread_comm import run_ranks
from phalanx.runtime.executors.cuda.deferred import Deferred
from phalanx.runtime.executors.rank_spec import RankSpec
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import RequestOutput, SamplingParams
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.fake_cupy import OneAtATime, install_fake_device
from tests.support.reference import prompt_token_ids

LLAMA = CASES_BY_NAME["llama-grouped-heads"]
CASE = CheckpointCase(
    "llama-heads-of-16",
    {**LLAMA.config, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
     "head_dim": 16},
)  # fmt: skip
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1, prompt_logprobs=1)
FP8 = {"quantize": "fp8", "kv_cache_dtype": "fp8"}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))


def generate(directory: Path, engine: str, tp: int = 1, pp: int = 1, **options: Any) -> RequestOutput:
    prompt = prompt_token_ids(CASE)

    def rank(comm: Communicator) -> RequestOutput:
        sizes = {"block_size": 16, "max_num_seqs": 3, "max_num_batched_tokens": 7, "num_kv_blocks": 20}
        with LLM(
            directory, tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=comm, engine=engine,
            **{**sizes, **options},
        ) as llm:  # fmt: skip
            return llm.generate([prompt], PARAMS)[0]

    return run_ranks(tp * pp, rank)[0]


def logprobs(output: RequestOutput) -> np.ndarray:
    assert output.prompt_logprobs is not None
    return np.array([one.logprob for one in output.prompt_logprobs if one is not None])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("options", [{"quantize": "fp8"}, {"kv_cache_dtype": "fp8"}, FP8], ids=str)
def test_fp8_is_close_to_but_not_equal_to_the_float_model(directory: Path, options: dict[str, str]) -> None:
    exact, quantised = logprobs(generate(directory, "numpy")), logprobs(generate(directory, "numpy", **options))
    assert 0 < np.abs(exact - quantised).mean() < 0.3  # of logits that spread over several nats


@pytest.mark.parametrize("options", [{"quantize": "fp8"}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_results_do_not_depend_on_chunks(directory: Path, options: dict[str, str]) -> None:
    outputs = [generate(directory, "numpy", max_num_batched_tokens=size, **options) for size in (1, 7, 64)]
    for other in outputs[1:]:
        assert other.token_ids == outputs[0].token_ids
        np.testing.assert_allclose(logprobs(other), logprobs(outputs[0]), atol=1e-4)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("options", [{"quantize": "fp8"}, FP8], ids=["weights", "weights-and-cache"])
def test_cuda_computes_what_numpy_defines(
    directory: Path, device: None, options: dict[str, str], tp: int, pp: int
) -> None:
    # The NumPy engine keeps float32 between operations, the device float16: some codes fall to the other side.
    expected = logprobs(generate(directory, "numpy", tp, pp, **options))
    output = generate(directory, "cuda", tp, pp, dtype="float16", **options)
    exact = logprobs(generate(directory, "numpy"))
    assert np.abs(logprobs(output) - expected).max() < np.abs(exact - expected).max()


@pytest.mark.parametrize("name", ["gpt_neox-serial-no-bias", "opt-plain", "stablelm-serial"])
def test_built_in_blocks_drop_norms_before_their_residual_goes_on(
    name: str, tmp_path: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that is still referred to then is computed twice: as codes, and as values in case that these are asked for."""
    kept: list[Deferred] = []
    monkeypatch.setattr(Deferred, "keep", kept.append)
    config = CASES_BY_NAME[name].config
    width = "ffn_dim" if "ffn_dim" in config else "intermediate_size"
    path = write_checkpoint(CheckpointCase(name, {**config, width: 96}), tmp_path)
    generate(path, "cuda", quantize="int8", dtype="float32")
    assert kept == []


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_matrices_that_no_product_of_codes_takes_are_packed(tmp_path: Path, device: None, quantize: str) -> None:
    """88 inner columns over two ranks are 40 and 48, of which cuBLASLt takes the second."""
    odd = CheckpointCase("odd", {**CASE.config, "intermediate_size": 88})
    directory = write_checkpoint(odd, tmp_path)
    expected, exact = (logprobs(generate(directory, "numpy", 2, quantize=one)) for one in (quantize, "none"))
    for dtype, bound in (("float32", 0.05), ("float16", 1.0)):
        output = logprobs(generate(directory, "cuda", 2, quantize=quantize, dtype=dtype))
        assert np.abs(output - expected).mean() < bound * np.abs(exact - expected).mean()


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_a_norm_at_the_end_of_a_stage_is_handed_over(tmp_path: Path, device: None, quantize: str) -> None:
    """OPT-350m norms after each half, so that a stage ends in a norm that quantised weights take as codes."""
    case = CASES_BY_NAME["opt-narrow-norm-last"]
    path = write_checkpoint(replace(case, config={**case.config, "ffn_dim": 112}), tmp_path)
    expected, output = generate(path, "numpy", quantize=quantize), generate(path, "cuda", pp=2, quantize=quantize)
    assert output.token_ids == expected.token_ids
    np.testing.assert_allclose(logprobs(output), logprobs(expected), atol=1e-3)


@pytest.mark.parametrize(("quantize", "tp"), [("fp8", 1), pytest.param("int8", 2, marks=pytest.mark.slow)])
def test_cuda_computes_quantised_experts_as_numpy_does(tmp_path: Path, device: None, quantize: str, tp: int) -> None:
    directory = write_checkpoint(CASES_BY_NAME["mixtral-plain"], tmp_path)
    expected, exact = (logprobs(generate(directory, "numpy", tp, quantize=one)) for one in (quantize, "none"))
    output = logprobs(generate(directory, "cuda", tp, dtype="float32", quantize=quantize))
    assert np.abs(output - expected).mean() < 0.05 * np.abs(exact - expected).mean()


def test_devices_without_fp8_products_are_refused(
    directory: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OneAtATime, "architecture", "sm_86")
    with pytest.raises(ConfigError, match=r"products need compute capability 8\.9; this GPU has sm_86"):
        generate(directory, "cuda", quantize="fp8", dtype="float16")


@pytest.mark.parametrize("engine", ["cuda", "numpy"])
def test_a_cache_of_another_float_type_is_refused(directory: Path, device: None, engine: str) -> None:
    with pytest.raises(ConfigError, match="--kv-cache-dtype=bfloat16 is neither fp8 nor the compute type"):
        generate(directory, engine, kv_cache_dtype="bfloat16", dtype="float16")


def test_fp8_caches_need_16_bit_activations(directory: Path, device: None) -> None:
    """Whether a flag asks for them or the checkpoint, for which the flag's default stands."""
    with pytest.raises(
        ConfigError, match=r"needs head_dim in multiples of 16 and 16-bit activations.*; use --kv-cache-dtype float32"
    ):
        generate(directory, "cuda", kv_cache_dtype="fp8", dtype="float32")


@pytest.mark.parametrize("engine", ["cuda", "numpy"])
def test_caches_that_cannot_be_are_refused_before_weights_are_read(
    directory: Path, tmp_path: Path, device: None, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(RankSpec, "load")
    test_a_cache_of_another_float_type_is_refused(directory, device, engine)
    if engine == "cuda":
        test_fp8_caches_need_16_bit_activations(directory, device)
    section = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": dict(KV_CACHE_SCHEME)}
    promising = replace(CASE, config={**CASE.config, "quantization_config": section})
    with pytest.raises(CheckpointError, match=r"promises an fp8 key/value cache, but .*self_attn has no key scale"):
        generate(write_checkpoint(promising, tmp_path / "promising"), engine, dtype="float16")
    section = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}
    quantised = replace(CASE, config={**CASE.config, "quantization_config": section})
    with pytest.raises(ConfigError, match="--quantize=int8: the checkpoint holds int4 in groups of 8 weights already"):
        generate(write_checkpoint(quantised, tmp_path / "quantised"), engine, quantize="int8")
