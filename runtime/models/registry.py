"""From the name in ``config.json`` to the family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models.base import Model
from phalanx.runtime.models.gemma import GEMMA
from phalanx.runtime.models.gpt2 import GPT2
from phalanx.runtime.models.llama import LLAMA

__all__ = ["MODELS", "find_model"]

MODELS: Mapping[str, Model] = MappingProxyType({model.architecture: model for model in (LLAMA, GPT2, GEMMA)})


def find_model(raw_config: Mapping[str, Any]) -> Model:
    """The family that ``architectures`` of a parsed ``config.json`` names.

    Raises:
        ConfigError: it names none, or none that Phalanx has.
    """
    names = raw_config.get("architectures") or []
    for name in names:
        if name in MODELS:
            return MODELS[name]
    raise ConfigError(f"architectures={names} in config.json is not supported; supported: {', '.join(MODELS)}")
