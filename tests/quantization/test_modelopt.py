"""ModelOpt's W4A16_AWQ and W8A8_SQ: what its exporter (0.47) writes, against a Llama in float64 that computes by definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.config_files import read_config
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.formats import read_formats
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.runtime.llm import LLM
from tests.support.checkpoints import CheckpointCase, write_checkpoint
from tests.support.fake_cupy import install_fake_device
from tests.support.float64_llama import Float64Llama

from . import test_checkpoints as checkpoints
from . import writers

Array = np.ndarray[Any, Any]
PROMPT = [5, 17, 3, 99, 42, 8, 61]
CASE = CheckpointCase(
    "llama-tied",
    {**checkpoints.CASE.config, "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8,
     "num_key_value_heads": 4, "tie_word_embeddings": True},
)  # fmt: skip
"""Five groups of 128 inner columns, which ranks share unevenly; heads of 32, which cut them."""

AWQ = {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": 128, "has_zero_point": False,
       "pre_quant_scale": True, "exclude_modules": ["lm_head"]}  # fmt: skip
SMOOTHQUANT = {"quant_algo": "W8A8_SQ_PER_CHANNEL", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


def in_config(fields: dict[str, Any]) -> dict[str, Any]:
    """What ``convert_hf_quant_config_format`` puts into ``config.json``: no size of groups."""
    return {
        "ignore": fields["exclude_modules"],
        "quant_algo": fields["quant_algo"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }


class Definition(Float64Llama):
    """Products of the stored tensors by the definition of each scheme."""

    def _project(self, hidden: Array, name: str) -> Array:
        codes, scale = self._weights[f"{name}.weight"], self._weights[f"{name}.weight_scale"]
        x = hidden * self._weights.get(f"{name}.pre_quant_scale", 1.0)
        if f"{name}.input_scale" in self._weights:
            step = self._weights[f"{name}.input_scale"]
            rounded = np.clip(np.rint(x / step), -128, 127)
            projected: Array = (rounded @ codes.T) * step * scale
            return projected
        rows = np.stack((codes % 16, codes // 16), axis=1).reshape(-1, codes.shape[1])
        rows = np.where(rows > 7, rows - 16, rows)
        return x @ (rows * np.repeat(scale, 128, axis=1)).T


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modelopt")
    write_checkpoint(CASE, root / "dense")
    writers.write(root / "dense", root / "awq", root / "awq-twin", writers.modelopt_awq_usual(128), in_config(AWQ))
    (root / "awq" / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": AWQ})
    )
    smoothquant = writers.modelopt_smoothquant(0.05)
    writers.write(root / "dense", root / "smoothquant", root / "sq-twin", smoothquant, in_config(SMOOTHQUANT))
    return root


def expected(path: Path) -> Array:
    logs = Definition(path).log_probabilities(PROMPT)
    scored: Array = logs[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    return scored


@pytest.mark.parametrize(("tp", "pp"), checkpoints.LAYOUTS)
def test_awq_checkpoints_compute_what_the_float64_definition_says(root: Path, tp: int, pp: int) -> None:
    found = checkpoints.logprobs(checkpoints.generate(root / "awq", tp, pp))
    np.testing.assert_allclose(found, expected(root / "awq"), atol=5e-5)


@pytest.mark.parametrize(("tp", "pp"), checkpoints.LAYOUTS)
def test_smoothquant_checkpoints_compute_what_the_float64_definition_says(root: Path, tp: int, pp: int) -> None:
    """A last bit of an input moves it to the next code here and there: far less than quantisation changes."""
    found, exact = (
        checkpoints.logprobs(checkpoints.generate(root / "smoothquant", tp, pp)),
        expected(root / "smoothquant"),
    )
    plain = checkpoints.logprobs(checkpoints.generate(root / "sq-twin"))
    assert np.abs(found - exact).mean() < 0.05 * np.abs(plain - exact).mean()


@pytest.mark.parametrize(("fields", "group"), [(AWQ, 128), ({**AWQ, "group_size": 64}, 64)])
def test_both_files_of_modelopt_say_the_same(tmp_path: Path, fields: dict[str, Any], group: int) -> None:
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": fields})
    )
    plans = []
    for section in ({}, {"quantization_config": in_config(fields)}):
        (tmp_path / "config.json").write_text(json.dumps({**CASE.config, **section}))
        plans.append(read_formats(read_config(ModelDirectory.at(tmp_path))))
    schemes = [_names(plan) for plan in plans]
    assert schemes[0] == schemes[1]
    assert schemes[0]["layers.0.down"] == f"int4 in groups of {group} with scaled inputs"
    assert schemes[0]["layers.0.qkv"] == f"int4 in groups of {group}"
    assert schemes[0]["embed"] == "dense"


def test_groups_of_128_are_what_a_config_without_a_size_means() -> None:
    plan = read_formats({"quantization_config": in_config(AWQ)})
    assert _names(plan)["layers.0.qkv"] == "int4 in groups of 128"


def _names(plan: Any) -> dict[str, str]:
    from phalanx.runtime.models import find_model

    model = find_model(CASE.config)
    specs = model.weights(model.read_config(CASE.config))
    return {spec.owner: plan.choose(spec).name for spec in specs if len(spec.parts[0].shape) > 1}


def test_factors_that_are_folded_into_the_matrix_before_need_not_be_there(root: Path, tmp_path: Path) -> None:
    """ModelOpt folds what it can, by family and version: a module has factors if they are stored."""
    writers.write(root / "dense", tmp_path / "q", tmp_path / "twin", writers.modelopt_awq(128), in_config(AWQ))
    found = checkpoints.logprobs(checkpoints.generate(tmp_path / "q", 2))
    np.testing.assert_allclose(found, expected(tmp_path / "q"), atol=5e-5)


def _changed(source: Path, target: Path, name: str, tensor: Array | None) -> Path:
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, target / "model.safetensors")
    return target


def test_parts_of_one_product_with_other_factors_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.pre_quant_scale"
    other = _changed(root / "smoothquant", tmp_path / "other", name, writers.factors(256, seed=4))
    with pytest.raises(CheckpointError, match=r"^layers\.1\.qkv: the inputs of matrices .* have different factors"):
        checkpoints.generate(other)
    without = _changed(root / "smoothquant", tmp_path / "without", name, None)
    with pytest.raises(
        CheckpointError, match=r"1\.self_attn\.q_proj\.weight have factors .*1\.self_attn\.k_proj\.weight,"
    ):
        checkpoints.generate(without)


def test_factors_that_one_layer_lacks_are_named(root: Path, tmp_path: Path) -> None:
    """Without them that layer's products came out wrong."""
    name = "model.layers.1.mlp.down_proj.pre_quant_scale"
    other = _changed(root / "smoothquant", tmp_path / "other", name, None)
    message = (
        r"1\.mlp\.down_proj\.weight have no factors .* in another layer have \(model\.layers\.0\.mlp\.down_proj\.pre"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoints.generate(other)


def test_other_factors_end_the_cuda_engine_before_it_is_ready(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """It compares them at a matrix's first product, and steps without sequences have run all products when an engine is made."""
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    name = "model.layers.1.self_attn.k_proj.pre_quant_scale"
    other = _changed(root / "smoothquant", tmp_path / "other", name, writers.factors(256, seed=4))
    with pytest.raises(CheckpointError, match=r"^layers\.1\.qkv: .* have different factors"):
        LLM(other, engine="cuda", dtype="float32", num_kv_blocks=16, max_num_seqs=3, max_num_batched_tokens=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ' cannot be loaded; use the unquantised"),
     ({"quant_algo": "MIXED_PRECISION"}, "quant_algo='MIXED_PRECISION' without quantized_layers"),
     ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4"}}},
      r"quant_algo='NVFP4' of model\.layers\.0\.mlp\.up_proj \(quantized_layers\) cannot be loaded"),
     ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {
         "model.layers.0.mlp.up_proj": {"quant_algo": "FP8"}, "model.layers.0.mlp.gate_proj": {"quant_algo": "W8A16"}}},
      "gives fp8 rows x static to .*up_proj and int8 rows to .*gate_proj, which are computed as one product"),
     ({"quant_algo": "FP8", "kv_cache_quant_algo": {"num_bits": 4, "type": "float"}}, "kv_cache_quant_algo={'num_bits': 4"),
     ({**AWQ, "has_zero_point": True}, "'W4A16_AWQ' with zero points")],
)  # fmt: skip
def test_what_is_not_loaded_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _names(read_formats({"quantization_config": {"quant_method": "modelopt", "quantization": fields}}))


