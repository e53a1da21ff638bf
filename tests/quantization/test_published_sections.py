"""``quantization_config`` as widely used checkpoints have it: each becomes what its quantiser meant, or is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.config_files import read_config
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.formats import FormatPlan, read_formats
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.runtime.models import find_model
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

from . import test_checkpoints as checkpoints
from . import writers

NULLS = {"actorder": None, "block_structure": None, "group_size": None, "observer_kwargs": {}}
CHANNEL = {**NULLS, "dynamic": False, "num_bits": 8, "observer": "minmax", "strategy": "channel", "symmetric": True}
TOKEN = {**NULLS, "dynamic": True, "num_bits": 8, "observer": None, "strategy": "token", "symmetric": True}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, layout: str, **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group}, "format": layout, "global_compression_ratio": 1.239, "ignore": ["lm_head"],
        "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "frozen", **more,
    }  # fmt: skip


FP8_DYNAMIC = compressed({**CHANNEL, "type": "float"}, {**TOKEN, "type": "float"}, "float-quantized")
FP8_STATIC = compressed(
    {**CHANNEL, "type": "float", "strategy": "tensor"},
    {**TOKEN, "type": "float", "strategy": "tensor", "dynamic": False, "observer": "minmax"}, "naive-quantized",
)  # fmt: skip
W8A8 = compressed({**CHANNEL, "type": "int"}, {**TOKEN, "type": "int"}, "int-quantized")
W4A16 = compressed(
    {**CHANNEL, "type": "int", "num_bits": 4, "strategy": "group", "group_size": 128, "actorder": "weight"}, None,
    "pack-quantized", version="0.12.2", sparsity_config={}, transform_config={},
)  # fmt: skip
FP8_BLOCK = compressed(
    {**CHANNEL, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    {**TOKEN, "type": "float", "strategy": "group", "group_size": 128}, "float-quantized",
)  # fmt: skip
THE_BLOKE_GPTQ = {
    "bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": True, "sym": True, "true_sequential": True,
    "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq",
}  # fmt: skip
QWEN_GPTQ_INT8 = {
    "batch_size": 1, "bits": 8, "block_name_to_quantize": None, "cache_block_outputs": True, "damp_percent": 0.01,
    "dataset": None, "desc_act": False, "exllama_config": {"version": 1}, "group_size": 128, "max_input_length": None,
    "model_seqlen": None, "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None,
    "pad_token_id": None, "quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True,
    "use_cuda_fp16": False, "use_exllama": True,
}  # fmt: skip
AWQ = {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm", "zero_point": True}  # fmt: skip
GPTQMODEL_AWQ = {
    "bits": 4, "group_size": 128, "desc_act": False, "sym": False, "lm_head": False, "quant_method": "awq", "pack_dtype": "int32",
    "checkpoint_format": "gemm", "format": "gemm", "meta": {"quantizer": ["gptqmodel:5.0.0"]},
}  # fmt: skip
AUTO_ROUND_AWQ = {
    "autoround_version": "0.16.1", "bits": 4, "data_type": "int", "enable_quanted_input": False, "group_size": 128,
    "modules_to_not_convert": ["lm_head"], "provider": "auto-round", "quant_method": "awq", "sym": True,
    "to_quant_block_names": "model.layers", "version": "gemm", "zero_point": False,
}  # fmt: skip
AUTO_ROUND = {
    "autoround_version": "0.9.5", "bits": 4, "data_type": "int", "group_size": 128, "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round", "sym": True,
}  # fmt: skip
"""As Intel publishes Qwen3 and MiniMax."""
OPEA = {
    "amp": True, "autoround_version": "0.4.2.dev", "backend": "auto_round:gptq:exllamav2", "batch_size": 8, "bits": 4, "data_type": "int",
    "group_size": 128, "quant_method": "intel/auto-round", "scale_dtype": "torch.float16", "sym": True, "to_quant_block_names": None,
}  # fmt: skip
MIXTRAL_AWQ = {**AWQ, "modules_to_not_convert": ["gate"]}
"""AutoAWQ's recipe for Mixtral; the head is not listed, and plain."""
QWEN_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
AUTO_FP8_KV = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "kv_cache_scheme": "static", "quant_method": "fp8"}  # fmt: skip
FBGEMM_405B = {"activation_scale_ub": 1200.0, "quant_method": "fbgemm_fp8", "modules_to_not_convert": [
    "lm_head", *(f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qkvo"),
    *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
]}  # fmt: skip
MODELOPT_FILE = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}  # fmt: skip
MODELOPT = {
    "config_groups": {"group_0": {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                                  "weights": {"dynamic": False, "num_bits": 8, "type": "float"}, "targets": ["Linear"]}},
    "ignore": ["lm_head"], "quant_algo": "FP8", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.37.0"}, "quant_method": "modelopt",
}  # fmt: skip


