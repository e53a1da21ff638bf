"""``launch.quantize``: what it writes loads, stands for what was reported, and careless calls are refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.quantization.writer import relative_error
from phalanx.checkpoints.sinks import NumpySink
from phalanx.launch.quantize import main
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Layout, Topology
from phalanx.runtime.executors.weights import load_stage
from phalanx.runtime.models import find_model
from tests.checkpoints.splitting import split
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.short_demo import DEMO

BOUNDS = {"fp8": 0.03, "int8": 0.012, "w8a16": 0.012, "w4a16": 0.12}
"""Relative error of a normal weight: half a step of 4, 8 and 8, and 4 bits, some of it lost to the largest value."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASES_BY_NAME["llama-grouped-heads"], tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("scheme", BOUNDS)
def test_what_it_writes_loads_and_is_near_the_original(dense: Path, scheme: str, tmp_path: Path) -> None:
    output, report = tmp_path / "out", tmp_path / "report.json"
    group = ["--group-size", "8"] if scheme == "w4a16" else []
    assert (
        main(["--model", str(dense), "--output", str(output), "--scheme", scheme, "--report", str(report), *group]) == 0
    )
    original = load_file(dense / "model.safetensors")
    with open_checkpoint(output) as checkpoint:
        model = find_model(checkpoint.config)
        config = model.read_config(checkpoint.config)
        sink = NumpySink()
        weights = load_stage(checkpoint.source, model, config, checkpoint.formats, Topology(Layout(), 0), sink)
    down = weights.linear("layers.0.down")
    values, expected = down.format.dequantize(down.components), original["model.layers.0.mlp.down_proj.weight"]
    error = float(np.linalg.norm(values - expected) / np.linalg.norm(expected))
    assert 0 < error < BOUNDS[scheme]
    reported = json.loads(report.read_text())["errors"]
    assert reported["model.layers.0.mlp.down_proj.weight"] == pytest.approx(error, rel=1e-5)
    assert len(reported) == 7 * config.num_layers
    embed = original["model.embed_tokens.weight"]
    np.testing.assert_array_equal(weights.embedding("embed")[: len(embed)], embed)


def test_an_output_that_exists_and_groups_that_do_not_divide_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists; remove it or choose another name"):
        main(["--model", str(dense), "--output", str(tmp_path), "--scheme", "fp8"])
    with pytest.raises(
        ConfigError, match=r"--group-size=128 does not divide the 48 columns of .*; use 8, the largest power of two"
    ):
        main(["--model", str(dense), "--output", str(tmp_path / "out"), "--scheme", "w4a16"])
    with pytest.raises(ConfigError, match="--group-size=16 does not fit --scheme=fp8"):
        main(["--model", str(dense), "--output", str(tmp_path / "out"), "--scheme", "fp8", "--group-size", "16"])
    with pytest.raises(ConfigError, match="--group-size=-2 is negative; give a number of columns, or 0 for whole rows"):
        main(["--model", str(dense), "--output", str(tmp_path / "out"), "--scheme", "w4a16", "--group-size", "-2"])
    assert not (tmp_path / "out").exists()


def test_whole_rows_are_groups_of_0_or_as_other_tools_say_of_minus_1(dense: Path, tmp_path: Path) -> None:
    for size in ("0", "-1"):
        main(["--model", str(dense), "--output", str(tmp_path / size), "--scheme", "w4a16", "--group-size", size])
    one, other = (
        [(tmp_path / size / name).read_bytes() for name in ("config.json", "model.safetensors")] for size in ("0", "-1")
    )
    assert one == other


def test_a_split_checkpoint_is_written_as_the_whole_one_is(dense: Path, tmp_path: Path) -> None:
    """Its manifest is of files that the output does not have."""
    split(dense, tmp_path / "split", 2, 1)
    outputs = tmp_path / "of-whole", tmp_path / "of-split"
    for path, output in zip((dense, tmp_path / "split"), outputs, strict=True):
        assert main(["--model", str(path), "--output", str(output), "--scheme", "int8"]) == 0
    assert sorted(path.name for path in outputs[1].iterdir()) == ["config.json", "model.safetensors"]
    expected, found = (load_file(path / "model.safetensors") for path in outputs)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_tokenizer_of_another_model_is_named_before_the_text_is_run(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "model")
    shutil.copy(DEMO / "tokenizer.json", tmp_path / "model")
    arguments = ["--output", str(tmp_path / "out"), "--scheme", "fp8-static"]
    with pytest.raises(
        ConfigError, match=r"the tokenizer gives token \d+ for the calibration text, but the model has 101 tokens"
    ):
        main(["--model", str(tmp_path / "model"), *arguments])
    assert not (tmp_path / "out").exists()


