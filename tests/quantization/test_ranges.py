"""``launch.quantize --scheme fp8-static`` and ``--kv-cache fp8``: ranges of a calibration text, written, read and used."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from phalanx.checkpoints.quantization.row_codes import RowCodes
from phalanx.launch.quantize import main
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.calibration.layers import LayerRuns
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from tests.support.calibrating_llama import CalibratingLlama
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.fake_cupy import install_fake_device
from tests.support.short_demo import write_short_demo

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).resolve().parents[2]
NUM_LAYERS = 2


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of the demo, with its tokenizer."""
    return write_short_demo(tmp_path_factory.mktemp("short") / "dense", NUM_LAYERS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Less than a window of 512 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "tests" / "demo" / "held_out" / "operator.txt").read_text("utf-8")[:900])
    return path


@pytest.fixture(scope="module")
def expected(dense: Path, text: Path) -> CalibratingLlama:
    """A model in float64 that has read the text."""
    model = CalibratingLlama(dense)
    ids = Tokenizer.from_file(str(dense / "tokenizer.json")).encode(text.read_text(), add_special_tokens=False).ids
    model.log_probabilities([0, *ids])
    return model


DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "I32": np.int32,
    "I64": np.int64,
}


def tensors_of(directory: Path) -> dict[str, Array]:
    """The file by its format's definition: the safetensors package knows no fp8 in NumPy."""
    data = (directory / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[start:][slice(*one["data_offsets"])], DTYPES[one["dtype"]]).reshape(one["shape"])
        for name, one in header.items()
    }


def quantized(dense: Path, output: Path, text: Path, *more: str) -> dict[str, Array]:
    assert main(["--model", str(dense), "--output", str(output), "--calibration", str(text), *more]) == 0
    return tensors_of(output)


