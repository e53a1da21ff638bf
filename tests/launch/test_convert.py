"""``launch.convert``: pieces of Megatron-LM's ranks become the checkpoint that they were cut from."""

from __future__ import annotations

import argparse
import enum
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from phalanx.checkpoints.megatron import canonical_name
from phalanx.launch.convert import main
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.runtime.models import find_model
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

PREFIX = "language_model."
ARGUMENTS: dict[str, dict[str, Any]] = {
    "megatron-gpt3": {},
    "megatron-rope": {
        "use_rotary_position_embeddings": True, "rotary_percent": 0.5, "bias_gelu_fusion": False,
        "apply_layernorm_1p": True, "untie_embeddings_and_output_weights": True,
    },
    "megatron-llama": {
        "position_embedding_type": "rope", "rotary_base": 5000, "swiglu": True, "group_query_attention": True,
        "num_query_groups": 2, "normalization": "RMSNorm", "add_bias_linear": False, "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": True,
    },
}  # fmt: skip
"""What Megatron's command line would have said."""
CORE_NAMES = {
    "encoder.layers": "decoder.layers", "encoder.final": "decoder.final", "query_key_value": "linear_qkv",
    "self_attention.dense": "self_attention.linear_proj", "dense_h_to_4h": "linear_fc1", "dense_4h_to_h": "linear_fc2",
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
}  # fmt: skip


def piece(name: str, value: np.ndarray, rank: int, size: int, version: float, heads: int, is_gated: bool) -> np.ndarray:
    """What a rank of Megatron's holds of a whole tensor."""
    if "query_key_value" in name:
        own = np.split(value, size)[rank]
        each = (heads // size, 3, -1, *own.shape[1:])
        if version < 1:
            return own.reshape(each).swapaxes(0, 1).reshape(own.shape)
        return own.reshape(each).swapaxes(1, 2).reshape(own.shape) if version < 2 else own
    if "dense_h_to_4h" in name:
        return np.concatenate([np.split(side, size)[rank] for side in np.split(value, 2 if is_gated else 1)])
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return np.split(value, size, axis=1)[rank]
    if "word_embeddings" in name or "output_layer" in name:
        padded = np.concatenate([value, np.zeros((-len(value) % (64 * size), value.shape[1]), value.dtype)])
        return np.split(padded, size)[rank]
    return value


def write_pieces(name: str, directory: Path, tp: int, pp: int, version: float, is_core: bool) -> dict[str, np.ndarray]:
    """Save a case as Megatron's ranks would; returns its tensors."""
    torch = pytest.importorskip("torch")
    case = CASES_BY_NAME[name]
    tensors = load_file(write_checkpoint(case, directory / "whole") / "model.safetensors")
    config, arguments = case.config, ARGUMENTS[name]
    args = argparse.Namespace(
        hidden_size=64, num_layers=3, num_attention_heads=4, kv_channels=16, ffn_hidden_size=96,
        max_position_embeddings=128, layernorm_epsilon=1e-5, padded_vocab_size=128, params_dtype=torch.float32, **arguments,
    )  # fmt: skip
    each = -(-config["num_layers"] // pp)
    for stage in range(pp):
        for rank in range(tp):
            model = {}
            for full, value in tensors.items():
                parts = full.split(".")
                layer = int(parts[3]) if "layers" in parts else 0 if "embedding" in parts else config["num_layers"] - 1
                if layer // each != stage:
                    continue
                if "layers" in parts:
                    parts[3] = str(layer - stage * each)
                own = piece(full, value, rank, tp, version, 4, "swiglu" in arguments)
                short = ".".join(parts).removeprefix(PREFIX)
                for old, new in CORE_NAMES.items() if is_core else ():
                    short = short.replace(old, new)
                model[short] = torch.from_numpy(own.copy())
            tree = model if is_core else {"language_model": {"encoder": {}, **nested(model)}}
            folder = directory / "iter_0000007" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            state = {"args": args, "checkpoint_version": version, "iteration": 7, "model": tree}
            torch.save(state, folder / "model_optim_rng.pt")
    (directory / "latest_checkpointed_iteration.txt").write_text("7")
    return tensors


def nested(model: dict[str, Any]) -> dict[str, Any]:
    """As Megatron-LM before its core: modules that hold flat names."""
    tree: dict[str, Any] = {}
    for name, value in model.items():
        head, _, rest = name.partition(".")
        if head == "embedding":
            table, _, kind = rest.partition(".")
            tree.setdefault(head, {}).setdefault(table, {})[kind] = value
        else:
            tree.setdefault(head, {})[rest] = value
    return tree


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "tp", "pp", "version", "is_core"),
    [
        ("megatron-gpt3", 2, 1, 0.0, False), ("megatron-gpt3", 1, 3, 1.0, False), ("megatron-gpt3", 2, 3, 3.0, True),
        ("megatron-rope", 4, 1, 2.0, False), ("megatron-llama", 2, 3, 3.0, False), ("megatron-llama", 1, 1, 3.0, True),
    ],
)  # fmt: skip
def test_pieces_become_the_checkpoint_that_they_were_cut_from(
    name: str, tp: int, pp: int, version: float, is_core: bool, tmp_path: Path
) -> None:
    expected = write_pieces(name, tmp_path, tp, pp, version, is_core)
    arguments = [
        "--from",
        "megatron",
        "--input",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
        "--vocab-size",
        "101",
    ]
    assert main(arguments) == 0
    actual = load_file(tmp_path / "out" / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(actual[key].tobytes() == expected[key].tobytes() for key in expected)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    case = CASES_BY_NAME[name].config
    special = {key: case[key] for key in ("bos_token_id", "eos_token_id")}
    assert find_model(written).read_config({**written, **special}) == find_model(case).read_config(case)
    with pytest.raises(ConfigError, match="exists; remove it"):
        main(arguments)


@pytest.mark.torch
def test_objects_of_megatrons_own_classes_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    write_pieces("megatron-gpt3", tmp_path, 1, 1, 3.0, False)
    path = tmp_path / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, weights_only=True)
    module = types.ModuleType("megatron.core.enums")
    kind = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module=module.__name__)  # type: ignore[misc]
    module.ModelType = kind  # type: ignore[attr-defined]
    state["args"].model_type = kind(1)
    with monkeypatch.context() as patch:
        for name in ("megatron", "megatron.core", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save(state, path)
    assert main(["--from", "megatron", "--input", str(tmp_path), "--output", str(tmp_path / "out")]) == 0


@pytest.mark.torch
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "mp_rank_00"
    folder.mkdir()
    torch.save({"args": Evil(), "model": {}}, folder / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match="cannot be read as weights and plain values"):
        main(["--from", "megatron", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists()


def test_a_rank_that_is_missing_and_names_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_01").mkdir()
    with pytest.raises(ConfigError, match="does not hold mp_rank_00/model_optim_rng"):
        main(["--from", "megatron", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.router\.weight is no tensor of a GPT"):
        canonical_name("decoder.layers.0.mlp.router.weight", 0)
