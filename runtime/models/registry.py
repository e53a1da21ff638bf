# SPDX-License-Identifier: Apache-2.0
"""From the name in ``config.json`` to the family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models.baichuan import BAICHUAN
from phalanx.runtime.models.base import Model
from phalanx.runtime.models.bloom import BLOOM
from phalanx.runtime.models.chatglm import CHATGLM
from phalanx.runtime.models.chatglm1 import CHATGLM1
from phalanx.runtime.models.cohere import COHERE
from phalanx.runtime.models.cohere2 import COHERE2
from phalanx.runtime.models.falcon import FALCON
from phalanx.runtime.models.gemma import GEMMA
from phalanx.runtime.models.gemma2 import GEMMA2
from phalanx.runtime.models.gemma3 import GEMMA3
from phalanx.runtime.models.gemma3_multimodal import GEMMA3_MULTIMODAL
from phalanx.runtime.models.glm import GLM
from phalanx.runtime.models.glm4 import GLM4
from phalanx.runtime.models.gpt2 import GPT2
from phalanx.runtime.models.gpt_bigcode import GPT_BIGCODE
from phalanx.runtime.models.gpt_neox import GPT_NEOX
from phalanx.runtime.models.gptj import GPTJ
from phalanx.runtime.models.granite import GRANITE
from phalanx.runtime.models.internlm2 import INTERNLM2
from phalanx.runtime.models.llama import LLAMA
from phalanx.runtime.models.megatron import MEGATRON
from phalanx.runtime.models.mistral import MISTRAL
from phalanx.runtime.models.mistral3 import MISTRAL3
from phalanx.runtime.models.mixtral import MIXTRAL
from phalanx.runtime.models.mpt import MPT
from phalanx.runtime.models.nemotron import NEMOTRON
from phalanx.runtime.models.opt import OPT
from phalanx.runtime.models.phi import PHI
from phalanx.runtime.models.phi3 import PHI3
from phalanx.runtime.models.qwen import QWEN
from phalanx.runtime.models.qwen2 import QWEN2
from phalanx.runtime.models.qwen2_moe import QWEN2_MOE
from phalanx.runtime.models.qwen3 import QWEN3
from phalanx.runtime.models.qwen3_moe import QWEN3_MOE
from phalanx.runtime.models.smollm3 import SMOLLM3
from phalanx.runtime.models.stablelm import STABLELM
from phalanx.runtime.models.starcoder2 import STARCODER2
from phalanx.runtime.models.user_file import installed_model
from phalanx.runtime.token_fields import shown

__all__ = ["MODELS", "built_in", "find_model"]

_FAMILIES: tuple[Model, ...] = (
    LLAMA, GPT2, GEMMA, GEMMA2, GEMMA3, GEMMA3_MULTIMODAL, MISTRAL, MISTRAL3, MIXTRAL, QWEN, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, GPT_NEOX, GPTJ, BLOOM,
    OPT, FALCON, MPT, GPT_BIGCODE, STARCODER2, PHI, PHI3, INTERNLM2, BAICHUAN, CHATGLM1, CHATGLM, GLM, GLM4, COHERE, COHERE2,
    NEMOTRON, GRANITE, SMOLLM3, STABLELM, MEGATRON,
)  # fmt: skip

MODELS: Mapping[str, Model] = MappingProxyType({model.architecture: model for model in _FAMILIES})


def built_in(architecture: str) -> Model:
    """The built-in family of that name, for variants of it.

    Raises:
        ConfigError: there is none.
    """
    if architecture not in MODELS:
        raise ConfigError(f"there is no built-in family {architecture}; there are {', '.join(MODELS)}")
    return MODELS[architecture]


def find_model(raw_config: Mapping[str, Any], own: Model | None = None) -> Model:
    """Return the family that ``architectures`` of a parsed ``config.json`` names, or else ``model_type``.

    Args:
        own: the family of ``--model-file``, which comes before built-in ones; those of installed packages come after them.

    Raises:
        ConfigError: they name none, or none that Phalanx has; or ``own`` is another.
    """
    names = _architectures(raw_config)
    model_type = raw_config.get("model_type")
    for model in MODELS.values() if own is None else (own,):
        if model.told_by and not any(key in raw_config for key in model.told_by):
            continue
        if any(name in (model.architecture, *model.other_names) for name in names):
            return model
        if not names and model_type == model.model_type:
            return model
    if own is not None:
        raise ConfigError(
            f"--model-file defines {own.architecture}, but config.json has architectures={names}; give the file of that "
            "architecture, or leave --model-file out"
        )
    if (installed := installed_model(names)) is not None:
        return installed
    given = f"architectures={names}" if names else f"model_type={shown(model_type)}, without architectures,"
    known = ", ".join(re.sub("(ForCausalLM|LMHeadModel|Model)$", "", name) for name in MODELS)
    code = "code of the checkpoint (auto_map) is never run, " if raw_config.get("auto_map") else ""
    raise ConfigError(
        f"{given} in config.json is not supported; supported: {known} (docs/models.md); {code}--model-file takes yours"
    )


def _architectures(raw_config: Mapping[str, Any]) -> list[str]:
    value = raw_config.get("architectures")
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"architectures={shown(value)} in config.json is not a list of names; the file is damaged")
    return names
