"""``launch.convert``: pieces of Megatron-LM's, NeMo's and FasterTransformer's ranks become the checkpoint that they were cut from."""

from __future__ import annotations

import argparse
import configparser
import enum
import io
import json
import os
import random
import re
import signal
import sys
import tarfile
import types
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from phalanx.checkpoints.conversion.megatron import canonical_name, config_of
from phalanx.checkpoints.conversion.torch_file import array_of, read_torch_file
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
            state = {
                "args": args,
                "checkpoint_version": version,
                "iteration": 7,
                "model": tree,
                **training_state(torch),
            }
            torch.save(state, folder / "model_optim_rng.pt")
    (directory / "latest_checkpointed_iteration.txt").write_text("7")
    return tensors


def training_state(torch: Any) -> dict[str, Any]:
    """What Megatron saves next to the model unless it is told otherwise, Transformer Engine's scales among it."""
    moments = {"step": 7, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    group = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": [0]}
    return {
        "optimizer": {
            "optimizer": {"state": {0: moments}, "param_groups": [group]}, "grad_scaler": {"scale": torch.ones(1)},
            "fp32_from_fp16_params": [[torch.zeros(4)]],
        },
        "opt_param_scheduler": {"max_lr": 1e-4, "lr_decay_style": "cosine", "num_steps": 7},
        "rng_state": [
            {
                "random_rng_state": random.Random(1).getstate(), "np_rng_state": np.random.RandomState(1).get_state(),
                "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
                "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
            }
        ],
        "rerun_state_machine": {"mode": types.SimpleNamespace(value=1), "extra": io.BytesIO(b"scales")},
    }  # fmt: skip


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


NEMO: dict[str, dict[str, Any]] = {
    "megatron-gpt3": {"encoder_seq_length": 128, "max_position_embeddings": "${.encoder_seq_length}", "openai_gelu": True},
    "megatron-rope": {
        "position_embedding_type": "rope", "rotary_percentage": 0.5, "bias_activation_fusion": False, "normalization": "layernorm1p",
        "share_embeddings_and_output_weights": False,
    },
    "megatron-llama": {
        "position_embedding_type": "rope", "rotary_base": 5000, "activation": "fast-swiglu", "num_query_groups": 2,
        "normalization": "rmsnorm", "bias": False, "qkv_bias": True, "share_embeddings_and_output_weights": False,
    },
}  # fmt: skip
"""What ``model_config.yaml`` says of the same models."""


def write_nemo(
    name: str, directory: Path, tp: int, pp: int, is_core: bool = False, gates_apart: bool = False
) -> dict[str, np.ndarray]:
    """Save a case as NeMo's ranks would, below ``directory / "nemo"``; returns its tensors."""
    torch = pytest.importorskip("torch")
    tensors = load_file(write_checkpoint(CASES_BY_NAME[name], directory / "whole") / "model.safetensors")
    root, each = directory / "nemo", -(-3 // pp)
    root.mkdir()
    config = {
        "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 96,
        "max_position_embeddings": 128, "layernorm_epsilon": 1e-5, "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp, "apply_query_key_layer_scaling": True, **NEMO[name],
    }  # fmt: skip
    if gates_apart:
        config["activation"] = "swiglu"
    (root / "model_config.yaml").write_text(yaml.safe_dump(config))
    for stage in range(pp):
        for rank in range(tp):
            state = {}
            for full, value in tensors.items():
                parts = full.split(".")
                layer = int(parts[3]) if "layers" in parts else 0 if "embedding" in parts else 2
                if layer // each != stage:
                    continue
                if "layers" in parts:
                    parts[3] = str(layer - stage * each)
                own = torch.from_numpy(
                    piece(full, value, rank, tp, 3.0, 4, "swiglu" in str(config.get("activation"))).copy()
                )
                short = ".".join(parts)
                for old, new in {**CORE_NAMES, PREFIX: ""}.items() if is_core else ():
                    short = short.replace(old, new)
                state[f"model.{short}"] = own
                if gates_apart and "dense_h_to_4h" in short:
                    state[f"model.{short}"], second = own.chunk(2)
                    state[f"model.{short.replace('4h.', '4h_2.')}"] = second
            if stage == pp - 1 and pp > 1 and "share_embeddings_and_output_weights" not in config:
                state["model.word_embeddings.weight"] = torch.zeros(64, 64)  # the last stage's copy of the table
            kinds = ("", f"mp_rank_{rank:02d}", f"tp_rank_{rank:02d}_pp_rank_{stage:03d}")
            folder = root / kinds[2 if pp > 1 else tp > 1]
            folder.mkdir(exist_ok=True)
            torch.save(state, folder / "model_weights.ckpt")
    return tensors


def convert(source: str, path: Path, output: Path, *options: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and ``config.json`` that the command writes."""
    assert main(["--from", source, "--input", str(path), "--output", str(output), *options]) == 0
    return load_file(output / "model.safetensors"), json.loads((output / "config.json").read_text())


def same_model(written: dict[str, Any], case: dict[str, Any]) -> bool:
    """Whether two ``config.json`` mean the same, special tokens apart."""
    special = {key: case[key] for key in ("bos_token_id", "eos_token_id")}
    return bool(find_model(written).read_config({**written, **special}) == find_model(case).read_config(case))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "tp", "pp", "options"),
    [
        ("megatron-gpt3", 1, 1, {}), ("megatron-gpt3", 2, 3, {}), ("megatron-rope", 2, 1, {"is_core": True}),
        ("megatron-llama", 2, 2, {"is_core": True}), ("megatron-llama", 2, 1, {"gates_apart": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["archive", "directory"])
def test_nemo_checkpoints_become_the_model_that_they_were_cut_from(
    name: str, tp: int, pp: int, options: dict[str, bool], form: str, tmp_path: Path
) -> None:
    expected = write_nemo(name, tmp_path, tp, pp, **options)
    path = tmp_path / "nemo"
    if form == "archive":
        path = tmp_path / "model.nemo"
        with tarfile.open(path, "w:gz" if tp == 1 else "w") as archive:
            archive.add(tmp_path / "nemo", ".")
    actual, written = convert("nemo", path, tmp_path / "out", "--vocab-size", "101")
    assert actual.keys() == expected.keys()
    assert all(actual[key].tobytes() == expected[key].tobytes() for key in expected)
    assert same_model(written, CASES_BY_NAME[name].config)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../escaped.yaml", tarfile.REGTYPE, r"holds '\.\./escaped\.yaml', which leads out of the archive"),
        ("/etc/passwd", tarfile.REGTYPE, "holds '/etc/passwd', which leads out of the archive"),
        ("model_weights.ckpt", tarfile.SYMTYPE, "holds 'model_weights.ckpt', which is no file but a link or device"),
        ("model_weights.ckpt", tarfile.LNKTYPE, "which is no file but a link or device"),
    ],
)
def test_an_archive_that_leads_out_of_itself_is_refused(name: str, kind: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(CheckpointError, match=message):
        main(["--from", "nemo", "--input", str(path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compression", ["", "gz"])
def test_an_archive_that_was_cut_off_is_said_to_be(compression: Literal["", "gz"], tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    with tarfile.open(path, f"w:{compression}") as archive:
        for name in ("model_weights.ckpt", "model_config.yaml"):
            member = tarfile.TarInfo(name)
            member.size = 1 << 16
            archive.addfile(member, io.BytesIO(np.random.default_rng(0).bytes(member.size)))
    path.write_bytes(path.read_bytes()[:70_000])
    with pytest.raises(CheckpointError, match=r"model\.nemo is cut off or damaged: .*; copy it again"):
        main(["--from", "nemo", "--input", str(path), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "holds no model_config.yaml"),
        ("- 1", "is not a mapping"),
        ("a: [", "is not YAML"),
        (
            {"activation": "geglu"},
            "activation='geglu' in model_config.yaml is not supported; supported: gelu, openai-gelu, swiglu",
        ),
        ({"num_moe_experts": 8}, "num_moe_experts=8 in model_config.yaml is not supported"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma=True"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True of this Megatron checkpoint is not supported"),
        ({"softmax_type": "learnable"}, "softmax_type='learnable'"),
        ({"rotary_base_per_layer": [1, 2]}, r"rotary_base_per_layer=\[1, 2\]"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
        ({"transformer_block_type": "post_ln"}, "transformer_block_type='post_ln'"),
        ({"hidden_size": "${x}"}, r"hidden_size='\$\{x\}' in model_config.yaml is not a whole number"),
        ({}, "holds no model_weights.ckpt and no distributed checkpoint in model_weights/; restore the weights"),
    ],
)
def test_what_is_no_such_nemo_checkpoint_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    good = {
        "hidden_size": 64,
        "num_layers": 3,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "max_position_embeddings": 128,
    }
    if config is not None:
        text = config if isinstance(config, str) else yaml.safe_dump({**good, **config})
        (tmp_path / "model_config.yaml").write_text(text)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        main(["--from", "nemo", "--input", str(tmp_path), "--output", str(tmp_path / "out")])


def write_faster_transformer(name: str, directory: Path, ranks: int, dtype: str) -> dict[str, np.ndarray]:
    """Write a case in FasterTransformer's layout; returns its tensors under transformers' names."""
    case = CASES_BY_NAME[name].config
    stored = load_file(write_checkpoint(CASES_BY_NAME[name], directory / "whole") / "model.safetensors")
    tensors = {key: value.astype({"fp32": np.float32, "fp16": np.float16}[dtype]) for key, value in stored.items()}
    folder, kind = directory / f"{ranks}-gpu", {"gpt2-plain": "gpt", "gptj-plain": "gptj", "llama-plain": "llama"}[name]
    folder.mkdir()

    def save(name: str, value: np.ndarray, axis: int | None = None) -> None:
        shares = [value] if axis is None else np.split(value, ranks, axis)
        for rank, share in enumerate(shares):
            (folder / (f"model.{name}.bin" if axis is None else f"model.{name}.{rank}.bin")).write_bytes(
                share.tobytes()
            )

    layers, heads = case.get("n_layer", 3), case.get("n_head", 4)
    d = case.get("n_embd", case.get("hidden_size"))
    top = {"gpt": ("transformer.wte", "transformer.ln_f"), "gptj": ("transformer.wte", "transformer.ln_f"),
           "llama": ("model.embed_tokens", "model.norm")}[kind]  # fmt: skip
    save("wte", np.concatenate([tensors[f"{top[0]}.weight"], np.zeros((5, d), tensors[f"{top[0]}.weight"].dtype)]))
    for side in ("weight", "bias") if kind != "llama" else ("weight",):
        save(f"final_layernorm.{side}", tensors[f"{top[1]}.{side}"])
    if kind == "gpt":
        save("wpe", tensors["transformer.wpe.weight"])
    else:
        for side in ("weight", "bias") if kind == "gptj" else ("weight",):
            save(f"lm_head.{side}", tensors[f"lm_head.{side}"])
    for number in range(layers):
        old, new = f"{'model.layers' if kind == 'llama' else 'transformer.h'}.{number}", f"layers.{number}"
        attention = f"{old}.{'self_attn' if kind == 'llama' else 'attn'}"
        if kind == "gpt":
            save(f"{new}.attention.query_key_value.weight", tensors[f"{attention}.c_attn.weight"].reshape(d, 3, d), 2)
            save(f"{new}.attention.query_key_value.bias", tensors[f"{attention}.c_attn.bias"].reshape(3, d), 1)
            save(f"{new}.attention.dense.weight", tensors[f"{attention}.c_proj.weight"], 0)
            save(f"{new}.attention.dense.bias", tensors[f"{attention}.c_proj.bias"])
        else:
            qkv = np.stack([tensors[f"{attention}.{letter}_proj.weight"] for letter in "qkv"]).transpose(2, 0, 1)
            save(f"{new}.attention.query_key_value.weight", qkv, 2)
            out = tensors[f"{attention}.{'o' if kind == 'llama' else 'out'}_proj.weight"]
            save(f"{new}.attention.dense.weight", out.T, 0)
        if kind == "llama":
            for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                save(f"{new}.{norm}", tensors[f"{old}.{norm}"])
            for each, axis in (("gate", 1), ("up", 1), ("down", 0)):
                save(f"{new}.mlp.{each}_proj.weight", tensors[f"{old}.mlp.{each}_proj.weight"].T, axis)
            continue
        norms = {"ln_1": "input_layernorm"} | ({"ln_2": "post_attention_layernorm"} if kind == "gpt" else {})
        for norm, theirs in norms.items():
            for side in ("weight", "bias"):
                save(f"{new}.{theirs}.{side}", tensors[f"{old}.{norm}.{side}"])
        up, down = (f"{old}.mlp.{each}" for each in (("c_fc", "c_proj") if kind == "gpt" else ("fc_in", "fc_out")))
        save(
            f"{new}.mlp.dense_h_to_4h.weight",
            tensors[f"{up}.weight"] if kind == "gpt" else tensors[f"{up}.weight"].T,
            1,
        )
        save(f"{new}.mlp.dense_h_to_4h.bias", tensors[f"{up}.bias"], 0)
        save(
            f"{new}.mlp.dense_4h_to_h.weight",
            tensors[f"{down}.weight"] if kind == "gpt" else tensors[f"{down}.weight"].T,
            0,
        )
        save(f"{new}.mlp.dense_4h_to_h.bias", tensors[f"{down}.bias"])
    section = {
        "model_name": name, "head_num": heads, "size_per_head": d // heads, "num_layer": layers, "tensor_para_size": ranks,
        "inter_size": case.get("intermediate_size", 4 * d), "vocab_size": case["vocab_size"], "start_id": 1, "end_id": 2,
        "weight_data_type": dtype, "layernorm_eps": 1e-5, "max_pos_seq_len": 128,
    } | ({} if kind == "gpt" else {"rotary_embedding": case.get("rotary_dim", d // heads)})  # fmt: skip
    parser = configparser.ConfigParser()
    parser[kind] = {key: str(value) for key, value in section.items()}
    with open(folder / "config.ini", "w") as file:
        parser.write(file)
    return tensors


def write_faster_neox(name: str, directory: Path, ranks: int, dtype: str) -> dict[str, np.ndarray]:
    """As FasterTransformer's ``huggingface_gptneox_convert.py`` writes: transposed, split, the biases after a sum divided."""
    case = CASES_BY_NAME[name].config
    stored = load_file(write_checkpoint(CASES_BY_NAME[name], directory / "whole") / "model.safetensors")
    tensors = {key: value.astype({"fp32": np.float32, "fp16": np.float16}[dtype]) for key, value in stored.items()}
    folder, heads, d = directory / f"{ranks}-gpu", case["num_attention_heads"], case["hidden_size"]
    folder.mkdir()
    top = {"gpt_neox.embed_in": "wte", "embed_out": "lm_head", "gpt_neox.final_layer_norm": "final_layernorm"}
    for key, value in tensors.items():
        owner, _, kind = key.rpartition(".")
        name_of, rows = (
            f"{top.get(owner, owner.removeprefix('gpt_neox.'))}.{kind}".replace("wte.weight", "wte"),
            value.T,
        )
        axis = {"dense_h_to_4h": -1, "query_key_value": -1}.get(owner.rpartition(".")[2])
        if owner in top or "layernorm" in owner:
            rows = value
        elif "query_key_value" in owner:
            lead = () if kind == "bias" else (d,)
            rows = np.moveaxis(rows.reshape(*lead, heads, 3, d // heads), -2, -3).reshape(*lead, 3, d)
        elif axis is None and kind == "weight":
            axis = 0
        elif axis is None:
            rows = rows / np.array(ranks, rows.dtype)
        for rank, share in enumerate([rows] if axis is None else np.split(rows, ranks, axis)):
            number = "" if axis is None else f".{rank}"
            (folder / f"model.{name_of}{number}.bin").write_bytes(np.ascontiguousarray(share).tobytes())
    section = {
        "head_num": heads, "size_per_head": d // heads, "inter_size": case["intermediate_size"], "num_layer": case["num_hidden_layers"],
        "rotary_embedding": int(d // heads * case["rotary_pct"]), "vocab_size": case["vocab_size"], "start_id": 1, "end_id": 2,
        "use_gptj_residual": int(case.get("use_parallel_residual", True)), "weight_data_type": dtype,
    }  # fmt: skip
    parser = configparser.ConfigParser()
    parser["gptneox"] = {key: str(value) for key, value in section.items()}
    with open(folder / "config.ini", "w") as file:
        parser.write(file)
    return tensors


@pytest.mark.parametrize("name", ["gpt_neox-parallel", "gpt_neox-odd-six-of-24-rotated"])
@pytest.mark.parametrize(("ranks", "dtype"), [(1, "fp32"), (4, "fp16")])
def test_gpt_neox_of_fastertransformer_becomes_the_checkpoint_that_it_was_cut_from(
    name: str, ranks: int, dtype: str, tmp_path: Path
) -> None:
    expected = write_faster_neox(name, tmp_path, ranks, dtype)
    actual, written = convert("fastertransformer", tmp_path / f"{ranks}-gpu", tmp_path / "out")
    assert actual.keys() == expected.keys()
    assert all(actual[key].tobytes() == expected[key].tobytes() for key in expected)
    case = {**CASES_BY_NAME[name].config, "rotary_emb_base": 10000, "hidden_act": "gelu_fast"}
    case |= {"max_position_embeddings": 2048, "torch_dtype": "float32" if dtype == "fp32" else "float16"}
    assert same_model(written, case)


@pytest.mark.parametrize("name", ["gpt2-plain", "gptj-plain", "llama-plain"])
@pytest.mark.parametrize(("ranks", "dtype"), [(1, "fp32"), (4, "fp16")])
def test_binary_directories_of_fastertransformer_become_the_checkpoint_that_they_were_cut_from(
    name: str, ranks: int, dtype: str, tmp_path: Path
) -> None:
    expected = write_faster_transformer(name, tmp_path, ranks, dtype)
    actual, written = convert("fastertransformer", tmp_path / f"{ranks}-gpu", tmp_path / "out")
    assert actual.keys() == expected.keys()
    assert all(actual[key].tobytes() == expected[key].tobytes() for key in expected)
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)
    assert same_model(
        written, {**CASES_BY_NAME[name].config, "torch_dtype": "float32" if dtype == "fp32" else "float16"}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inter_size": "12"}, r"dense_h_to_4h\.weight\.0\.bin has \d+ bytes, but float32 \(48, 6\) takes 1152"),
        (
            {"weight_data_type": "int8"},
            "weight_data_type=int8 in config.ini is not supported; supported: fp32, fp16, bf16",
        ),
        ({"layernorm_type": "post_layernorm"}, "layernorm_type=post_layernorm"),
        ({"tensor_para_size": "4"}, "holds 2 files .* of tensor_para_size=4"),
        ({"num_layer": "5"}, r"layers\.3\.input_layernorm\.weight\.bin is missing"),
        ({"vocab_size": "200"}, r"model\.wte\.bin has 102 rows, but 200 tokens are wanted"),
        ({"head_num": "four"}, "head_num='four' in config.ini is not a whole number"),
        ({"activation_type": "geglu"}, "activation_type=geglu"),
    ],
)
def test_binary_directories_that_do_not_fit_their_config_are_refused(
    change: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_faster_transformer("gpt2-plain", tmp_path, 2, "fp32")
    parser = configparser.ConfigParser()
    parser.read(tmp_path / "2-gpu" / "config.ini")
    parser["gpt"].update(change)
    with open(tmp_path / "2-gpu" / "config.ini", "w") as file:
        parser.write(file)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        main(["--from", "fastertransformer", "--input", str(tmp_path / "2-gpu"), "--output", str(tmp_path / "out")])


def test_a_directory_without_config_ini_or_of_another_model_is_refused(tmp_path: Path) -> None:
    arguments = ["--from", "fastertransformer", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"holds no config\.ini; give the directory of a layout"):
        main(arguments)
    (tmp_path / "config.ini").write_text("[bert]\n")
    with pytest.raises(
        ConfigError, match=r"describes \['bert'\]; \[gpt\]\[gptj\]\[gptneox\]\[llama\] can be converted"
    ):
        main(arguments)


def test_an_iteration_that_is_no_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"../\xae")
    with pytest.raises(CheckpointError, match=r"iteration\.txt holds '\.\./.', but it is a number or 'release'"):
        main(["--from", "megatron", "--input", str(tmp_path), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "text", [b"[gpt]\nhead_num = 4\n\0\0", b"head_num = 4\n", b"[gpt]\nx = 1\nx = 2\n", b"\xff\xfe[gpt]\n"]
)
def test_a_damaged_config_ini_is_one_sentence(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.ini cannot be read: .*; copy it again"):
        main(["--from", "fastertransformer", "--input", str(tmp_path), "--output", str(tmp_path / "out")])


@pytest.mark.torch
@pytest.mark.parametrize(
    "state", [{"model": {}}, [], {"args": {"hidden_size": 64}}, {"args": argparse.Namespace(hidden_size=64)}]
)
@pytest.mark.parametrize("file", ["mp_rank_00/model_optim_rng.pt", "common.pt"])
def test_a_file_without_megatrons_arguments_is_refused(file: str, state: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    torch.save(state, tmp_path / file)
    if file == "common.pt":
        (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(
        (CheckpointError, ConfigError), match=r"lacks .*num_layers.* among|without Megatron-LM's arguments"
    ):
        convert("megatron", tmp_path, tmp_path / "out")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        ({"group_query_attention": True}, {}, "lacks num_query_groups among Megatron-LM's arguments"),
        ({"num_layers": None}, {}, "lacks num_layers among Megatron-LM's arguments"),
        ({}, {"models": {}}, r"model_optim_rng\.pt holds no model of Megatron-LM under 'model'"),
        ({}, {"model": [1]}, r"model_optim_rng\.pt holds no model of Megatron-LM under 'model'"),
    ],
)
def test_a_ranks_file_without_groups_or_model_is_one_sentence(
    arguments: dict[str, Any], model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    given = {"hidden_size": 64, "num_attention_heads": 4, "num_layers": 4, "max_position_embeddings": 8, **arguments}
    (tmp_path / "mp_rank_00").mkdir()
    torch.save({"args": argparse.Namespace(**given), **model}, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=message):
        convert("megatron", tmp_path, tmp_path / "out")


@pytest.mark.torch
@pytest.mark.parametrize("source", ["megatron", "nemo"])
def test_files_of_ranks_with_interleaved_layers_are_refused(source: str, tmp_path: Path) -> None:
    """Megatron-LM's own then hold ``model0``, ``model1`` and so on, which was a traceback."""
    torch = pytest.importorskip("torch")
    path = tmp_path
    if source == "megatron":
        arguments = argparse.Namespace(
            hidden_size=64, num_attention_heads=4, num_layers=4, max_position_embeddings=8, virtual_pipeline_model_parallel_size=2
        )  # fmt: skip
        (tmp_path / "mp_rank_00").mkdir()
        torch.save({"args": arguments, "model0": {}, "model1": {}}, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
    else:
        write_nemo("megatron-gpt3", tmp_path, 1, 1)
        path = tmp_path / "nemo"
        config = yaml.safe_load((path / "model_config.yaml").read_text())
        (path / "model_config.yaml").write_text(yaml.safe_dump({**config, "virtual_pipeline_model_parallel_size": 2}))
    with pytest.raises(
        ConfigError, match=r"virtual_pipeline_model_parallel_size=2 interleaves the layers of the ranks' files"
    ):
        convert(source, path, tmp_path / "out")


@pytest.mark.torch
def test_objects_of_megatrons_own_classes_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    write_pieces("megatron-gpt3", tmp_path, 1, 1, 3.0, False)
    path = tmp_path / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    state = {**read_torch_file(path, "x"), **training_state(torch)}
    module = types.ModuleType("megatron.core.enums")
    kind = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module=module.__name__)  # type: ignore[misc]
    module.ModelType = kind  # type: ignore[attr-defined]
    state["args"].model_type = kind(1)
    state["args"].exit_signal, state["args"].load = signal.SIGTERM, tmp_path
    with monkeypatch.context() as patch:
        for name in ("megatron", "megatron.core", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save(state, path)
    assert main(["--from", "megatron", "--input", str(tmp_path), "--output", str(tmp_path / "out")]) == 0


@pytest.mark.torch
@pytest.mark.parametrize(
    ("module", "is_zip"), [(None, True), (b"numpy._core.multiarray", False), (b"numpy.core.multiarray", False)]
)
def test_random_states_and_the_optimizer_are_passed_over(module: bytes | None, is_zip: bool) -> None:
    """Files from before PyTorch 1.6 are no archives; NumPy 2 calls its module by another name than NumPy 1."""
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    state = {**training_state(torch), "model": {"a": torch.ones(2)}}
    if not is_zip:
        del state["rerun_state_machine"]
    torch.save(state, file, _use_new_zipfile_serialization=is_zip)
    content = file.getvalue() if module is None else re.sub(rb"numpy\._?core\.multiarray", module, file.getvalue())
    read = read_torch_file(io.BytesIO(content), "x")
    assert read["model"]["a"].tolist() == [1, 1]
    assert read["optimizer"]["optimizer"]["param_groups"][0]["lr"] == 1e-4


@pytest.mark.torch
def test_what_is_passed_over_is_taken_for_no_weight_and_no_argument() -> None:
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    torch.save(
        {"weight": np.ones(2), "swiglu": np.bool_(False), "base": np.float32(5), "random": torch.Generator()}, file
    )
    file.seek(0)
    read = read_torch_file(file, "x")
    with pytest.raises(CheckpointError, match="a weight or an argument of the checkpoint is an array, a number"):
        array_of(read["weight"])
    sizes = {"hidden_size": 64, "num_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 8}
    with pytest.raises(CheckpointError, match="a weight or an argument of the checkpoint is an array, a number"):
        config_of({**sizes, "swiglu": read["swiglu"]}, 101, "float32")
    with pytest.raises(ConfigError, match="rotary_base of this Megatron checkpoint is not a plain number"):
        config_of({**sizes, "rotary_base": read["base"]}, 101, "float32")


@pytest.mark.torch
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_a_pickle_would_run_is_named_with_our_way_out(is_zip: bool) -> None:
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("exit 1",)

    file = io.BytesIO()
    torch.save({"args": Evil()}, file, _use_new_zipfile_serialization=is_zip)
    file.seek(0)
    with pytest.raises(CheckpointError) as error:
        read_torch_file(file, "x")
    assert str(error.value) == (
        "x cannot be read as weights and plain values: it holds posix.system, which is not run; save the weights without it in the "
        "program that wrote them (Megatron-LM: --no-save-optim --no-save-rng)"
    )


@pytest.mark.torch
def test_a_damaged_file_of_pytorch_is_one_sentence() -> None:
    pytest.importorskip("torch")
    for content in (b"", b"garbage", b"PK\x03\x04 cut off", b"\x80\x02]q\x00"):
        with pytest.raises(
            CheckpointError, match=r"^x cannot be read as weights and plain values: [^\n\x1b]*; copy it again$"
        ):
            read_torch_file(io.BytesIO(content), "x")


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
    with pytest.raises(
        ConfigError,
        match=r"mp_rank_00/model_optim_rng\.pt and so on for every rank was not found: tensor-parallel rank 0",
    ):
        main(["--from", "megatron", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.router\.weight is no tensor of a GPT"):
        canonical_name("decoder.layers.0.mlp.router.weight", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotary_interleaved": True}, "rotary_interleaved=True of this Megatron checkpoint is not supported"),
        ({"use_rope_scaling": True}, "use_rope_scaling=True"),
        ({"softmax_type": "off-by-one"}, "softmax_type='off-by-one' of this Megatron checkpoint is not supported"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset=1.0"),
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value=7.0"),
        ({"qk_l2_norm": True}, "qk_l2_norm=True"),
        ({"softmax_scale": 0.5}, "softmax_scale=0.5"),
        ({"rotary_base_per_layer": [1e4, 1e6]}, "rotary_base_per_layer="),
        ({"head_wise_attn_gate": True}, "head_wise_attn_gate=True"),
        ({"use_mup": True}, "use_mup=True"),
        ({"scaling_recipe": "depth_mup"}, "scaling_recipe='depth_mup'"),
        (
            {"position_embedding_type": "none"},
            "position_embedding_type='none' .* positions may be learned_absolute or rope",
        ),
        ({"normalization": "RMSNorm", "apply_layernorm_1p": True}, "apply_layernorm_1p goes with LayerNorm"),
    ],
)
def test_arguments_of_megatron_that_would_be_dropped_are_refused(arguments: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 64, "num_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 8}
    assert config_of(sizes, 101, "float32")["position_embedding_type"] == "learned_absolute"
    defaults = {"softmax_type": "vanilla", "scaling_recipe": "none", "glu_linear_offset": 0.0, "softmax_scale": None}
    assert config_of({**sizes, **defaults}, 101, "float32") == config_of(sizes, 101, "float32")
    with pytest.raises(ConfigError, match=message):
        config_of({**sizes, **arguments}, 101, "float32")
