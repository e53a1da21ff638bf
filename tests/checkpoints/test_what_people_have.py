"""Directories and files that people really have: refused by what they are, with the way out, never by a guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phalanx.checkpoints.checkpoint import open_checkpoint
from phalanx.checkpoints.file_kinds import describe_content
from phalanx.parallel.errors import CheckpointError
from tests.checkpoints.safetensors_bytes import GOOD_CONFIG, entry, file_bytes

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"

CONTENTS = {
    "Git LFS": (LFS, "git lfs pull"),
    "Git Xet": (b"# xet version 0\nfilesize = 3\n", "git xet"),
    "git-annex": (b"/annex/objects/SHA256E-s1--0\n", "git annex get"),
    "web page": (b"<!DOCTYPE html><html><head><title>Sign in</title>" + b" " * 4000, "web page"),
    "web page after blanks": (b"\n  <HTML><body>429</body></HTML>", "web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "download it again"),
    "gated": (b"Access to model meta-llama/Llama-2-7b-hf is restricted", "sign in"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + b"\0" * 100, "GGUF"),
    "torch.save": (b"PK\x03\x04" + b"\0" * 100, "safe_serialization"),
    "old torch.save": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "HDF5"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 100, "gzip"),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_file_that_is_something_else_is_named(kind: str, file: str, tmp_path: Path) -> None:
    data, way_out = CONTENTS[kind]
    (tmp_path / "config.json").write_text(json.dumps(GOOD_CONFIG))
    (tmp_path / "model.safetensors").write_bytes(file_bytes({"a": entry(0, 16)}, 16))
    (tmp_path / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=file) as error:
        open_checkpoint(tmp_path)
    assert way_out in str(error.value)
    assert "\n" not in str(error.value)


def test_ordinary_contents_are_not_mistaken() -> None:
    good = [file_bytes({"a": entry(0, 16)}, 16), b'{"a": 1}', b"", b"version = 1", b"\x00" * 64]
    assert [describe_content(data) for data in good] == [None] * len(good)


@pytest.mark.parametrize("length", [0x280, 0x88B1F])
def test_a_header_whose_length_looks_like_another_format_is_read(length: int, tmp_path: Path) -> None:
    header = json.dumps({"a": entry(0, 16)}).encode().ljust(length)
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(16))
    (tmp_path / "config.json").write_text(json.dumps(GOOD_CONFIG))
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.source.names()) == ["a"]


FORMATS = {
    "pytorch_model.bin": "save_pretrained",
    "pytorch_model-00001-of-00002.bin": "save_pretrained",
    "consolidated.00.pth": "Hugging Face version",
    "original/consolidated.00.pth": "Hugging Face version",
    "model.pt": "save_pretrained",
    "last.ckpt": "save_pretrained",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "llama-7b.Q4_K_M.gguf": "GGUF",
    "gguf/model.gguf": "GGUF",
    "adapter_model.safetensors": "merge_and_unload",
    "adapter_config.json": "merge_and_unload",
    "model.nemo": "phalanx convert --from nemo",
    "model_config.yaml": "phalanx convert --from nemo",
    "latest_checkpointed_iteration.txt": "phalanx convert --from megatron",
    "mp_rank_00/model_optim_rng.pt": "phalanx convert --from megatron",
    "iter_0000007/__0_0.distcp": "phalanx convert --from megatron",
    "model.decoder.final_layernorm.weight/.zarray": "phalanx convert --from megatron",
    "iter_0000007/common.pt": "phalanx convert --from megatron",
    "model.wte.bin": "phalanx convert --from fastertransformer",
    "onnx/model.onnx": "ONNX",
    "weights.npz": "MLX",
    "global_step1/__0_0.distcp": "consolidate",
    "openvino_model.bin": "OpenVINO",
    "vocabulary.json": "CTranslate2",
    "rust_model.ot": "Rust",
    "model.safetensors.aria2": "unfinished download",
    "model.safetensors.incomplete": "unfinished download",
    "llama_float32_tp1_pp1_rank0.engine": "--engine-dir",
}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_in_another_format_are_named_with_the_way_out(name: str, with_config: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(GOOD_CONFIG))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert repr(name) in str(error.value)
    assert FORMATS[name] in str(error.value)


def test_a_zarr_directory_of_megatron_is_not_taken_for_pickled_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model.decoder.final_layernorm.weight"
    folder.mkdir()
    for file in (folder / ".zarray", folder / "0", tmp_path / "common.pt", tmp_path / "metadata.json"):
        file.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="phalanx convert --from megatron") as error:
        open_checkpoint(tmp_path)
    assert "AutoModelForCausalLM" not in str(error.value)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"])
def test_what_a_trainer_leaves_is_not_taken_for_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD_CONFIG))
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors$"):
        open_checkpoint(tmp_path)


def test_a_model_in_a_subdirectory_is_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"subdirectory 'hf' has one: give '.*/hf'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin"])
def test_a_file_given_for_a_directory_is_named_too(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"is a file; give a directory .*{name}"):
        open_checkpoint(tmp_path / name)
