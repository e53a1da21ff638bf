# SPDX-License-Identifier: Apache-2.0
"""Which models segments can compute, and one rank's programs."""

from __future__ import annotations

from phalanx.checkpoints.formats import FormatPlan
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Topology
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.capabilities import Capabilities
from phalanx.runtime.executors.cuda.ops import CAPABILITIES as CUDA_CAPABILITIES
from phalanx.runtime.executors.tensorrt.segments.decode import Programs, record
from phalanx.runtime.executors.weights import stage_weights
from phalanx.runtime.models import Model

__all__ = ["CAPABILITIES", "check_segments", "rank_programs"]

CAPABILITIES = Capabilities(
    engine="tensorrt", dtypes=frozenset({"float32", "float16"}), features=CUDA_CAPABILITIES.features
)
"""Attention, experts and embeddings are the CUDA executor's own."""


def check_segments(model: Model, config: ModelConfig, dtype: str) -> None:
    """Refuse what segments cannot compute.

    Raises:
        ConfigError: with what can be done instead.
    """
    if dtype == "bfloat16":
        raise ConfigError("TensorRT 8.6 has no bfloat16; use --dtype float16, or --engine cuda")
    CAPABILITIES.check(model, config, dtype)


def rank_programs(model: Model, config: ModelConfig, formats: FormatPlan, place: Topology) -> Programs:
    """What the rank at ``place`` computes."""
    specs = [weight.spec for weight in stage_weights(model, config, formats, place)]
    shapes = {spec.name: spec.local_shape(place.tp_rank, place.layout.tp) for spec in specs}
    layers = model.stages(config, place.layout.pp)[place.stage]
    return record(model.decode, config, layers, shapes, place)
