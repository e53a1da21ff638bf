# SPDX-License-Identifier: Apache-2.0
"""The JSON files next to the weights. Imports nothing heavy: the memory planner needs only this."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from phalanx.checkpoints.file_kinds import describe_directory
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.quantization_files import QUANTIZATION_FILES, with_quantization_file
from phalanx.parallel.errors import CheckpointError, ConfigError

__all__ = [
    "CONFIG_FILE",
    "COPIED_FILES",
    "DEFAULT_TEMPLATE",
    "GENERATION_CONFIG_FILE",
    "TEMPLATE_FILE",
    "TEMPLATE_FOLDER",
    "TOOL_TEMPLATE",
    "demo_path",
    "read_config",
    "read_generation_config",
    "stored_dtype",
]

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT_TEMPLATE = "default.jinja"
TOOL_TEMPLATE = "tool_use.jinja"

COPIED_FILES = (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    *QUANTIZATION_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "ice_text.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "README.md",
)
"""What a split takes over from the model directory, where it is there."""


_DTYPES = ("float32", "bfloat16", "float16")
_DTYPE_SPELLINGS: Mapping[str, str] = MappingProxyType({"float": "float32", "half": "float16"})


def demo_path() -> Path:
    """Directory of the checkpoint that ships with Phalanx."""
    return Path(__file__).resolve().parent / "demo"


def read_config(directory: ModelDirectory) -> dict[str, Any]:
    """Parsed ``config.json``, with the ``quantization_config`` of its ``text_config`` or a file next to it if it has none.

    Raises:
        CheckpointError: it is missing or no JSON object.
        ConfigError: the two describe different quantisations.
    """
    if not directory.has(CONFIG_FILE):
        raise CheckpointError(_without_config(directory))
    return with_quantization_file(directory.read_json(CONFIG_FILE), directory)


def read_generation_config(directory: ModelDirectory) -> dict[str, Any]:
    """Parsed ``generation_config.json``; empty where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    return directory.read_json(GENERATION_CONFIG_FILE) if directory.has(GENERATION_CONFIG_FILE) else {}


def stored_dtype(config: Mapping[str, Any]) -> str:
    """Return the type that weights are stored in: ``dtype``, else ``torch_dtype``, else float32; in any spelling of torch.

    Raises:
        ConfigError: another type, or no name of one.
    """
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(key)
    name = "float32" if value is None else value.removeprefix("torch.") if isinstance(value, str) else ""
    name = _DTYPE_SPELLINGS.get(name, name)
    if name not in _DTYPES:
        raise ConfigError(
            f"{key}={str(value)[:80]!r} in {CONFIG_FILE} is not supported; supported: {', '.join(_DTYPES)}"
        )
    return name


def _without_config(directory: ModelDirectory) -> str:
    """What a directory without ``config.json`` is, and the way out."""
    names = directory.listing()
    message = f"{CONFIG_FILE!r} is missing from model directory {str(directory.path)!r}"
    inner = [name.partition("/")[0] for name in names if name.endswith(f"/{CONFIG_FILE}")]
    if inner:
        return f"{message}; its subdirectory {inner[0]!r} has one: give {str(directory.path / inner[0])!r}"
    if (found := describe_directory(names)) is not None:
        return f"{message}; {found}"
    if any(name.startswith("models--") for name in names):
        return f"{message}; it is a Hugging Face cache: give the name of a model (ORG/NAME), or one of its snapshots"
    return f"{message}; copy it there"
