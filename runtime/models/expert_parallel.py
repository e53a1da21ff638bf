# SPDX-License-Identifier: Apache-2.0
"""``--expert-parallel``: tensor-parallel ranks own experts whole."""

from __future__ import annotations

import dataclasses

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.base import Model
from phalanx.runtime.models.shapes import use_of

__all__ = ["with_expert_parallel"]


def with_expert_parallel(model: Model, config: ModelConfig, wanted: bool) -> ModelConfig:
    """``config`` as the operator wants its experts spread.

    All ranks hold all tokens, so each computes its own experts' share for every token and the sum over ranks that follows
    anyway brings them together: no exchange of tokens. The price is balance: a rank whose experts are popular has more to do.

    Raises:
        ConfigError: the model has no experts.
    """
    if wanted and not use_of(model, config).experts:
        raise ConfigError(f"--expert-parallel: {config.architecture} has no experts; leave it out")
    return dataclasses.replace(config, expert_parallel=wanted)
