"""Quantised modules under the names that families and their wrappers have for them: their scales go by those names, too."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.formats import DENSE, read_formats
from phalanx.launch.quantize import main
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models import find_model
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

from . import test_checkpoints as checkpoints
from . import writers

STATIC = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "ignored_layers": ["lm_head"],
    "kv_cache_scheme": "static",
}
ROWS = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}
PREFIXES = ("language_model.model.", "model.language_model.")
"""Of a multimodal Gemma 3, before transformers 4.52 and since."""


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float checkpoints by prefix."""
    root = tmp_path_factory.mktemp("gemma3")
    old = write_checkpoint(CASES_BY_NAME["gemma3_multimodal-windows"], root / "old")
    (root / "new").mkdir()
    (root / "new" / "config.json").write_text((old / "config.json").read_text())
    tensors = load_file(old / "model.safetensors")
    renamed = {name.replace(*PREFIXES): tensor for name, tensor in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, root / "new" / "model.safetensors")
    return dict(zip(PREFIXES, (old, root / "new"), strict=True))


@pytest.mark.parametrize("section", [STATIC, ROWS], ids=lambda section: str(section["quant_method"]))
def test_names_of_transformers_before_and_since_4_52_give_the_same(
    gemma3: dict[str, Path], tmp_path: Path, section: dict[str, Any]
) -> None:
    module = writers.fp8("tensor", input_scale=0.02) if section is STATIC else writers.fp8("channel")
    paths = []
    for number, (prefix, dense) in enumerate(gemma3.items()):
        names = [f"{prefix}layers.{layer}.self_attn.{kind}_scale" for layer in range(3) for kind in "kv"]
        scales = {name: np.array([0.02], np.float32) for name in names} if section is STATIC else {}
        paths.append(tmp_path / str(number))
        writers.write(dense, paths[-1], tmp_path / f"twin-{number}", module, section, scales)
    plain = checkpoints.logprobs(checkpoints.generate(gemma3[PREFIXES[0]]))
    for tp, pp in ((1, 1), (2, 1), (1, 3)):
        old, new = (checkpoints.logprobs(checkpoints.generate(path, tp, pp)) for path in paths)
        np.testing.assert_array_equal(new, old)
        assert np.abs(old - plain).max() > 1e-3, "it is quantised"


@pytest.mark.parametrize("called", PREFIXES)
@pytest.mark.parametrize("stored", PREFIXES)
def test_rules_may_call_modules_as_the_file_does_or_as_the_classes_do(
    gemma3: dict[str, Path], tmp_path: Path, stored: str, called: str
) -> None:
    """transformers has the later names in memory, where rules are made, and may write the earlier ones, and the other way round."""
    section = {**ROWS, "modules_to_not_convert": ["lm_head", f"{called}layers.1.mlp.down_proj"]}
    modules = {"layers.1.mlp.down_proj": lambda w: ({"weight": w}, w), "": writers.fp8("channel")}
    writers.write(gemma3[stored], tmp_path / "quantised", tmp_path / "twin", modules, section)
    weights = checkpoints.load(tmp_path / "quantised", 1, 0)
    formats = [weights.linear(f"layers.{layer}.down").format.name for layer in range(3)]
    assert formats == ["fp8 rows x tokens up to a bound", "dense", "fp8 rows x tokens up to a bound"]


def test_what_a_family_does_not_read_is_ignored_by_patterns_that_know_its_names_in_memory(
    gemma3: dict[str, Path], tmp_path: Path
) -> None:
    """transformers 5 calls the image encoder ``model.vision_tower``, the files of most checkpoints ``vision_tower``."""
    dense = tmp_path / "dense"
    shutil.copytree(gemma3[PREFIXES[0]], dense)
    tensors = load_file(dense / "model.safetensors")
    image = "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    save_file({**tensors, f"{image}.weight": np.ones((16, 16), np.float32)}, dense / "model.safetensors")
    assert main(["--model", str(dense), "--output", str(tmp_path / "out"), "--scheme", "int8"]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(written[f"{image}.weight"], np.ones((16, 16), np.float32))
    rules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    for module in (image, f"model.{image}"):
        assert any(re.match(rule.removeprefix("re:"), module) for rule in rules if rule.startswith("re:"))
    assert not any(re.match(rule.removeprefix("re:"), "model.language_model.layers.0.mlp.down_proj") for rule in rules)
    plain, quantised = (checkpoints.logprobs(checkpoints.generate(path)) for path in (dense, tmp_path / "out"))
    assert 0 < np.abs(plain - quantised).max() < 0.5


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASES_BY_NAME["internlm2-plain"], tmp_path_factory.mktemp("internlm2") / "dense")


