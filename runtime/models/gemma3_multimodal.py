# SPDX-License-Identifier: Apache-2.0
"""The text part of Gemma 3's checkpoints for texts and images (4B and larger)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from phalanx.runtime.models import gemma3
from phalanx.runtime.models.base import Family
from phalanx.runtime.models.gemma3 import GEMMA3, Gemma3Config
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.text_part import OTHER_TENSORS, read_text_config, text_pass

__all__ = ["GEMMA3_MULTIMODAL"]

_ARCHITECTURE = "Gemma3ForConditionalGeneration"
_DEFAULTS: Mapping[str, int] = MappingProxyType(
    {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8,
    }
)  # fmt: skip
"""What ``text_config`` leaves out; files of texts alone say it."""


def read_fields(reader: ConfigReader) -> Gemma3Config:
    """Read ``config.json`` of a ``Gemma3ForConditionalGeneration``."""
    reader.ignore("mm_tokens_per_image", "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id")
    return read_text_config(reader, _ARCHITECTURE, gemma3.read_fields, _DEFAULTS)


GEMMA3_MULTIMODAL = Family(
    architecture=_ARCHITECTURE,
    model_type="gemma3",
    read_fields=read_fields,
    passes={"decode": text_pass(GEMMA3.decode)},
    ignored_tensors=OTHER_TENSORS,
)
