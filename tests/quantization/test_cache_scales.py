"""Scales of an fp8 cache under every name and in every shape that files have them, at every layout, against a Llama in float64."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.launch import plan
from phalanx.launch.quantize import main
from phalanx.parallel.errors import ConfigError
from tests.checkpoints.splitting import split
from tests.support.checkpoints import CASES_BY_NAME, CheckpointCase, write_checkpoint
from tests.support.float64_llama import Float64Llama
from tests.support.short_demo import DEMO

from . import test_checkpoints as checkpoints
from . import writers

Array = np.ndarray[Any, Any]
PROMPT = [5, 17, 3, 99, 42, 8, 61]
NUM_LAYERS, NUM_HEADS = 2, 4
CASE = CheckpointCase(
    "llama-four-kv-heads", {**checkpoints.CASE.config, "num_key_value_heads": NUM_HEADS, "tie_word_embeddings": True}
)
NAMES = {
    "k_scale": "v_scale",
    "attn.k_scale": "attn.v_scale",
    "k_proj.k_scale": "v_proj.v_scale",
    "k_proj.output_scale": "v_proj.output_scale",
}
"""Of keys and of values; `test_published_sections` has ``kv_scale`` for both."""


class CachedLlama(Float64Llama):
    """Keys and values are what their e4m3 codes stand for: ``scales`` ``[layers, 2, K]``."""

    def __init__(self, directory: Path, scales: Array) -> None:
        super().__init__(directory)
        self._scales, self._rotations = scales.astype(np.float64), 0

    def _rotated(self, heads: Array) -> Array:
        self._rotations += 1
        layer, is_key = divmod(self._rotations - 1, 2)  # queries first
        rotated = super()._rotated(heads)
        return cached(rotated, self._scales[layer, 0][:, None, None]) if is_key else rotated

    def _project(self, hidden: Array, name: str) -> Array:
        projected = super()._project(hidden, name)
        if not name.endswith("v_proj"):
            return projected
        scale = self._scales[int(name.split(".")[2]), 1]
        return cached(projected, np.repeat(scale, projected.shape[1] // NUM_HEADS))


def cached(x: Array, scale: Array) -> Array:
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    write_checkpoint(CASE, root / "dense")
    return root


def written(root: Path, target: Path, names: tuple[str, str], scales: Array) -> Path:
    module, section = checkpoints.WEIGHT_ONLY["ct-w8-channel"]
    section = {**section, "kv_cache_scheme": checkpoints.KV_SECTION["kv_cache_scheme"]}
    stored = {
        f"model.layers.{layer}.self_attn.{name}": scales[layer, side]
        for layer in range(NUM_LAYERS)
        for side, name in enumerate(names)
    }
    writers.write(root / "dense", target / "quantised", target / "twin", module, section, stored)
    return target / "quantised"


PER_HEAD = np.random.default_rng(2).uniform(0.002, 0.02, (NUM_LAYERS, 2, NUM_HEADS)).astype(np.float32)
"""Every key and value fits, and heads differ by up to ten times."""


@pytest.mark.parametrize(("tp", "pp"), checkpoints.LAYOUTS)
def test_each_head_has_its_own_scale_at_every_layout(root: Path, tmp_path: Path, tp: int, pp: int) -> None:
    """``[K, 1, 1]``, as ``strategy: attn_head`` of compressed-tensors stores them."""
    path = written(root, tmp_path, ("k_scale", "v_scale"), PER_HEAD[..., None, None])
    found = checkpoints.logprobs(checkpoints.generate(path, tp, pp))
    models = CachedLlama(tmp_path / "twin", PER_HEAD), Float64Llama(tmp_path / "twin")
    exact, plain = (model.log_probabilities(PROMPT)[np.arange(len(PROMPT) - 1), PROMPT[1:]] for model in models)
    assert np.abs(found - exact).mean() < 0.05 * np.abs(plain - exact).mean()
    other = CachedLlama(tmp_path / "twin", PER_HEAD[..., ::-1]).log_probabilities(PROMPT)
    assert np.abs(found - other[np.arange(len(PROMPT) - 1), PROMPT[1:]]).mean() > 0.2 * np.abs(plain - exact).mean()


FAMILIES = ("qwen2-plain", "opt-plain", "gpt2-plain", "chatglm-groups", "megatron-gpt3", "gemma3_multimodal-windows")
"""With biases of queries, keys and values, whose names are no modules', and under other names than Llama's."""


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_that_a_calibration_wrote_are_found_in_every_familys_modules(tmp_path: Path, name: str) -> None:
    case, text = CASES_BY_NAME[name], tmp_path / "text.txt"
    config = {**case.config, **{key: 6144 for key in ("vocab_size", "padded_vocab_size") if key in case.config}}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "vocab_size": 6144}
    dense = write_checkpoint(replace(case, config=config), tmp_path / "dense")
    shutil.copy(DEMO / "tokenizer.json", dense)
    text.write_text("def calibrate(text):\n    return text\n" * 10)
    arguments = ["--scheme", "w8a16", "--kv-cache", "fp8", "--calibration", str(text)]
    assert main(["--model", str(dense), "--output", str(tmp_path / "out"), *arguments]) == 0
    tp = 2 if (2, 1) in case.layouts else 1
    found, of_one, plain = (
        checkpoints.logprobs(checkpoints.generate(tmp_path / "out", tp, kv_cache_dtype=one))
        for one in ("auto", "fp8", "float32")
    )
    assert np.abs(found - plain).max() > 0
    np.testing.assert_array_equal(of_one, found)


@pytest.mark.parametrize("key", NAMES)
def test_scales_are_found_under_each_name(root: Path, tmp_path: Path, key: str) -> None:
    scales = PER_HEAD[..., :1]
    expected = checkpoints.generate(written(root, tmp_path / "usual", ("k_scale", "v_scale"), scales))
    found = checkpoints.generate(written(root, tmp_path / "other", (key, NAMES[key]), scales))
    np.testing.assert_array_equal(checkpoints.logprobs(found), checkpoints.logprobs(expected))


def test_a_checkpoint_of_plain_weights_may_have_scales_of_the_cache_alone(root: Path, tmp_path: Path) -> None:
    """As llm-compressor writes it for a recipe of nothing but ``kv_cache_scheme``."""
    section = {
        **checkpoints.KV_SECTION, "config_groups": {}, "format": "dense", "ignore": [],
        "sparsity_config": {}, "transform_config": {}, "global_compression_ratio": None,
    }  # fmt: skip
    stored = {
        f"model.layers.{layer}.self_attn.{side}_scale": PER_HEAD[layer, number, :1].astype(ml_dtypes.bfloat16)
        for layer in range(NUM_LAYERS)
        for number, side in enumerate("kv")
    }
    writers.write(root / "dense", tmp_path / "cache", tmp_path / "twin", writers.as_it_is, section, stored)
    found = checkpoints.logprobs(checkpoints.generate(tmp_path / "cache"))
    scales = np.array(list(stored.values()), np.float32).reshape(NUM_LAYERS, 2, 1).repeat(NUM_HEADS, axis=2)
    models = CachedLlama(tmp_path / "twin", scales), Float64Llama(tmp_path / "twin")
    exact, plain = (model.log_probabilities(PROMPT)[np.arange(len(PROMPT) - 1), PROMPT[1:]] for model in models)
    assert np.abs(found - exact).mean() < 0.05 * np.abs(plain - exact).mean()


@pytest.mark.parametrize("shape", [(), (1,), (NUM_HEADS, 1, 1)], ids=str)
def test_a_split_holds_the_scales_too(root: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """It left them out, and no split of a checkpoint with an fp8 cache could be loaded."""
    scales = (PER_HEAD if len(shape) == 3 else PER_HEAD[..., :1]).reshape(NUM_LAYERS, 2, *shape)
    path = written(root, tmp_path, ("k_scale", "v_scale"), scales)
    split(path, tmp_path / "split", 2, 2)
    split(tmp_path / "split", tmp_path / "again", 1, 2)
    for tp, pp in ((1, 1), (2, 2), (4, 1)):
        expected = checkpoints.logprobs(checkpoints.generate(path, tp, pp))
        for found in ("split", "again"):
            answer = checkpoints.generate(tmp_path / found, tp, pp)
            np.testing.assert_array_equal(checkpoints.logprobs(answer), expected)


def test_dummy_weights_have_scales_of_one(root: Path, tmp_path: Path) -> None:
    path = written(root, tmp_path, ("k_scale", "v_scale"), PER_HEAD[..., None, None])
    found, plain = (checkpoints.generate(path, load_format="dummy", kv_cache_dtype=one) for one in ("auto", "float32"))
    assert (checkpoints.logprobs(found) != checkpoints.logprobs(plain)).any()


def test_a_calibrated_cache_can_be_left_out_whatever_the_compute_type(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal names float32 as the way out, which the flag did not take."""
    path = written(root, tmp_path, ("k_scale", "v_scale"), PER_HEAD[..., None, None])
    arguments = ["--model", str(path), "--dtype", "float32", "--kv-cache-dtype"]
    with pytest.raises(ConfigError, match="is neither fp8 nor the compute type --dtype=float32; use one of these"):
        plan.main([*arguments, "bfloat16"])
    assert plan.main([*arguments, "float32"]) == 0
    assert "cache: not quantised" in capsys.readouterr().out
