# SPDX-License-Identifier: Apache-2.0
"""What a model file may use: a small surface that stays (``docs/howto/own-model.md``).

A file given with ``--model-file``, or a module that a package offers as an entry point ``phalanx.models``, sets
``PHALANX_API = 1`` and ``MODEL``. Functions of a family are pure: the same calls on every rank, whatever the step holds.
"""

from __future__ import annotations

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.sharding import Shard
from phalanx.runtime.alibi import alibi_slopes
from phalanx.runtime.attention import AttentionSpec, HeadNorm
from phalanx.runtime.config import Activation, ModelConfig, RopeConfig
from phalanx.runtime.models import blocks, declarations
from phalanx.runtime.models.base import (
    Family,
    Pass,
    feed_forward_shard,
    head_shard,
    kv_head_shard,
    lm_head,
    token_table,
    vocabulary_shard,
)
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.registry import built_in
from phalanx.runtime.models.user_file import API_VERSION
from phalanx.runtime.ops import ExpertsSpec, Ops, Tensor

__all__ = [
    "API_VERSION",
    "Activation",
    "AttentionSpec",
    "ConfigError",
    "ConfigReader",
    "ExpertsSpec",
    "Family",
    "HeadNorm",
    "ModelConfig",
    "Ops",
    "Part",
    "Pass",
    "RopeConfig",
    "Shard",
    "Tensor",
    "WeightSpec",
    "alibi_slopes",
    "blocks",
    "built_in",
    "declarations",
    "feed_forward_shard",
    "head_shard",
    "kv_head_shard",
    "lm_head",
    "token_table",
    "vocabulary_shard",
]