MIXTRAL = CASES_BY_NAME["mixtral-plain"]
NARROW_OPT = CASES_BY_NAME["opt-narrow-norm-last"]
ROUTERS = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(MIXTRAL.config["num_hidden_layers"])]
PROJECTIONS = ["model.decoder.project_in", "model.decoder.project_out"]


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        (MIXTRAL, {}, ["lm_head", *ROUTERS]),
        (MIXTRAL, {"tie_word_embeddings": True}, ["lm_head", *ROUTERS]),
        (NARROW_OPT, {}, ["lm_head", *PROJECTIONS]),
        (NARROW_OPT, {"tie_word_embeddings": True}, ["lm_head", *PROJECTIONS]),
        (CASES_BY_NAME["gpt_neox-parallel"], {}, ["embed_out", "lm_head"]),
    ],
)
def test_matrices_that_stay_plain_are_listed_for_other_readers(
    case: CheckpointCase, changes: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    """compressed-tensors takes every linear module that ``ignore`` does not list for a quantised one: routers, and tied heads, too."""
    dense = write_checkpoint(replace(case, config={**case.config, **changes}), tmp_path / "dense")
    main(["--model", str(dense), "--output", str(tmp_path / "out"), "--scheme", "w8a16"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"] == expected


@pytest.mark.parametrize(("case", "modules"), [(MIXTRAL, ROUTERS), (NARROW_OPT, PROJECTIONS)], ids=["mixtral", "opt"])
def test_plain_matrices_of_a_base_models_file_are_listed_by_the_names_of_classes_too(
    case: CheckpointCase, modules: list[str], tmp_path: Path
) -> None:
    """Rules are about modules, which are below ``model`` whether or not the names in the file begin so."""
    dense = write_checkpoint(replace(case, config={**case.config, "tie_word_embeddings": True}), tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, dense / "model.safetensors")
    main(["--model", str(dense), "--output", str(tmp_path / "out"), "--scheme", "w8a16"])
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == sorted(["lm_head", *modules, *(name.removeprefix("model.") for name in modules)])


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.float64])
def test_masks_next_to_the_weights_are_copied_in_any_format(tmp_path: Path, dtype: Any) -> None:
    """Pythia's files hold ``attention.bias``, a triangle of bytes or booleans, which no engine reads."""
    dense = write_checkpoint(CASES_BY_NAME["gpt_neox-parallel"], tmp_path / "dense")
    mask = np.tril(np.ones((1, 1, 6, 6))).astype(dtype)
    tensors = {**load_file(dense / "model.safetensors"), "gpt_neox.layers.0.attention.bias": mask}
    save_file(tensors, dense / "model.safetensors")
    assert main(["--model", str(dense), "--output", str(tmp_path / "out"), "--scheme", "int8"]) == 0
    copied = load_file(tmp_path / "out" / "model.safetensors")["gpt_neox.layers.0.attention.bias"]
    assert copied.dtype == mask.dtype
    np.testing.assert_array_equal(copied, mask)


def test_a_quantised_checkpoint_is_not_quantised_again(dense: Path, tmp_path: Path) -> None:
    main(["--model", str(dense), "--output", str(tmp_path / "once"), "--scheme", "fp8"])
    with pytest.raises(ConfigError, match="--model is quantised already"):
        main(["--model", str(tmp_path / "once"), "--output", str(tmp_path / "twice"), "--scheme", "fp8"])


def test_a_report_may_go_to_standard_output(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--model", str(dense), "--output", "out", "--scheme", "int8", "--report", "-"])
    assert json.loads(capsys.readouterr().out)["scheme"] == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_for_output_and_report_that_cannot_be_are_named(dense: Path, tmp_path: Path) -> None:
    arguments, output = ["--model", str(dense), "--scheme", "int8"], tmp_path / "out"
    with pytest.raises(ConfigError, match="--output '/' exists"):
        main([*arguments, "--output", "/"])
    with pytest.raises(ConfigError, match=r"--report .*config\.json is a file of the model; give another one"):
        main([*arguments, "--output", str(output), "--report", str(dense / "config.json")])
    with pytest.raises(ConfigError, match=r"--report .*out is the directory that --output makes; give another file"):
        main([*arguments, "--output", str(output), "--report", str(output)])
    assert not output.exists()
    with pytest.raises(ConfigError, match=r"--report /dev/full cannot be written: No space .*out is complete without"):
        main([*arguments, "--output", str(output), "--report", "/dev/full"])
    assert (output / "config.json").exists()


def test_templates_are_copied_and_weights_of_other_programs_are_not(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "model")
    for name in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "pytorch_model.bin", "model.onnx", "LICENSE"):
        (tmp_path / "model" / name).write_text("text")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    leftover = tmp_path / "out.partial" / "additional_chat_templates"
    leftover.mkdir(parents=True)
    (leftover / "old.jinja").touch()
    assert main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--scheme", "int8"]) == 0
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found == ["LICENSE", "additional_chat_templates/tool_use.jinja", "config.json", "model.safetensors"]


def test_errors_of_many_or_large_values_are_those_of_float64() -> None:
    """np.linalg.norm adds float32: 0.37 % too little over 117 million equal values, and infinity here."""
    exact = np.random.default_rng(1).normal(0, 1e30, (64, 512)).astype(np.float32)
    difference = exact * np.float32(0.01)
    assert relative_error(difference, exact) == pytest.approx(0.01, rel=1e-6)
    many = np.broadcast_to(np.float32(0.01), (1 << 12, 1 << 13))
    assert relative_error(many, np.full((1, 1), 0.01, np.float32)) == pytest.approx(math.sqrt(many.size), rel=1e-6)
