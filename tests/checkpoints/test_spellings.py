"""The same model under other names, or with tensors that carry no information, loads to the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phalanx import LLM, SamplingParams
from phalanx.parallel.errors import CheckpointError
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

Tensors = dict[str, np.ndarray]
TIED = ("llama-one-kv-head-tied", "gpt2-plain", "gemma-one-kv-head")
TABLES = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight", "gemma": "model.embed_tokens.weight"}


def logprobs(directory: Path) -> np.ndarray:
    with LLM(directory, engine="numpy") as llm:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
        output = llm.generate([[5, 17, 33, 4, 60]], params)[0]
    assert output.prompt_logprobs is not None
    return np.array([entry.logprob for entry in output.prompt_logprobs if entry is not None])


def changed(name: str, path: Path, change: Callable[[Tensors], Tensors]) -> tuple[Path, Path]:
    """The checkpoint ``name`` as it is, and with its tensors changed."""
    before, after = (write_checkpoint(CASES_BY_NAME[name], path / which) for which in ("before", "after"))
    save_file(change(load_file(after / "model.safetensors")), after / "model.safetensors")
    return before, after


def without_first_component(tensors: Tensors) -> Tensors:
    return {
        name.partition(".")[2] if not name.startswith("lm_head") else name: value for name, value in tensors.items()
    }


@pytest.mark.parametrize("name", [*TIED, "llama-plain", "gpt2-untied-odd-width"])
def test_names_of_the_base_model(name: str, tmp_path: Path) -> None:
    before, after = changed(name, tmp_path, without_first_component)
    np.testing.assert_array_equal(logprobs(after), logprobs(before))


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.rotary_emb.sin_cached", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq", "layers.1.self_attn.rotary_emb._sin_cached",
    ],
)  # fmt: skip
def test_rotary_tables_are_left_out(extra: str, tmp_path: Path) -> None:
    before, after = changed("llama-plain", tmp_path, lambda tensors: {**tensors, extra: np.ones(8, np.float32)})
    np.testing.assert_array_equal(logprobs(after), logprobs(before))


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_that_kept_only_its_head(name: str, tmp_path: Path) -> None:
    table = TABLES[name.partition("-")[0]]
    before, after = changed(name, tmp_path, lambda t: {"lm_head.weight" if n == table else n: v for n, v in t.items()})
    np.testing.assert_array_equal(logprobs(after), logprobs(before))


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("bare", [False, True])
def test_a_copy_of_the_table_changes_nothing(name: str, bare: bool, tmp_path: Path) -> None:
    table = TABLES[name.partition("-")[0]]

    def copy(tensors: Tensors) -> Tensors:
        both = {**tensors, "lm_head.weight": tensors[table]}
        return without_first_component(both) if bare else both

    before, after = changed(name, tmp_path, copy)
    np.testing.assert_array_equal(logprobs(after), logprobs(before))


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_differs_from_the_table_is_used_in_spite_of_the_flag(name: str, tmp_path: Path) -> None:
    table = TABLES[name.partition("-")[0]]

    def other_head(tensors: Tensors) -> Tensors:
        head = tensors[table].copy()
        head[-1, -1] += 3.0  # the last value of the last row
        return {**tensors, "lm_head.weight": head}

    before, after = changed(name, tmp_path, other_head)
    assert np.abs(logprobs(after) - logprobs(before)).max() > 1e-4
    config = (after / "config.json").read_text()
    untied = config.replace('"tie_word_embeddings": true, ', "")[:-1] + ', "tie_word_embeddings": false}'
    (before / "config.json").write_text(untied)
    save_file(load_file(after / "model.safetensors"), before / "model.safetensors")
    np.testing.assert_array_equal(logprobs(after), logprobs(before))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.SCB", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight_scale", "FP8 or INT8"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "FP8 or INT8"),
        ("model.layers.0.self_attn.k_scale", "FP8 or INT8"),
        ("model.layers.0.mlp.up_proj.scales", "GPTQ|MLX"),
    ],
)
def test_a_quantised_checkpoint_is_recognised_by_its_tensors(name: str, method: str, tmp_path: Path) -> None:
    _, after = changed("llama-plain", tmp_path, lambda tensors: {**tensors, name: np.ones(8, np.float32)})
    with pytest.raises(CheckpointError, match=rf"is quantised \(({method})"):
        LLM(after, engine="numpy")
