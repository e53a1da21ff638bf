"""The text part of Gemma 3's checkpoints for texts and images (4B and larger): Gemma 3 under a prefix; images are not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models import declarations, gemma3, llama
from phalanx.runtime.models.base import Family
from phalanx.runtime.models.gemma3 import GEMMA3, Gemma3Config
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.token_fields import shown

__all__ = ["GEMMA3_MULTIMODAL"]

_DEFAULTS: Mapping[str, int] = MappingProxyType(
    {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8,
    }
)  # fmt: skip
"""What ``text_config`` leaves out; files of texts alone say it."""
_SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings")
"""Keys next to ``text_config`` that count for it where it does not have them."""


def read_fields(reader: ConfigReader) -> Gemma3Config:
    """Read ``config.json`` of a ``Gemma3ForConditionalGeneration``."""
    text = reader.value("text_config", {})
    if not isinstance(text, dict):
        raise ConfigError(f"text_config={shown(text)} in config.json is not a JSON object; the file is damaged")
    outside = {name: reader.value(name) for name in _SHARED}
    inner = ConfigReader({**_DEFAULTS, **{name: value for name, value in outside.items() if value is not None}, **text})
    config = gemma3.read_fields(inner)
    inner.finish("text_config of Gemma3ForConditionalGeneration")
    reader.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index",
                  "boi_token_id", "eoi_token_id", "image_token_id")  # fmt: skip
    return replace(config, architecture="Gemma3ForConditionalGeneration")


def _nested(specs: list[WeightSpec]) -> list[WeightSpec]:
    """Published files put ``language_model.`` first; transformers 5 puts it after ``model.``."""
    return declarations.renamed(specs, "model.", "language_model.model.", "model.language_model.")


def embed_weights(config: Gemma3Config) -> list[WeightSpec]:
    """The token table."""
    return _nested(llama.embed_weights(config))


def block_weights(config: Gemma3Config, layer: int) -> list[WeightSpec]:
    """Gemma 3's."""
    return _nested(gemma3.block_weights(config, layer))


def head_weights(config: Gemma3Config) -> list[WeightSpec]:
    """Final norm and LM head."""
    return _nested(llama.head_weights(config))


GEMMA3_MULTIMODAL = Family(
    architecture="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    read_fields=read_fields,
    passes={
        "decode": replace(
            GEMMA3.decode, embed_weights=embed_weights, block_weights=block_weights, head_weights=head_weights
        )
    },
    # The other part; a copy of the token table, where they are tied.
    ignored_tensors=(r"(model\.)?(vision_tower|multi_modal_projector)\..*", r"(language_model\.)?lm_head\.weight"),
)
