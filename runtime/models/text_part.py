# SPDX-License-Identifier: Apache-2.0
"""The text part of checkpoints for texts and images: its fields in ``text_config``, its weights under a prefix; images are not read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import declarations
from phalanx.runtime.models.base import Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.token_fields import shown

__all__ = ["OTHER_TENSORS", "read_text_config", "text_pass"]

C = TypeVar("C", bound=ModelConfig)
_SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings")
"""Keys next to ``text_config`` that count for it where it does not have them."""
OTHER_TENSORS = (r"(model\.)?(vision_tower|multi_modal_projector)\..*", r"(language_model\.)?lm_head\.weight")
"""The other part; a copy of the token table, where they are tied."""


def read_text_config(
    reader: ConfigReader, architecture: str, read_fields: Callable[[ConfigReader], C], defaults: Mapping[str, Any]
) -> C:
    """Read ``text_config`` of ``reader``'s file as the family of ``read_fields``; ``defaults`` stand for what it leaves out.

    Raises:
        ConfigError: it is no object, or one of its fields is wrong.
    """
    text = reader.value("text_config", {})
    if not isinstance(text, dict):
        raise ConfigError(f"text_config={shown(text)} in config.json is not a JSON object; the file is damaged")
    outside = {name: reader.value(name) for name in _SHARED}
    inner = ConfigReader({**defaults, **{name: value for name, value in outside.items() if value is not None}, **text})
    config = read_fields(inner)
    inner.finish(f"text_config of {architecture}")
    reader.ignore("vision_config", "image_token_index", "image_token_id")
    return replace(config, architecture=architecture)


def text_pass(decode: Pass[C]) -> Pass[C]:
    """``decode`` with its weights where such checkpoints keep them."""
    return replace(
        decode,
        embed_weights=lambda config: _nested(decode.embed_weights(config)),
        block_weights=lambda config, layer: _nested(decode.block_weights(config, layer)),
        head_weights=lambda config: _nested(decode.head_weights(config)),
    )


def _nested(specs: list[WeightSpec]) -> list[WeightSpec]:
    """Published files put ``language_model.`` first; transformers 5 puts it after ``model.``, and leaves it out of the LM head's name."""
    inner = declarations.renamed(specs, "model.", "language_model.model.", "model.language_model.")
    return declarations.renamed(inner, "lm_head.", "language_model.lm_head.", "lm_head.")