MIXED = {
    "quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "exclude_modules": ["*layers.1.mlp.down_proj"],
    "quantized_layers": {
        **{f"model.layers.0.self_attn.{part}_proj": {"quant_algo": "FP8"} for part in "qkvo"},
        "model.layers.0.mlp": {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True},
        "model.layers.0.mlp.down_proj": {"quant_algo": "W8A8_SQ_PER_CHANNEL"},
        "model.layers.1.mlp": {"quant_algo": "FP8_PB_WO"},
    },
}  # fmt: skip
"""As ``hf_quant_config.json`` has it, and modules by the one that they are in."""


@pytest.mark.parametrize("place", ["hf_quant_config.json", "config.json", "both"])
def test_each_layer_has_its_own_algorithm(tmp_path: Path, place: str) -> None:
    converted = {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": MIXED["exclude_modules"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}, "producer": {"name": "modelopt"},
        "config_groups": {"group_0": {"targets": ["model.layers.0.self_attn.q_proj"]}},
        "quantized_layers": {name: dict(reversed(entry.items())) for name, entry in reversed(MIXED["quantized_layers"].items())},
    }  # fmt: skip
    if place != "config.json":
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": MIXED}))
    section = {} if place == "hf_quant_config.json" else {"quantization_config": converted}
    (tmp_path / "config.json").write_text(json.dumps({**CASE.config, **section}))
    plan = read_formats(read_config(ModelDirectory.at(tmp_path)))
    assert plan.has_kv_scales
    assert {owner: name for owner, name in _names(plan).items() if name != "dense"} == {
        "layers.0.qkv": "fp8 rows x static",
        "layers.0.output": "fp8 rows x static",
        "layers.0.gate_up": "int4 in groups of 64",
        "layers.0.down": "int8 rows x static with scaled inputs",
        "layers.1.gate_up": "fp8 blocks in groups of 128",
    }


def test_another_size_of_groups_than_the_scales_have_is_an_error(root: Path, tmp_path: Path) -> None:
    other = _changed(root / "awq", tmp_path / "other", "model.norm.weight", np.ones(256, np.float32))
    (other / "config.json").write_text(
        json.dumps({**CASE.config, "quantization_config": {**in_config(AWQ), "group_size": 64}})
    )
    with pytest.raises(CheckpointError, match=r"weight_scale' has shape \[\d+, \d\], but config.json requires"):
        checkpoints.generate(other)
