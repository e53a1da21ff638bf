"""Quantised checkpoints with a field or a tensor that is not what it should be: one line that names it, before anything is computed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.formats import read_formats
from phalanx.parallel.errors import CheckpointError, ConfigError
from tests.support.checkpoints import write_checkpoint
from tests.support.fake_cupy import install_fake_device

from . import test_checkpoints as checkpoints

Array = np.ndarray[Any, Any]
MODULE = "model.layers.1.mlp.down_proj"
STORED = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16,
          "I32": np.int32, "I64": np.int64, "I8": np.int8}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damaged")
    write_checkpoint(checkpoints.CASE, root / "dense")
    return root


def damaged(root: Path, target: Path, name: str, **changes: Array | None) -> Path:
    """The checkpoint ``name`` with other tensors of a module by suffix; None = without."""
    quantised, _ = checkpoints.written(root, name)
    data = (quantised / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {
        key: np.frombuffer(data[start:][slice(*one["data_offsets"])], STORED[one["dtype"]]).reshape(one["shape"])
        for key, one in header.items()
    }
    tensors |= {f"{MODULE}.{suffix}": array for suffix, array in changes.items() if array is not None}
    for suffix in (suffix for suffix, array in changes.items() if array is None):
        del tensors[f"{MODULE}.{suffix}"]
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((quantised / "config.json").read_text())
    return target


def scales(rows: int, value: float) -> Array:
    result = np.full((rows, 1), 0.01, np.float32)
    result[3] = value
    return result


@pytest.mark.parametrize(
    ("name", "suffix", "array", "message"),
    [
        ("ct-int8", "weight_scale", scales(64, np.nan), "weight_scale': holds nan for a scale, which has to be finite;"),
        ("ct-fp8-channel", "weight_scale", scales(64, np.inf), "weight_scale': holds inf for a scale"),
        ("awq", "scales", np.full((15, 64), np.nan, np.float16), "scales': holds nan for a scale"),
        ("ct-fp8-static", "input_scale", np.zeros(1, np.float32), "input_scale': holds 0.0 for a scale, which has to be finite and above zero"),
        ("ct-int8-static", "input_scale", np.full(1, -1, np.float32), "input_scale': holds -1.0 for a scale"),
        ("modelopt-fp8", "input_scale", np.full(1, np.inf, np.float32), "input_scale': holds inf for a scale"),
        ("modelopt-smoothquant", "pre_quant_scale", np.zeros(240, np.float32), "pre_quant_scale': holds 0.0 for a scale"),
    ],
)  # fmt: skip
def test_scales_that_no_value_can_have_are_named(
    root: Path, tmp_path: Path, name: str, suffix: str, array: Array, message: str,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """They came out as NaN at the first request, or as other inputs at all."""
    path = damaged(root, tmp_path / "damaged", name, **{suffix: array})
    with pytest.raises(CheckpointError, match=rf"^tensor 'model\.layers\.1\.mlp\.down_proj\.{message}"):
        checkpoints.generate(path)
    install_fake_device(monkeypatch, request.config.cache.mkdir("emulated-kernels"))
    with pytest.raises(CheckpointError, match=message):
        checkpoints.generate(path, engine="cuda", dtype="float16")


def test_a_scale_of_zero_means_weights_of_zero(root: Path, tmp_path: Path) -> None:
    """Packers store what is too small for float16 as zero."""
    path = damaged(root, tmp_path / "zero", "awq", scales=np.zeros((15, 64), np.float16))
    weight = checkpoints.load(path, 1, 0).linear("layers.1.down")
    assert not weight.format.dequantize(weight.components).any()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ct-int8", {"weight_scale": None}, rf"says that {MODULE} is quantised, but .* has {MODULE}\.weight without weight_scale"),
        ("ct-int8", {"weight_scale": scales(63, 1.0)}, r"has shape \[63, 1\], but config\.json requires \[64\]"),
        ("ct-w4-g64", {"weight_scale": np.ones((64, 5), np.float32)}, r"has shape \[64, 5\], but config\.json requires \[64, 4\]; .* or describes another quantisation"),
        ("ct-int8", {"weight": np.zeros((64, 240), np.float32)}, "is stored as F32, but its quantisation scheme requires I8"),
    ],
)  # fmt: skip
def test_tensors_and_rules_that_disagree_are_both_named(
    root: Path, tmp_path: Path, name: str, changes: dict[str, Array | None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoints.generate(damaged(root, tmp_path / "damaged", name, **changes))


@pytest.mark.parametrize(
    ("name", "changes", "packed"),
    [
        ("ct-w4-g64", {"ignore": ["lm_head", MODULE]}, "weight_packed"),
        ("awq", {"modules_to_not_convert": [MODULE]}, "qweight"),
        ("gptq-4-v1", {"dynamic": {rf"-:{MODULE}": {}}}, "qweight"),
    ],
)
def test_packed_words_of_a_module_that_a_rule_leaves_out_are_named(
    root: Path, tmp_path: Path, name: str, changes: dict[str, Any], packed: str
) -> None:
    """They came out as a missing shard."""
    section = {**checkpoints.ALL[name][1], **changes}
    path = checkpoints.changed(checkpoints.written(root, name)[0], tmp_path / "changed", section)
    with pytest.raises(
        CheckpointError, match=rf"says that {MODULE} stays as it is, but .* has {MODULE}\.{packed} instead of"
    ):
        checkpoints.generate(path)


def test_codes_that_no_scheme_describes_are_not_to_be_converted(root: Path, tmp_path: Path) -> None:
    quantised, _ = checkpoints.written(root, "ct-int8")
    path = checkpoints.changed(quantised, tmp_path / "changed", {})
    codes = {name: array for name, array in load_file(path / "model.safetensors").items() if "scale" not in name}
    save_file(codes, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"stored as I8, but config\.json names no quantisation scheme"):
        checkpoints.generate(path)


@pytest.mark.parametrize(
    ("name", "suffix", "array", "message"),
    [
        ("ct-w4-g64", "weight_shape", np.array([64, 239]), "weight_shape', .* does not hold the sizes of a matrix"),
        ("ct-w4-g64", "weight_g_idx", np.full(239, -1, np.int32), "weight_g_idx', .* does not hold groups of 64 columns in order"),
        ("ct-w4-g64", "weight_zero_point", np.zeros((8, 4), np.int32), "weight_zero_point', .* does not hold unpacked zeros, as symmetric=true says;"),
        ("ct-int8", "weight_zero_point", np.ones((64, 1), np.int8), "weight_zero_point', .* does not hold unpacked zeros"),
        ("ct-int8-static", "input_zero_point", np.full(1, -3, np.int8), "input_zero_point', .* does not hold unpacked zeros"),
        ("gptq-4-v1", "g_idx", (np.arange(239) // 16).astype(np.int32), "g_idx', .* does not hold groups of 16 columns in order"),
    ],
)  # fmt: skip
def test_what_repeats_the_config_and_contradicts_it_is_named(
    root: Path, tmp_path: Path, name: str, suffix: str, array: Array, message: str
) -> None:
    path = damaged(root, tmp_path / "damaged", name, **{suffix: array})
    with pytest.raises(CheckpointError, match=message):
        checkpoints.generate(path)


@pytest.mark.parametrize("index", [np.full(240, -1), np.arange(240) // 64], ids=["unset", "in order"])
def test_an_index_of_groups_in_order_is_looked_at_and_left_out(root: Path, tmp_path: Path, index: Array) -> None:
    path = damaged(root, tmp_path / "indexed", "ct-w4-g64", weight_g_idx=index.astype(np.int32))
    expected = checkpoints.logprobs(checkpoints.generate(checkpoints.written(root, "ct-w4-g64")[0]))
    np.testing.assert_array_equal(checkpoints.logprobs(checkpoints.generate(path)), expected)


@pytest.mark.parametrize(
    ("name", "suffix", "shape"),
    [("ct-int8", "weight_zero_point", (64, 1)), ("ct-int8-static", "input_zero_point", (1,)),
     ("ct-fp8-static", "input_zero_point", (1,)), ("ct-w4-g64", "weight_zero_point", (64, 4))],
)  # fmt: skip
def test_zero_points_of_symmetric_codes_are_looked_at_and_left_out(
    root: Path, tmp_path: Path, name: str, suffix: str, shape: tuple[int, ...]
) -> None:
    """The first releases of compressed-tensors stored them, all zero."""
    path = damaged(root, tmp_path / "symmetric", name, **{suffix: np.zeros(shape, np.int8)})
    expected = checkpoints.logprobs(checkpoints.generate(checkpoints.written(root, name)[0]))
    np.testing.assert_array_equal(checkpoints.logprobs(checkpoints.generate(path)), expected)


def test_an_order_of_groups_that_actorder_denies_is_an_error(root: Path, tmp_path: Path) -> None:
    index = (np.arange(240) // 64)[::-1].astype(np.int32)
    path = damaged(root, tmp_path / "indexed", "ct-w4-g64", weight_g_idx=index.copy())
    with pytest.raises(
        CheckpointError, match=r"weight_g_idx', .* does not hold groups of 64 columns in order, as actorder says"
    ):
        checkpoints.generate(path)


@pytest.mark.parametrize("name", ["ct-int8", "awq", "hf-fp8-blocks"])
def test_biases_that_are_missing_are_not_taken_for_quantisation(root: Path, tmp_path: Path, name: str) -> None:
    quantised, _ = checkpoints.written(root, name)
    path = checkpoints.changed(quantised, tmp_path / "biased", checkpoints.ALL[name][1])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(CheckpointError, match=r"lacks 8 of \d+ tensors that config.json requires: .*k_proj\.bias"):
        checkpoints.generate(path)


@pytest.mark.parametrize("ignore", [[], None])
def test_a_head_that_no_rule_leaves_out_is_named(root: Path, tmp_path: Path, ignore: Any) -> None:
    quantised, _ = checkpoints.written(root, "ct-int8")
    section = {**checkpoints.ALL["ct-int8"][1], "ignore": ignore}
    with pytest.raises(
        CheckpointError, match=r"says that lm_head is quantised, but .* lm_head\.weight without weight_scale"
    ):
        checkpoints.generate(checkpoints.changed(quantised, tmp_path / "changed", section))


COMPRESSED = checkpoints.ALL["ct-w4-g64"][1]
FP8, FBGEMM = checkpoints.ALL["hf-fp8-blocks"][1], checkpoints.ALL["fbgemm"][1]
AWQ, GPTQ = checkpoints.ALL["awq"][1], checkpoints.ALL["gptq-4-v1"][1]
MODELOPT, MIXED = checkpoints.ALL["modelopt-awq"][1], checkpoints.ALL["modelopt-mixed"][1]


def group(**fields: Any) -> dict[str, Any]:
    section = copy.deepcopy(COMPRESSED)
    section["config_groups"]["group_0"] |= fields
    return section


def weights(**fields: Any) -> dict[str, Any]:
    return group(weights=COMPRESSED["config_groups"]["group_0"]["weights"] | fields)


def inputs(**fields: Any) -> dict[str, Any]:
    """int8 with changed fields of activations."""
    section = copy.deepcopy(checkpoints.ALL["ct-int8"][1])
    section["config_groups"]["group_0"]["input_activations"] |= fields
    return section


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({**COMPRESSED, "ignore": "lm_head"}, "ignore=lm_head is not a list of names; restore the file"),
        ({**COMPRESSED, "config_groups": [1]}, r"config_groups=\[1\] is not an object of fields"),
        ({**COMPRESSED, "config_groups": {"group_0": "x"}}, "group_0=x is not an object of fields"),
        ({**COMPRESSED, "kv_cache_scheme": [1]}, r"kv_cache_scheme=\[1\] is not an object"),
        ({**COMPRESSED, "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "token"}}, "kv_cache_scheme={.*'token'} cannot be loaded"),
        ({**COMPRESSED, "kv_cache_scheme": {"num_bits": 8, "type": "float", "symmetric": False}}, "kv_cache_scheme={.*False} cannot be loaded"),
        ({**AWQ, "quant_method": None}, r"quantised \(bits=4\), but not by which quant_method; restore it"),
        ({key: value for key, value in COMPRESSED.items() if key != "quant_method"}, "but not by which quant_method"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, r"quant_method='bitsandbytes', bits=8\); it cannot be loaded: use"),
        ({"producer": {"name": "modelopt"}, "quant_algo": "NVFP4"}, "modelopt quant_algo='NVFP4' cannot be loaded"),
        ({**COMPRESSED, "sparsity_config": "dense"}, "sparsity_config=dense is not an object"),
        (group(targets="Linear"), "targets=Linear is not a list of names"),
        (group(targets=["re:(unclosed"]), r"rule 're:\(unclosed' \(missing \).*correct the expression"),
        (group(targets=["LlamaMLP"]), "rule 'LlamaMLP', a class of modules, cannot be loaded; name the modules, or Linear"),
        (weights(num_bits=None), "num_bits=0"),
        (weights(strategy="rows"), "strategy='rows' cannot be loaded"),
        (group(weights=None, input_activations={"num_bits": 8}), "quantised activations of plain weights cannot be loaded"),
        (weights(actorder="rows"), "actorder='rows' cannot be loaded"),
        (weights(symmetric=0), "symmetric=0 is not true or false"),
        (weights(symmetric="no"), "symmetric=no is not true or false"),
        (group(output_activations={"num_bits": 8, "type": "float"}), r"with quantised outputs \(output_activations\) cannot be loaded"),
        (inputs(symmetric="no"), "symmetric=no is not true or false"),
        (inputs(type="float"), "type='int' strategy='channel' with activations type='float' cannot be loaded"),
        (inputs(type=None), "with activations type=None cannot be loaded"),
        (inputs(strategy=[]), r"with activations strategy=\[\] dynamic=True cannot be loaded"),
        (inputs(strategy={}), r"with activations strategy=\{\} dynamic=True cannot be loaded"),
        (inputs(dynamic=[True]), r"with activations strategy='token' dynamic=\[True\] cannot be loaded"),
        (weights(group_size="x"), "group_size=x is not a whole number"),
        (weights(group_size=True), "group_size=True is not a whole number"),
        (weights(group_size=-2), "group_size=-2 is not a whole number of at least -1"),
        ({**FP8, "weight_block_size": [-32, 16]}, "weight_block_size=-32 is not a whole number of at least 1"),
        ({**FP8, "weight_block_size": [32.5, 16]}, "weight_block_size=32.5 is not a whole number"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size=\[128\] cannot be loaded; write the rows and columns"),
        ({**FP8, "weight_block_size": "128"}, "weight_block_size='128' cannot be loaded"),
        ({**FBGEMM, "activation_scale_ub": "x"}, "activation_scale_ub=x is not a finite number above zero"),
        ({**FBGEMM, "activation_scale_ub": 0}, "activation_scale_ub=0 is not a finite number above zero"),
        ({**FBGEMM, "activation_scale_ub": float("nan")}, "activation_scale_ub=nan is not a finite number"),
        ({**FBGEMM, "modules_to_not_convert": [3]}, r"modules_to_not_convert=\[3\] is not a list of names"),
        ({**FBGEMM, "modules_to_not_convert": ["(x"]}, r"an exclusion '\(x' \(missing \).*correct the expression"),
        ({**FBGEMM, "modules_to_not_convert": [""]}, r"modules_to_not_convert=\[''\] is not a list of names"),
        ({**AWQ, "zero_point": "yes"}, "zero_point=yes is not true or false"),
        ({**GPTQ, "desc_act": "false"}, "desc_act=false is not true or false"),
        *(
            ({**GPTQ, "modules_in_block_to_quantize": value}, rf"modules_in_block_to_quantize={shown} is not a list of names or of lists of names")
            for value, shown in ((1.5, "1.5"), (True, "True"), (-1, "-1"), ([None], r"\[None\]"), ([[1]], r"\[\[1\]\]"), ("mlp.down_proj", "mlp.down_proj"), ([""], r"\[''\]"))
        ),
        ({**GPTQ, "bits": None}, "gptq bits=0"),
        ({**GPTQ, "is_marlin_format": True}, "gptq is_marlin_format=true cannot be loaded; use a checkpoint in format gptq"),
        ({"quant_method": "torchao"}, r"quant_method='torchao'\); it cannot be loaded: use the unquantised checkpoint, or one in compressed-tensors"),
        ({**MODELOPT, "ignore": "lm_head"}, "ignore=lm_head is not a list of names"),
        ({**MIXED, "quantized_layers": ["a"]}, "without quantized_layers"),
        ({**MIXED, "quantized_layers": {"a": {"quant_algo": "W4A16_AWQ", "group_size": "x"}}}, "group_size=x is not"),
    ],
)  # fmt: skip
def test_fields_of_another_type_are_named_with_their_value(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_formats({"quantization_config": section})


@pytest.mark.parametrize(
    "section",
    [{**AWQ, "quant_method": "AWQ"}, {**GPTQ, "checkpoint_format": "GPTQ"}, {**GPTQ, "bits": "4", "group_size": "16"}, weights(num_bits="4"), weights(group_size="64"),
     weights(symmetric=None), group(output_activations={})],
)  # fmt: skip
def test_numbers_as_text_and_other_case_are_read(section: dict[str, Any]) -> None:
    read_formats({"quantization_config": section})