def schemes(plan: FormatPlan) -> dict[str, str]:
    """Of a Llama's matrices of two layers, by what the model calls them."""
    config = {**checkpoints.LLAMA.config, "num_hidden_layers": 2, "hidden_size": 256, "head_dim": 128,
              "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 512}  # fmt: skip
    model = find_model(config)
    specs = model.weights(model.read_config(config))
    return {spec.owner: plan.choose(spec).name for spec in specs if len(spec.parts[0].shape) > 1}


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (FP8_DYNAMIC, "fp8 rows x tokens"), (FP8_STATIC, "fp8 rows x static"), (W8A8, "int8 rows x tokens"),
        (W4A16, "int4 in groups of 128"), (FP8_BLOCK, "fp8 blocks in groups of 128"),
        (THE_BLOKE_GPTQ, "int4 in groups of 128 with activation order"), (QWEN_GPTQ_INT8, "int8 in groups of 128"),
        (AUTO_ROUND, "int4 in groups of 128"), (OPEA, "int4 in groups of 128"),
        (AWQ, "int4 in groups of 128"), (AUTO_ROUND_AWQ, "int4 in groups of 128"), (GPTQMODEL_AWQ, "int4 in groups of 128"), (QWEN_FP8, "fp8 blocks in groups of 128"),
        ({**QWEN_FP8, "scale_fmt": "ue8m0"}, "fp8 blocks in groups of 128 by powers of two"), (AUTO_FP8_KV, "fp8 rows x static"),
        (MODELOPT, "fp8 rows x static"), ({"quant_method": "modelopt", **MODELOPT_FILE}, "fp8 rows x static"),
    ],
)  # fmt: skip
def test_sections_of_published_checkpoints_are_read(section: dict[str, Any], name: str) -> None:
    plan = read_formats({"quantization_config": section})
    found = schemes(plan)
    assert {scheme for owner, scheme in found.items() if owner.startswith("layers.")} == {name}
    assert found["embed"] == found.get("lm_head", "dense") == "dense"
    promises_cache = section.get("kv_cache_scheme") or section.get("quantization", {}).get("kv_cache_quant_algo")
    assert plan.has_kv_scales == bool(promises_cache)


def test_modules_that_are_named_one_by_one_stay_as_they_are() -> None:
    found = schemes(read_formats({"quantization_config": FBGEMM_405B}))
    quantised = {owner for owner, scheme in found.items() if scheme == "fp8 rows x tokens up to a bound"}
    assert quantised == {"layers.1.gate_up", "layers.1.down"}
    inside = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
    section = {**QWEN_GPTQ_INT8, "modules_in_block_to_quantize": inside}
    found = schemes(read_formats({"quantization_config": section}))
    assert {owner for owner, scheme in found.items() if scheme != "dense"} == {
        f"layers.{layer}.{owner}" for layer in range(2) for owner in ("qkv", "gate_up")
    }