@pytest.mark.parametrize(("has_head", "in_order"), [(False, True), (True, True), (True, False)])
def test_gptq_means_the_head_whatever_it_is_called(
    internlm2: Path, tmp_path: Path, has_head: bool, in_order: bool
) -> None:
    """With an order, too, that all rows of its one matrix of queries, keys and values share."""
    module, section = checkpoints._gptq(4, 16, False, True, in_order=in_order)
    also = ("output.weight",) if has_head else ()
    paths = tmp_path / "quantised", tmp_path / "twin"
    writers.write(internlm2, *paths, module, {**section, "lm_head": has_head}, also=also)
    found, expected = (
        checkpoints.logprobs(checkpoints.generate(path, tp)) for path, tp in zip(paths, (2, 1), strict=True)
    )
    np.testing.assert_allclose(found, expected, atol=5e-5)
    scheme = checkpoints.load(paths[0], 1, 0).linear("lm_head").format.name
    assert scheme.startswith("int4 in groups of 16" if has_head else "dense")


def test_heads_that_nothing_is_said_about_are_plain(internlm2: Path, tmp_path: Path) -> None:
    """As quantisers leave them by default, under any name."""
    paths = tmp_path / "quantised", tmp_path / "twin"
    section = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    writers.write(internlm2, *paths, writers.awq(16), section)
    found, expected = (checkpoints.logprobs(checkpoints.generate(path)) for path in paths)
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("name", ["ct-w4-g16-asymmetric", "ct-fp8-static"])
def test_experts_of_mixtral_are_found_under_the_names_that_llm_compressor_gives_them(tmp_path: Path, name: str) -> None:
    """0.14 with transformers 5, whose modules of experts it replaces by linear ones with names as Qwen's."""
    quantised, _ = checkpoints.written_experts(tmp_path, name)
    expected = [checkpoints.logprobs(checkpoints.generate(quantised, tp)) for tp in (1, 2)]
    path = quantised / "model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header, data = path.read_bytes()[8 : 8 + size].decode(), path.read_bytes()[8 + size :]
    for usual, other in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        header = header.replace(f".{usual}.", f".{other}.")
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    for tp, logprobs in zip((1, 2), expected, strict=True):
        np.testing.assert_array_equal(checkpoints.logprobs(checkpoints.generate(quantised, tp)), logprobs)


def test_rules_name_mixtrals_experts_as_transformers_5_does() -> None:
    _, section = checkpoints.ALL["ct-w4-g16-asymmetric"]
    (group,) = section["config_groups"].values()
    groups = {"group_0": {**group, "targets": ["re:.*mlp.*proj$"]}}
    config = {**checkpoints.MIXTRAL.config, "quantization_config": {**section, "config_groups": groups}}
    model, plan = find_model(config), read_formats(config)
    quantised = {spec.owner for spec in model.weights(model.read_config(config)) if plan.choose(spec) != DENSE}
    assert quantised == {f"layers.{layer}.experts.{matrix}" for layer in range(2) for matrix in ("gate_up", "down")}


OTHER_NAMES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("ct-w4-g16-asymmetric", {"ignore": ["lm_head", "re:.*gate"]}, []),
    ("ct-w4-g16-asymmetric", {"ignore": ["lm_head", "re:.*gate$", "re:.*w2"]}, ["w2"]),
    ("gptq-4-v1", {"dynamic": {"-:.*gate": {}}}, []),
    ("gptq-4-v1", {"dynamic": {r"-:.*\.gate.*": {}}}, []),
    ("gptq-4-v1", {"dynamic": {r"+:.*\.0\..*gate.*": {"bits": 8}}}, []),
    ("gptq-4-v1", {"dynamic": {"-:.*down.*": {}}}, []),
    ("gptq-4-v1", {"dynamic": {"-:.*w[13]": {}}}, ["w1", "w3"]),
    ("gptq-4-order", {"dynamic": {"-:.*gate.*": {}}}, []),
    ("modelopt-w8a16", {"ignore": ["lm_head", "*gate*"]}, []),
    ("modelopt-fp8", {"exclude_modules": ["lm_head", "*gate*", "*down*"]}, []),
    ("modelopt-fp8", {"exclude_modules": ["lm_head", "*gate", "*w2"]}, ["w2"]),
    ("hf-fp8-blocks", {"modules_to_not_convert": ["lm_head", "gate", ".*down_proj"]}, []),
]
"""Rules of Mixtrals whose experts are ``w1``, ``w2`` and ``w3``, and which of these are plain."""


