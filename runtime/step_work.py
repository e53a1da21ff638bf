# SPDX-License-Identifier: Apache-2.0
"""What a step reads and multiplies of each pipeline stage's weights, from ``config.json`` alone, for ``launch.plan --optimise``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from phalanx.checkpoints.formats import Format, FormatPlan, FormattedWeight, format_weights
from phalanx.checkpoints.quantization.held import meets_codes
from phalanx.parallel.topology import Layout
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.memory import DTYPE_BYTES, weight_bytes
from phalanx.runtime.models.base import Model
from phalanx.runtime.models.shapes import use_of
from phalanx.runtime.ops import ExpertsSpec

__all__ = ["StageWork", "stage_work"]


EXPERTS_TIME = 2.1
"""Time of experts' products by that of other products of 16-bit values, which their codes become. The plan counts with 60 % of an H200's 989
TFLOP/s; 2,048 tokens of Mixtral 8x7B reach 293 in bfloat16, 283 in fp8 and 253 in 4 bits (docs/benchmarks/h200.md): 2.0 to 2.4 times as long. Counted
as for fp8."""


@dataclass(frozen=True, slots=True)
class StageWork:
    """The weights of one tensor-parallel rank of a stage. Rows looked up in tables of tokens and positions are too few to count.

    Attributes:
        fixed_bytes: read by every step.
        expert_bytes: of all experts, and ``token_expert_bytes`` of those that one token takes.
        token_values: that a token is multiplied by. Codes of 8 bits that meet codes of inputs take half the time of 16-bit values
            and count half; values of experts count `EXPERTS_TIME`.
    """

    fixed_bytes: float = 0.0
    expert_bytes: float = 0.0
    token_expert_bytes: float = 0.0
    token_values: float = 0.0

    def read_bytes(self, num_tokens: float) -> float:
        """Bytes that a step of ``num_tokens`` reads, each token taking experts at random."""
        if not self.expert_bytes:
            return self.fixed_bytes
        untouched: float = (1 - self.token_expert_bytes / self.expert_bytes) ** num_tokens
        return self.fixed_bytes + self.expert_bytes * (1 - untouched)


def stage_work(
    model: Model, config: ModelConfig, layout: Layout, formats: FormatPlan, dtype: str
) -> tuple[StageWork, ...]:
    """One for each stage, of the tensor-parallel rank with the most to read: shares may be uneven.

    Raises:
        ConfigError: the model cannot be split so.
    """
    experts, itemsize = use_of(model, config).experts, DTYPE_BYTES[dtype]
    result = []
    for stage, layers in enumerate(model.stages(config, layout.pp)):
        specs = model.weights(config, layers, stage == 0, stage == layout.pp - 1)
        weights = format_weights(specs, formats)
        ranks = (
            _sum(_weight_work(weight, experts, tp_rank, layout.tp, itemsize) for weight in weights)
            for tp_rank in range(layout.tp)
        )
        result.append(max(ranks, key=lambda work: work.fixed_bytes + work.expert_bytes))
    return tuple(result)


def _sum(parts: Iterable[StageWork]) -> StageWork:
    names = [field.name for field in fields(StageWork)]
    values = [[getattr(part, name) for name in names] for part in parts]
    return StageWork(*map(sum, zip(*values, strict=True)))


def _weight_work(
    weight: FormattedWeight, experts: dict[str, ExpertsSpec], tp_rank: int, tp: int, itemsize: int
) -> StageWork:
    sizes = weight_bytes([weight], tp_rank, tp, itemsize)
    num_bytes = sum(sizes.values())
    if sizes["embedding"]:
        return StageWork()
    shape = weight.spec.local_shape(tp_rank, tp)
    values = math.prod(shape) if len(shape) == 2 else 0
    owner, _, matrix = weight.spec.owner.rpartition(".")
    if owner not in experts or matrix == "router":
        return StageWork(fixed_bytes=num_bytes, token_values=values * _share_of_time(weight.format))
    share = experts[owner].top_k / experts[owner].num_experts
    return StageWork(
        expert_bytes=num_bytes, token_expert_bytes=num_bytes * share, token_values=values * share * EXPERTS_TIME
    )


def _share_of_time(chosen: Format) -> float:
    """Of a product of 16-bit values."""
    return 0.5 if meets_codes(chosen) else 1.0