def test_symmetric_awq_holds_zero_points_as_other_awq_does(dense: Path, tmp_path: Path) -> None:
    """All of them 8, in words of 0x88888888."""

    def symmetric(w: checkpoints.Array) -> writers.Written:
        codes, scales, zeros = writers.grouped(w, 4, 16, True, np.float16)
        assert (zeros == 8).all()
        tensors = {
            "qweight": writers.pack(codes.T, 4, writers.AWQ_ORDER),
            "qzeros": np.full((zeros.shape[1], len(zeros) // 8), 0x88888888, np.uint32).view(np.int32),
            "scales": scales.T,
        }
        return tensors, writers.values_of(codes, scales, zeros, 16)

    section = {**AUTO_ROUND_AWQ, "group_size": 16}
    writers.write(dense, tmp_path / "quantised", tmp_path / "twin", symmetric, section)
    found, expected = (checkpoints.logprobs(checkpoints.generate(tmp_path / path)) for path in ("quantised", "twin"))
    np.testing.assert_array_equal(found, expected)


def test_the_head_of_an_awq_mixtral_is_plain_though_only_routers_are_listed(tmp_path: Path) -> None:
    case = CASES_BY_NAME["mixtral-plain"]
    dense = write_checkpoint(case, tmp_path / "dense")
    as_it_is = lambda w: ({"weight": w}, w)  # noqa: E731
    modules = {".gate.": as_it_is, "": writers.awq(8)}
    paths = tmp_path / "quantised", tmp_path / "twin"
    writers.write(dense, *paths, modules, {**MIXTRAL_AWQ, "group_size": 8})
    found, expected = (checkpoints.logprobs(checkpoints.generate(path)) for path in paths)
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("name", ["gptq-4-v1", "ct-w4-g16-asymmetric", "hf-fp8-blocks"])
def test_routers_that_are_plain_are_read_as_such_though_no_rule_names_them(tmp_path: Path, name: str) -> None:
    """GPTQ has no list of what stays as it is (Qwen3-30B-A3B-GPTQ-Int4); transformers 5 has routers that are no linear modules."""
    module, section = checkpoints.ALL[name]
    dense = write_checkpoint(checkpoints.MIXTRAL, tmp_path / "dense")
    outputs = []
    for kind, router in (("plain", writers.as_it_is), ("quantised", module)):
        paths = tmp_path / kind, tmp_path / f"{kind}-twin"
        writers.write(dense, *paths, {".gate.": router, "": module}, section)
        outputs.append([checkpoints.logprobs(checkpoints.generate(path)) for path in paths])
        if name in checkpoints.WEIGHT_ONLY:
            np.testing.assert_allclose(*outputs[-1], atol=5e-5)
    assert not np.array_equal(outputs[0][0], outputs[1][0]), "a router that is quantised is read as quantised"


def test_a_router_of_codes_without_a_scale_is_no_plain_one(tmp_path: Path) -> None:
    module, section = checkpoints.ALL["hf-fp8-blocks"]
    dense = write_checkpoint(checkpoints.MIXTRAL, tmp_path / "dense")
    codes = lambda w: ({"weight": module(w)[0]["weight"]}, w)  # noqa: E731
    writers.write(dense, tmp_path / "codes", tmp_path / "twin", {".gate.": codes, "": module}, section)
    with pytest.raises(CheckpointError, match=r"gate\.weight"):
        checkpoints.generate(tmp_path / "codes")


def test_rules_of_gptqmodel_leave_modules_out_or_change_their_fields() -> None:
    rules = {
        r"-:.*\.1\.mlp\.down": {}, r"+:.*mlp\.(gate|up)": {"bits": 4, "group_size": 32}, r".*\.mlp": {"desc_act": True},
        r"self_attn": {"bits": 4}, "-:.*embed": {},
    }  # fmt: skip
    found = schemes(read_formats({"quantization_config": {**QWEN_GPTQ_INT8, "dynamic": rules}}))
    assert {owner: name for owner, name in found.items() if name != "dense"} == {
        **{f"layers.{layer}.{owner}": "int8 in groups of 128" for layer in range(2) for owner in ("qkv", "output")},
        **{f"layers.{layer}.gate_up": "int4 in groups of 32" for layer in range(2)},
        "layers.0.down": "int8 in groups of 128 with activation order",
    }


@pytest.mark.parametrize("has_head", [True, False])
def test_rules_of_gptqmodel_quantise_nothing_that_other_fields_leave_out(has_head: bool) -> None:
    """GPTQModel comes to the rules of a module only once ``lm_head`` and ``modules_in_block_to_quantize`` have let it pass."""
    fields = {
        "lm_head": has_head,
        "modules_in_block_to_quantize": [["mlp.down_proj"]],
        "dynamic": {"+:.*": {"bits": 4}},
    }
    found = schemes(read_formats({"quantization_config": {**QWEN_GPTQ_INT8, **fields}}))
    assert {owner for owner, name in found.items() if name == "int4 in groups of 128"} == {
        "layers.0.down", "layers.1.down", *(["lm_head"] if has_head else [])
    }  # fmt: skip
    assert set(found.values()) == {"int4 in groups of 128", "dense"}


@pytest.mark.parametrize("is_first", [True, False])
def test_the_most_specific_target_decides_whichever_group_comes_first(is_first: bool) -> None:
    (everything,) = FP8_DYNAMIC["config_groups"].values()
    weight_only = {**everything, "input_activations": None}
    groups = [
        everything,
        {**weight_only, "targets": ["re:.*down_proj", "re:model.layers.1.*o_proj"]},
        {**everything, "targets": ["model.layers.1.mlp.down_proj"]},
    ]
    named = {f"group_{n}": group for n, group in enumerate(groups if is_first else groups[::-1])}
    found = schemes(read_formats({"quantization_config": {**FP8_DYNAMIC, "config_groups": named}}))
    plain = {owner for owner, name in found.items() if name == "fp8 rows"}
    assert plain == {"layers.0.down", "layers.1.output"}


def with_weights(section: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The section with other fields of weights; None = without the field."""
    ((name, group),) = section["config_groups"].items()
    weights = {key: value for key, value in {**group["weights"], **fields}.items() if value is not None}
    return {**section, "config_groups": {name: {**group, "weights": weights}}}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": with_weights(FP8_BLOCK, block_structure="128x128")}, "fp8 blocks in groups of 128"),
        ({"quantization_config": with_weights(W4A16, strategy=None)}, "int4 in groups of 128"),
        ({"quantization_config": with_weights(W4A16, strategy=None, group_size=-1)}, "int4 by rows"),
        ({"quantization_config": with_weights(FP8_STATIC, strategy=None, type="FLOAT")}, "fp8 rows x static"),
        ({"quantization_config": with_weights(W8A8, strategy="CHANNEL")}, "int8 rows x tokens"),
        ({"compression_config": {"quantization_config": W4A16, "sparsity_config": {}}}, "int4 in groups of 128"),
    ],
)  # fmt: skip
def test_spellings_of_early_releases_are_read(config: dict[str, Any], name: str) -> None:
    found = schemes(read_formats(config))
    assert {scheme for owner, scheme in found.items() if owner.startswith("layers.")} == {name}


def test_modules_of_a_group_without_weights_stay_as_they_are() -> None:
    (everything,) = W4A16["config_groups"].values()
    plain = {"targets": ["re:.*down_proj"], "weights": None, "input_activations": None, "output_activations": None}
    groups = {"group_0": everything, "UNQUANTIZED": plain}
    found = schemes(read_formats({"quantization_config": {**W4A16, "config_groups": groups}}))
    assert {owner for owner, scheme in found.items() if scheme == "dense"} >= {"layers.0.down", "layers.1.down"}
    assert found["layers.0.output"] == "int4 in groups of 128"


@pytest.mark.parametrize("section", [QWEN_FP8, FBGEMM_405B, AWQ], ids=lambda section: str(section["quant_method"]))
@pytest.mark.parametrize(
    ("excluded", "plain"),
    [
        (["mlp.gate"], set()), (["model.layers.1"], {"layers.1.qkv", "layers.1.output", "layers.1.gate_up", "layers.1.down"}),
        (["layers.1.self_attn."], {"layers.1.qkv", "layers.1.output"}), (["model.layer"], set()),
        ([r"model\.layers\.[0-9]\.mlp\.down_proj"], {"layers.0.down", "layers.1.down"}),
        (["(?i)MODEL.layers.1.mlp", "(?i)x"], {"layers.1.gate_up", "layers.1.down"}),
        ([r"(mode)l\.layers\.0\.mlp", r"(m)odel\.layers\.1\.\1lp"], {"layers.0.gate_up", "layers.0.down", "layers.1.gate_up", "layers.1.down"}),
    ],
    ids=lambda value: str(sorted(value)),
)  # fmt: skip
def test_exclusions_end_where_a_component_of_a_path_does(
    section: dict[str, Any], excluded: list[str], plain: set[str]
) -> None:
    found = schemes(
        read_formats({"quantization_config": {**section, "modules_to_not_convert": ["lm_head", *excluded]}})
    )
    assert {owner for owner, name in found.items() if name == "dense" and owner.startswith("layers.")} == plain


def test_rules_of_auto_round_are_names_or_expressions() -> None:
    """Names are whole ones and come first, as in AutoRound and vLLM."""
    rules = {
        ".*mlp.*": {"bits": 8, "group_size": 64}, "model.layers.1.mlp.down_proj": {"bits": 4},
        "model.layers.1.self_attn.o_proj": {"bits": 16, "data_type": "fp"}, ".*up_proj": {"bits": 16}, "lm_head": {"bits": 8, "group_size": None},
    }  # fmt: skip
    found = schemes(
        read_formats({"quantization_config": {**AUTO_ROUND, "block_name_to_quantize": "layers", "extra_config": rules}})
    )
    assert {owner: name for owner, name in found.items() if owner.startswith("layers.1.")} == {
        "layers.1.qkv": "int4 in groups of 128", "layers.1.output": "dense",
        "layers.1.gate_up": "int8 in groups of 64", "layers.1.down": "int4 in groups of 128",
    }  # fmt: skip
    assert (found["layers.0.down"], found["lm_head"]) == ("int8 in groups of 64", "int8 in groups of 128")
    everything = {**AUTO_ROUND, "extra_config": {".*": {"bits": 8}}}
    assert schemes(read_formats({"quantization_config": everything}))["lm_head"] == "dense"


@pytest.mark.parametrize(
    "blocks", ["model.layers.0.,model.language_model.layers.1", [["model.layers.0.mlp", "model.layers.0.self_attn"]]]
)
def test_blocks_outside_the_list_of_auto_round_are_what_is_stored(dense: Path, tmp_path: Path, blocks: object) -> None:
    modules = {"layers.1.self_attn": writers.as_it_is, "": writers.gptq(4, 16, symmetric=False, v1=True)}
    section = {**AUTO_ROUND, "group_size": 16, "sym": False, "block_name_to_quantize": blocks}
    writers.write(dense, tmp_path / "quantised", tmp_path / "twin", modules, section)
    weights, twin = (checkpoints.load(tmp_path / path, 1, 0) for path in ("quantised", "twin"))
    for owner in ("layers.0.qkv", "layers.1.qkv", "layers.1.down"):
        weight = weights.linear(owner)
        assert (weight.format.name == "dense") == (owner == "layers.1.qkv")
        np.testing.assert_array_equal(
            weight.format.dequantize(weight.components), twin.linear(owner).components["weight"]
        )


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize(
    "excluded", [["gate", "up"], [r"model\.layers\.\d\.mlp\.gate", r"(?i)MODEL.*\.up"]], ids=["names", "expressions"]
)
@pytest.mark.parametrize("name", ["awq", "fbgemm"])
def test_a_name_that_ends_within_a_component_excludes_what_is_stored_plain(
    tmp_path: Path, name: str, excluded: list[str], is_plain: bool
) -> None:
    """AutoAWQ leaves ``gate_proj`` and ``up_proj`` out for ``["gate", "up"]``, transformers for the beginnings of their paths."""
    write_checkpoint(checkpoints.CASE, tmp_path / "dense")
    module, section = checkpoints.ALL[name]
    modules = {".gate_proj": writers.as_it_is, ".up_proj": writers.as_it_is, "": module} if is_plain else module
    section = {**section, "modules_to_not_convert": ["lm_head", *excluded]}
    writers.write(tmp_path / "dense", tmp_path / "quantised", tmp_path / "twin", modules, section)
    weights, twin = (checkpoints.load(tmp_path / path, 1, 0) for path in ("quantised", "twin"))
    for owner in ("layers.0.gate_up", "layers.1.down"):
        weight, expected = weights.linear(owner), twin.linear(owner).components["weight"]
        assert (weight.format.name == "dense") == (is_plain and "gate" in owner)
        np.testing.assert_array_equal(weight.format.dequantize(weight.components), expected)


@pytest.mark.parametrize(
    ("name", "names"),
    [("hf-fp8-blocks", {"weight_scale_inv": "scale"}), ("hf-fp8-blocks", {"weight_scale_inv": "qscale_weight"}),
     ("modelopt-fp8", {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}),
     ("modelopt-fp8", {"weight_scale": "qscale_weight", "input_scale": "qscale_act"})],
)  # fmt: skip
def test_scales_of_fp8_have_several_names(dense: Path, tmp_path: Path, name: str, names: dict[str, str]) -> None:
    module, section = checkpoints.ALL[name]

    def renamed(w: checkpoints.Array) -> writers.Written:
        tensors, values = module(w)
        return {names.get(suffix, suffix): tensor for suffix, tensor in tensors.items()}, values

    for path, one in (("usual", module), ("other", renamed)):
        writers.write(dense, tmp_path / path, tmp_path / f"{path}-twin", one, section)
    usual, other = (checkpoints.logprobs(checkpoints.generate(tmp_path / path)) for path in ("usual", "other"))
    np.testing.assert_array_equal(other, usual)


ROTATED = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({**W4A16, "transform_config": ROTATED}, "with transforms"),
        ({**FP8_DYNAMIC, "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}}, "kv_cache_scheme="),
        (compressed({**CHANNEL, "type": "float"}, {**TOKEN, "type": "float", "strategy": "tensor"}, "float-quantized"),
         "activations strategy='tensor' dynamic=True"),
        ({**QWEN_FP8, "scale_fmt": "e5m2"}, "fp8 with scale_fmt='e5m2'"),
        ({**AUTO_FP8_KV, "kv_cache_scheme": "dynamic"}, "kv_cache_scheme='dynamic'"),
        ({**MODELOPT, "kv_cache_scheme": "NVFP4"}, "kv_cache_quant_algo='NVFP4'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ'"),
        ({**GPTQMODEL_AWQ, "checkpoint_format": "gemv_fast", "format": "gemv_fast"}, "awq version='gemv_fast'"),
        ({**GPTQMODEL_AWQ, "dynamic": {"-:.*down.*": {}}}, "awq with rules per module"),
        ({**AWQ, "checkpoint_format": "gemv"}, "awq version='gemm and gemv'"),
        ({**QWEN_GPTQ_INT8, "checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format='gptq and gptq_v2'"),
        ({**QWEN_GPTQ_INT8, "dynamic": {"-:(down": {}}}, r"gptq rule '-:\(down' \(missing \)"),
        ({**QWEN_GPTQ_INT8, "dynamic": {".*down.*": {"bits": 3}}}, "gptq bits=3"),
        ({**QWEN_GPTQ_INT8, "dynamic": {".*down.*": 4}}, "is not an object of fields"),
        ({**AUTO_ROUND, "packing_format": "auto_round:llm_compressor"}, "packing_format='auto_round:llm_compressor' cannot"),
        ({**OPEA, "backend": "auto_round:exllamav2", "sym": False}, "packing_format='auto_round:exllamav2' cannot"),
        ({**AUTO_ROUND, "bits": 2}, "gptq bits=2"),
        ({**AUTO_ROUND, "act_bits": 8}, "auto-round act_bits=8"),
        ({**AUTO_ROUND, "data_type": "mx_fp"}, "auto-round data_type='mx_fp'"),
        ({**AUTO_ROUND, "static_kv_dtype": "fp8"}, "auto-round with static_kv_dtype=fp8"),
        ({**AUTO_ROUND, "extra_config": {".*(down": {}}}, r"auto-round rule '\.\*\(down' \(missing \)"),
    ],
)  # fmt: skip
def test_what_would_be_computed_wrongly_is_refused_by_name(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_formats({"quantization_config": section})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(checkpoints.CASE, tmp_path_factory.mktemp("published") / "dense")


def test_a_file_of_the_quantiser_stands_in_for_config_json_and_must_not_contradict_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.CASE.config))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(MODELOPT_FILE))
    plan = read_formats(read_config(ModelDirectory.at(tmp_path)))
    assert plan.has_kv_scales
    assert schemes(plan)["layers.0.qkv"] == "fp8 rows x static"
    (tmp_path / "config.json").write_text(json.dumps({**checkpoints.CASE.config, "quantization_config": {**MODELOPT, "quant_algo": "NVFP4"}}))  # fmt: skip
    with pytest.raises(ConfigError, match=r"quant_algo is 'NVFP4' in .*, but 'FP8' in hf_quant_config.json"):
        read_config(ModelDirectory.at(tmp_path))
    (tmp_path / "hf_quant_config.json").unlink()
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": False}))
    (tmp_path / "config.json").write_text(json.dumps({**checkpoints.CASE.config, "quantization_config": THE_BLOKE_GPTQ}))  # fmt: skip
    with pytest.raises(ConfigError, match=r"group_size is 128 in .*, but 64 in quantize_config\.json"):
        read_config(ModelDirectory.at(tmp_path))


@pytest.mark.parametrize(
    ("file", "own", "found", "message"),
    [
        ("quantize_config.json", {**THE_BLOKE_GPTQ, "checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"},
         "checkpoint_format is 'gptq' in .*, but 'gptq_v2' in quantize_config"),
        ("quantize_config.json", {**THE_BLOKE_GPTQ, "format": "gptq"}, {"checkpoint_format": "gptq_v2"}, "checkpoint_format is"),
        ("quantize_config.json", THE_BLOKE_GPTQ, {"desc_act": False}, "desc_act is True in .*, but False"),
        ("quantize_config.json", THE_BLOKE_GPTQ, {"sym": False}, "sym is True in .*, but False"),
        ("quantize_config.json", THE_BLOKE_GPTQ, {"true_sequential": False}, "true_sequential is True"),
        ("quantize_config.json", {**THE_BLOKE_GPTQ, "modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.gate_proj"]]},
         {"modules_in_block_to_quantize": ["mlp.down_proj"]}, "modules_in_block_to_quantize is"),
        ("quant_config.json", AWQ, {"w_bit": 8}, "bits is 4 in .*, but 8 in quant_config"),
        ("quant_config.json", AWQ, {"q_group_size": 64}, "group_size is 128 in .*, but 64"),
        ("quant_config.json", AWQ, {"zero_point": False}, "zero_point is True"),
        ("quant_config.json", {**AWQ, "modules_to_not_convert": ["lm_head"]}, {"modules_to_not_convert": ["gate"]},
         "modules_to_not_convert is"),
        ("hf_quant_config.json", MODELOPT, {"quantization": {"exclude_modules": ["lm_head", "*.down_proj"]}}, "exclude_modules is"),
        ("hf_quant_config.json", MODELOPT, {"quantization": {"kv_cache_quant_algo": "NVFP4"}}, "kv_cache_quant_algo is"),
    ],
)  # fmt: skip
def test_a_field_of_which_the_two_descriptions_disagree_is_named_with_both_values(
    tmp_path: Path, file: str, own: dict[str, Any], found: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**checkpoints.CASE.config, "quantization_config": own}))
    (tmp_path / file).write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=message):
        read_config(ModelDirectory.at(tmp_path))


@pytest.mark.parametrize(
    ("file", "own", "found"),
    [
        ("quantize_config.json", THE_BLOKE_GPTQ, {**THE_BLOKE_GPTQ, "model_name_or_path": "/tmp/out", "damp_percent": 0.01}),
        ("quantize_config.json", {**THE_BLOKE_GPTQ, "modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.gate_proj"]]},
         {"modules_in_block_to_quantize": ["mlp.gate_proj", "mlp.up_proj"]}),
        ("quant_config.json", AWQ, {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}),
        ("hf_quant_config.json", MODELOPT, MODELOPT_FILE),
    ],
)  # fmt: skip
def test_two_descriptions_that_agree_in_other_words_are_read_as_one(
    tmp_path: Path, file: str, own: dict[str, Any], found: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**checkpoints.CASE.config, "quantization_config": own}))
    (tmp_path / file).write_text(json.dumps(found))
    alone, both = read_formats({"quantization_config": own}), read_formats(read_config(ModelDirectory.at(tmp_path)))
    assert schemes(both) == schemes(alone)
    assert both.has_kv_scales == alone.has_kv_scales


def test_an_fp8_cache_and_exclusions_that_the_file_alone_names_are_read(tmp_path: Path) -> None:
    own = {key: value for key, value in MODELOPT.items() if key not in ("kv_cache_scheme", "ignore")}
    (tmp_path / "config.json").write_text(json.dumps({**checkpoints.CASE.config, "quantization_config": own}))
    fields = {**MODELOPT_FILE["quantization"], "exclude_modules": ["lm_head", "*.down_proj"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({**MODELOPT_FILE, "quantization": fields}))
    plan = read_formats(read_config(ModelDirectory.at(tmp_path)))
    assert plan.has_kv_scales
    dense = {owner for owner, name in schemes(plan).items() if owner.startswith("layers.") and name == "dense"}
    assert dense == {"layers.0.down", "layers.1.down"}


def test_zero_points_of_gptq_v2_that_the_file_alone_names_are_not_taken_for_those_of_v1(
    dense: Path, tmp_path: Path
) -> None:
    quantised, twin = gptq(dense, tmp_path, symmetric=False, v1=False)
    config = json.loads((quantised / "config.json").read_text())
    form = config["quantization_config"].pop("checkpoint_format")
    (quantised / "config.json").write_text(json.dumps(config))
    (quantised / "quantize_config.json").write_text(json.dumps({"bits": 4, "checkpoint_format": form}))
    found, expected = (checkpoints.logprobs(checkpoints.generate(path)) for path in (quantised, twin))
    np.testing.assert_allclose(found, expected, atol=5e-5)


def gptq(dense: Path, path: Path, symmetric: bool = True, v1: bool = True) -> tuple[Path, Path]:
    module, section = checkpoints._gptq(4, 16, symmetric, v1)
    writers.write(dense, path / "quantised", path / "twin", module, section)
    return path / "quantised", path / "twin"


def change(path: Path, name: str, tensor: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {name: tensor}, path / "model.safetensors")


def test_biases_of_zeros_that_autogptq_adds_are_looked_at_and_left_out(dense: Path, tmp_path: Path) -> None:
    quantised, twin = gptq(dense, tmp_path)
    rows = len(load_file(twin / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"])
    change(quantised, "model.layers.1.self_attn.o_proj.bias", np.zeros(rows, np.float16))
    output, expected = checkpoints.generate(quantised), checkpoints.generate(twin)
    np.testing.assert_allclose(checkpoints.logprobs(output), checkpoints.logprobs(expected), atol=5e-5)
    change(quantised, "model.layers.1.self_attn.o_proj.bias", np.full(rows, 0.5, np.float16))
    with pytest.raises(CheckpointError, match=r"o_proj\.bias', which the model does not use, does not hold zeros"):
        checkpoints.generate(quantised)


def test_an_order_of_groups_that_desc_act_denies_is_an_error(dense: Path, tmp_path: Path) -> None:
    quantised, _ = gptq(dense, tmp_path)
    name = "model.layers.0.mlp.down_proj.g_idx"
    change(quantised, name, load_file(quantised / "model.safetensors")[name][::-1].copy())
    with pytest.raises(CheckpointError, match="does not hold groups of 16 columns in order"):
        checkpoints.generate(quantised)


@pytest.mark.parametrize("v1", [True, False])
def test_symmetric_zero_points_mean_the_same_under_either_label(dense: Path, tmp_path: Path, v1: bool) -> None:
    quantised, twin = gptq(dense, tmp_path, v1=v1)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2" if v1 else "gptq"  # mislabelled
    (quantised / "config.json").write_text(json.dumps(config))
    for weight in (loaded := checkpoints.load(quantised, 1, 0)).values():
        expected = checkpoints.load(twin, 1, 0).linear(weight.name) if weight.format.name != "dense" else None
        if expected is not None:
            values = weight.format.dequantize(weight.components)
            np.testing.assert_array_equal(values, expected.components["weight"])
    assert loaded


def test_a_checkpoint_that_says_symmetric_with_other_zero_points_is_an_error(dense: Path, tmp_path: Path) -> None:
    quantised, _ = gptq(dense, tmp_path, symmetric=False)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="says sym=true, but zero points are"):
        checkpoints.load(quantised, 1, 0)


def test_cache_scales_of_autofp8_are_read(dense: Path, tmp_path: Path) -> None:
    section = {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static", "ignored_layers": ["lm_head"]}  # fmt: skip
    scales = {
        f"model.layers.{layer}.self_attn.kv_scale": np.array(0.02, np.float32)
        for layer in range(checkpoints.CASE.config["num_hidden_layers"])
    }
    writers.write(dense, tmp_path / "kv", tmp_path / "twin", writers.fp8("tensor", input_scale=0.02), section, scales)
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "kv", plain)
    cached, other = (
        checkpoints.logprobs(checkpoints.generate(plain, kv_cache_dtype=one)) for one in ("auto", "float32")
    )
    assert 0 < np.abs(cached - other).mean() < 0.4