def mixtral_names(suffixes: Iterable[str], plain: list[str]) -> list[str]:
    """Of all matrices in layers: those of experts in ``plain`` and the router are plain, the others have tensors with ``suffixes``."""
    matrices = itertools.product(range(checkpoints.MIXTRAL.config["num_local_experts"]), ("w1", "w2", "w3"))
    parts = {
        **{f"self_attn.{matrix}_proj": suffixes for matrix in "qkvo"}, "block_sparse_moe.gate": ["weight"],
        **{f"block_sparse_moe.experts.{n}.{name}": ["weight"] if name in plain else suffixes for n, name in matrices},
    }  # fmt: skip
    return [
        f"model.layers.{layer}.{part}.{one}" for layer in range(2) for part, names in parts.items() for one in names
    ]


def formats_of_mixtral(config: dict[str, Any], names: Iterable[str] = ()) -> dict[str, str]:
    """Of what is in its mixtures, in a checkpoint with tensors of these names, or by the configuration alone."""
    model, plan = find_model(config), read_formats(config)
    plan = plan.for_stored([*names]) if names else plan
    specs = [spec for spec in model.weights(model.read_config(config)) if "experts" in spec.name]
    return {spec.owner: plan.choose(spec).name.partition(" with scaled")[0] for spec in specs}


@pytest.mark.parametrize(
    ("name", "fields", "plain"), OTHER_NAMES, ids=[f"{name}-{number}" for number, (name, *_) in enumerate(OTHER_NAMES)]
)
@pytest.mark.parametrize("prefix", ["model.", "", None], ids=["whole", "base-model", "config-only"])
def test_rules_say_nothing_of_mixtrals_experts_by_names_that_its_file_does_not_have(
    name: str, fields: dict[str, Any], plain: list[str], prefix: str | None
) -> None:
    """``gate`` means the router there, not ``gate_proj``."""
    module, section = checkpoints.ALL[name]
    config = {**checkpoints.MIXTRAL.config, "quantization_config": {**section, **fields}}
    suffixes, _ = module(np.linspace(-1, 1, 160 * 160, dtype=np.float32).reshape(160, 160))
    stored = (
        [] if prefix is None else [f"{prefix}{one.removeprefix('model.')}" for one in mixtral_names(suffixes, plain)]
    )
    found = formats_of_mixtral(config, stored)
    experts = {owner: one for owner, one in found.items() if not owner.endswith("router")}
    is_plain = {
        f"layers.{layer}.experts.{kind}": first in plain
        for layer in range(2)
        for kind, first in (("gate_up", "w1"), ("down", "w2"))
    }
    assert {owner: one == "dense" for owner, one in experts.items()} == is_plain
    assert len({one for one in experts.values() if one != "dense"}) == 1
    assert prefix is None or {one for owner, one in found.items() if owner.endswith("router")} == {"dense"}


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_rule_by_another_name_of_the_mixture_is_meant_if_that_is_what_is_stored(is_plain: bool) -> None:
    module, section = checkpoints.ALL["ct-w4-g16-asymmetric"]
    config = {**checkpoints.MIXTRAL.config, "quantization_config": {**section, "ignore": ["lm_head", "re:.*mlp.*"]}}
    suffixes, _ = module(np.linspace(-1, 1, 160 * 160, dtype=np.float32).reshape(160, 160))
    found = formats_of_mixtral(config, mixtral_names(suffixes, ["w1", "w2", "w3"] if is_plain else []))
    assert {one == "dense" for owner, one in found.items() if not owner.endswith("router")} == {is_plain}


def test_a_section_in_text_config_counts_for_the_text(tmp_path: Path) -> None:
    """Some checkpoints for texts and images have it there."""
    quantised, twin = tmp_path / "quantised", tmp_path / "twin"
    dense = write_checkpoint(CASES_BY_NAME["gemma3_multimodal-windows"], tmp_path / "dense")
    writers.write(dense, quantised, twin, *checkpoints.ALL["ct-w8-channel"])
    config = json.loads((quantised / "config.json").read_text())
    section = config.pop("quantization_config")
    moved = {**config, "text_config": {**config["text_config"], "quantization_config": section}}
    (quantised / "config.json").write_text(json.dumps(moved))
    expected = checkpoints.logprobs(checkpoints.generate(twin))
    np.testing.assert_allclose(checkpoints.logprobs(checkpoints.generate(quantised, 2)), expected, atol=5e-5)
    (quantised / "config.json").write_text(json.dumps({**moved, "quantization_config": {**section, "ignore": []}}))
    with pytest.raises(
        ConfigError, match=r"quantization_config of config\.json and that of its text_config differ; remove the one"
    ):
        checkpoints.generate(quantised)
