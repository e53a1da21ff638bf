# SPDX-License-Identifier: Apache-2.0
"""What a file or a directory really is, when it is not the checkpoint that it should be: looked at before anything is guessed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

__all__ = ["HEAD_BYTES", "WEIGHT_SUFFIXES", "describe_content", "describe_directory"]

HEAD_BYTES = 256
"""Beginning of a file that `describe_content` wants to see."""

_CONTENTS: Sequence[tuple[bytes, str]] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` in the repository"),
    (b"version https://hawser", "a Git LFS pointer, not the file itself; run `git lfs pull` in the repository"),
    (
        b"# xet version",
        "a Git Xet pointer, not the file itself; run `git xet install` and check the repository out again",
    ),
    (b"/annex/objects/", "a git-annex pointer, not the file itself; run `git annex get` in the repository"),
    (b"GGUF", "a llama.cpp (GGUF) file; use the original model with *.safetensors"),
    (b"PK\x03\x04", "a ZIP archive, as torch.save writes it; save the model with safe_serialization=True"),
    (b"\x80\x02", "a Python pickle, as torch.save writes it; save the model with safe_serialization=True"),
    (b"\x89HDF", "an HDF5 file, as TensorFlow writes it; save the model with safe_serialization=True"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"<!doctype html", "a web page (a sign-in or error page?), not the file itself; download it again"),
    (b"<html", "a web page (a sign-in or error page?), not the file itself; download it again"),
    (b"<?xml", "an XML document (an error message?), not the file itself; download it again"),
    (b"Entry not found", "an error message of the download server, not the file itself; download it again"),
    (b"Access to model", "an error message of the download server, not the file itself; sign in and download it again"),
    (b"Invalid username or password", "an error message of the download server; sign in and download it again"),
)

_PICKLED = "convert it first: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) of transformers writes safetensors"
_CONVERTED = "make it a model directory first: phalanx convert --from {} --input DIR --output NEW_DIR"
_DIRECTORIES: Mapping[str, str] = MappingProxyType(
    {
        "adapter_config.json": "an adapter (PEFT, LoRA) without its base model; merge it into the base model first: "
        "merge_and_unload() of peft, then save_pretrained",
        "adapter_model.safetensors": "an adapter (PEFT, LoRA) without its base model; merge it into the base model first: "
        "merge_and_unload() of peft, then save_pretrained",
        "*.gguf": "a llama.cpp (GGUF) file; use the original model with *.safetensors",
        "*.ggml": "a llama.cpp (GGML) file; use the original model with *.safetensors",
        "openvino_*": "an OpenVINO model; use the original model with *.safetensors",
        "vocabulary.*": "a vocabulary of CTranslate2, whose weights cannot be read; use the original model with *.safetensors",
        "*.aria2": "an unfinished download; download the model again",
        "*.part": "an unfinished download; download the model again",
        "*.incomplete": "an unfinished download; download the model again",
        "model_config.yaml": f"the configuration of a NeMo checkpoint; {_CONVERTED.format('nemo')}",
        "*.nemo": f"a NeMo archive; {_CONVERTED.format('nemo')}",
        "latest_checkpointed_iteration.txt": f"what Megatron-LM writes next to its checkpoints; {_CONVERTED.format('megatron')}",
        "model_optim_rng.pt": f"what a rank of Megatron-LM saved; {_CONVERTED.format('megatron')}",
        ".zarray": f"a tensor in pieces, as Megatron-core saves them; {_CONVERTED.format('megatron')}",
        "common.pt": f"what Megatron-core saves next to tensors in pieces; {_CONVERTED.format('megatron')}",
        "*.distcp": "a piece of a distributed training checkpoint; of Megatron-LM's, "
        + _CONVERTED.format("megatron")
        + "; any other, consolidate and save as safetensors",
        "model.wte.bin": f"a tensor of FasterTransformer's; {_CONVERTED.format('fastertransformer')}",
        "pytorch_model*.bin": f"pickled PyTorch weights; {_PICKLED}",
        "*.bin": f"pickled PyTorch weights; {_PICKLED}",
        "*.pth": f"pickled PyTorch weights in the layout of their authors; use the Hugging Face version of the model, or {_PICKLED}",
        "*.pt": f"pickled PyTorch weights; {_PICKLED}",
        "*.ckpt*": f"a training checkpoint; {_PICKLED}",
        "*.h5": f"TensorFlow weights; {_PICKLED}",
        "*.ot": f"weights for Rust; {_PICKLED}",
        "*.msgpack": f"Flax weights; {_PICKLED}",
        "*.onnx": "an ONNX graph; use the original model with *.safetensors",
        "*.npz": "NumPy or MLX weights; use the original model with *.safetensors",
        "*.engine": "a TensorRT engine; give the model's own directory, and this one as --engine-dir",
    }
)
"""Patterns of file names, in the order in which they are looked for, and what such a file is."""

WEIGHT_SUFFIXES = frozenset(
    [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".ot",
        ".onnx",
        ".onnx_data",
        ".tflite",
        ".npz",
    ]
)
"""Of weights, of this and other programs: repositories on Hugging Face hold the same model in several formats."""

_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|random_states|rng_state).*\.(bin|pt|pth|pkl)")
"""What trainers save next to the weights."""


def describe_content(head: bytes) -> str | None:
    """Say what a file is that begins with ``head`` (`HEAD_BYTES`) and is neither safetensors nor JSON; None if unknown."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, description in _CONTENTS:
        if start.startswith(magic) or start[: len(magic)].lower() == magic:
            return description
    return None


def describe_directory(names: Sequence[str]) -> str | None:
    """Name the file that shows what a directory without usable weights holds, and the way out; None if none does.

    Args:
        names: files of the directory, those in its subdirectories as ``sub/name``.
    """
    weights = [name for name in names if not _NO_WEIGHTS.fullmatch(name.rpartition("/")[2])]
    for pattern, description in _DIRECTORIES.items():
        for name in sorted(weights, key=lambda name: ("/" in name, name)):
            if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern):
                return f"{name!r} is {description}"
    return None
