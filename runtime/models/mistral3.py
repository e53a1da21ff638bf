# SPDX-License-Identifier: Apache-2.0
"""The text part of Mistral Small 3.1 and 3.2, which read images, too: Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models import mistral
from phalanx.runtime.models.base import Family
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.mistral import MISTRAL, MistralConfig
from phalanx.runtime.models.text_part import OTHER_TENSORS, read_text_config, text_pass
from phalanx.runtime.token_fields import shown

__all__ = ["MISTRAL3"]

_ARCHITECTURE = "Mistral3ForConditionalGeneration"
_PARTS_ABSENT: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    }
)  # fmt: skip
"""What ``text_config`` leaves out."""
_ALL_ABSENT: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32,
        "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None,
    }
)  # fmt: skip
"""Without ``text_config`` the class's sizes are those of Mistral Small 3.1."""


def read_fields(reader: ConfigReader) -> MistralConfig:
    """Read ``config.json`` of a ``Mistral3ForConditionalGeneration``.

    ``layer_types`` of its text part counts as in `mistral.attention`; transformers, whose text part is a ``MistralModel``, ignores them.
    """
    text = reader.value("text_config")
    if isinstance(text, dict) and text.get("model_type", "mistral") != "mistral":
        raise ConfigError(
            f"model_type={shown(text['model_type'])} in text_config of config.json is not supported for {_ARCHITECTURE}; only 'mistral' is"
        )
    reader.ignore("projector_hidden_act", "vision_feature_layer", "multimodal_projector_bias", "spatial_merge_size")
    defaults = _ALL_ABSENT if text is None else _PARTS_ABSENT
    config = read_text_config(reader, _ARCHITECTURE, mistral.read_fields, defaults)
    # What text_config says does not count; the table serves only where there is no LM head, which all published files have.
    return replace(config, tie_embeddings=reader.flag("tie_word_embeddings", True))


MISTRAL3 = Family(
    architecture=_ARCHITECTURE,
    model_type="mistral3",
    read_fields=read_fields,
    passes={"decode": text_pass(MISTRAL.decode)},
    ignored_tensors=OTHER_TENSORS,
)