@pytest.fixture(scope="module")
def static(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("static") / "out"
    quantized(dense, output, text, "--scheme", "fp8-static", "--kv-cache", "fp8", "--report", f"{output}.json")
    return output


def test_static_scales_are_the_largest_inputs_of_a_float64_model(static: Path, expected: CalibratingLlama) -> None:
    tensors = tensors_of(static)
    scales = {name: float(array[0]) for name, array in tensors.items() if name.endswith("input_scale")}
    assert len(scales) == 7 * NUM_LAYERS
    for module, inputs in expected.inputs.items():
        assert scales[f"{module}.input_scale"] == pytest.approx(np.abs(inputs).max() / 448, rel=1e-5)
    report = json.loads(Path(f"{static}.json").read_text())
    assert report["input_ranges"] == pytest.approx(
        {f"{module}.weight": np.abs(inputs).max() for module, inputs in expected.inputs.items()}, rel=1e-5
    )


def test_cache_scales_are_the_largest_keys_and_values_with_a_quarter_to_spare(
    static: Path, expected: CalibratingLlama
) -> None:
    tensors = tensors_of(static)
    scales = [[tensors[f"model.layers.{layer}.self_attn.{side}_scale"] for side in "kv"] for layer in range(NUM_LAYERS)]
    np.testing.assert_allclose(np.array(scales)[..., 0], 1.25 * expected.cache_amax / 448, rtol=1e-5)
    section = json.loads((static / "config.json").read_text())["quantization_config"]
    assert section["kv_cache_scheme"]["num_bits"] == 8


def test_products_with_static_inputs_are_those_of_float64(static: Path, expected: CalibratingLlama) -> None:
    tensors = tensors_of(static)
    chosen = RowCodes("fp8", input="static")
    for module, inputs in expected.inputs.items():
        codes, scale, input_scale = (
            tensors[f"{module}.{suffix}"] for suffix in ("weight", "weight_scale", "input_scale")
        )
        x, step = inputs.astype(np.float32), np.float64(input_scale[0])
        rounded = np.clip(x / step, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * step
        exact = rounded @ (codes.astype(np.float64) * scale).T
        operand = chosen.operand({"codes": codes, "scale": scale[:, 0], "input_scale": input_scale})
        found = chosen.product(x, operand, lambda one, other: one @ other.T)
        plain = x @ (codes.astype(np.float64) * scale).T
        size = np.linalg.norm(plain)
        assert np.linalg.norm(found - plain) > 0.005 * size, "inputs are rounded"
        assert np.linalg.norm(found - exact) < 2e-3 * size, "but for inputs that a last bit moves to the next code"


def test_smoothquant_divides_static_ranges_too(
    dense: Path, text: Path, tmp_path: Path, expected: CalibratingLlama
) -> None:
    arguments = ("--scheme", "fp8-static", "--method", "smoothquant", "--report", str(tmp_path / "report.json"))
    tensors = quantized(dense, tmp_path / "out", text, *arguments)
    original = load_file(dense / "model.safetensors")
    kept = json.loads((tmp_path / "report.json").read_text())["output_errors"]
    for layer in range(NUM_LAYERS):
        norm, module = f"model.layers.{layer}.input_layernorm.weight", f"model.layers.{layer}.self_attn.q_proj"
        factors = original[norm].astype(np.float64) / tensors[norm].astype(np.float64)
        assert kept[f"{module}.weight"]["is_kept"] == bool((factors != 1).any())
        largest = np.abs(expected.inputs[module] / factors).max()
        assert float(tensors[f"{module}.input_scale"][0]) == pytest.approx(largest / 448, rel=1e-4)


def logprobs(model: Path, **options: Any) -> Array:
    sizes = {"block_size": 16, "max_num_seqs": 2, "max_num_batched_tokens": 8, "num_kv_blocks": 8}
    with LLM(model, **sizes, **options) as llm:
        output = llm.generate([(5, 17, 3, 99, 42, 8, 61)], SamplingParams(max_tokens=2, prompt_logprobs=0))[0]
    assert output.prompt_logprobs is not None
    return np.array([one.logprob for one in output.prompt_logprobs if one is not None])


def test_the_cuda_engine_reads_and_uses_the_cache_scales_that_were_written(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    quantized(dense, tmp_path / "out", text, "--scheme", "w8a16", "--kv-cache", "fp8")
    expected, plain = (logprobs(tmp_path / "out", engine="numpy", kv_cache_dtype=one) for one in ("auto", "bfloat16"))
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    found = logprobs(tmp_path / "out", engine="cuda", dtype="float16")
    assert np.abs(plain - expected).mean() > 3 * np.abs(found - expected).mean()


def test_a_text_that_nothing_would_read_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path / "out"), "--calibration", str(text)]
    with pytest.raises(
        ConfigError,
        match="--calibration: has no effect without another --method, --scheme fp8-static or --kv-cache fp8",
    ):
        main(["--model", str(dense), *arguments, "--scheme", "fp8"])


def write_words(directory: Path) -> Path:
    """A tokenizer of the numbers 0 to 63, and a text of 100 of them, whose path is returned."""
    tokenizer = Tokenizer(WordLevel({str(token): token for token in range(64)}, "0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    text = directory.with_suffix(".txt")
    text.write_text(" ".join(str(token % 64) for token in range(100)))
    return text


def test_experts_get_cache_scales_but_no_static_inputs(tmp_path: Path) -> None:
    experts = write_checkpoint(CASES_BY_NAME["mixtral-plain"], tmp_path / "experts")
    arguments = ["--model", str(experts), "--calibration", str(write_words(experts))]
    with pytest.raises(
        ConfigError, match=r"has no inputs of layers\.0\.experts.* use --method rtn and a scheme without static"
    ):
        main([*arguments, "--output", str(tmp_path / "out"), "--scheme", "fp8-static"])
    assert main([*arguments, "--output", str(tmp_path / "fp8"), "--scheme", "fp8", "--kv-cache", "fp8"]) == 0
    assert "model.layers.0.self_attn.k_scale" in tensors_of(tmp_path / "fp8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "chosen", [("fp8-static", "rtn"), ("int8", "smoothquant"), ("w8a16", "awq"), ("w8a16", "gptq")], ids=str
)
def test_experts_without_inputs_are_refused_before_the_text_is_run(
    tmp_path: Path, chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of a real mixture takes minutes. The first layer of this one has no experts."""
    model = write_checkpoint(CASES_BY_NAME["qwen2_moe-renormalised-every-second"], tmp_path / "experts")
    monkeypatch.delattr(LayerRuns, "run")
    arguments = ["--model", str(model), "--calibration", str(write_words(model)), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"has no inputs of layers\.1\.experts\.gate_up"):
        main([*arguments, "--scheme", chosen[0], "--method", chosen[1]])


@pytest.mark.parametrize("arguments", [("fp8", "rtn"), ("fp8-static", "smoothquant"), ("w4a16", "gptq", "--group-size", "32")], ids=str)  # fmt: skip
def test_memory_holds_one_layer_however_many_there_are(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    scheme, method, *more = arguments

    def peak(num_layers: int) -> int:
        config = {**CASES_BY_NAME["llama-grouped-heads"].config, "hidden_size": 192, "intermediate_size": 384, "head_dim": 48,
                  "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": num_layers}  # fmt: skip
        path = write_checkpoint(CheckpointCase("deep", config), tmp_path / f"{num_layers}")
        text = write_words(path)
        command = [
            "--model",
            str(path),
            "--output",
            str(tmp_path / f"out-{num_layers}"),
            "--scheme",
            scheme,
            "--method",
            method,
        ]
        calibration = [] if method == "rtn" else ["--calibration", str(text)]
        tracemalloc.start()
        assert main([*command, *calibration, *more]) == 0
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    layer_bytes = 4 * (4 * 192 * 192 + 3 * 192 * 384)
    peak(2)  # imports and other things that are allocated once
    shutil.rmtree(tmp_path / "2")
    shutil.rmtree(tmp_path / "out-2")
    few, many = peak(2), peak(6)
    assert few > layer_bytes / 8, "something was seen"
    assert many < few + layer_bytes
