# SPDX-License-Identifier: Apache-2.0
"""What a split writes: for each rank of the layout, the boxes of source tensors that it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phalanx.checkpoints.formats import FormatPlan, components_of, format_weights
from phalanx.checkpoints.quantization.kv_scales import stored_kv_scales
from phalanx.checkpoints.resolve import resolve, stored_index
from phalanx.checkpoints.source import Index, TensorInfo, TensorSource, index_shape
from phalanx.checkpoints.spec import WeightSpec

__all__ = ["PlannedPiece", "PlannedRank", "SplitJob", "plan_ranks", "stored_weights"]


@dataclass(frozen=True, slots=True)
class SplitJob:
    """What is to be split and how.

    Attributes:
        architecture: name of the model family, for the manifest.
        stages: weight declaration of each pipeline stage, components of their formats.
        tp_size: tensor-parallel ranks of each stage.
        layers: which layers each stage has, for the manifest.
        ignored: regular expressions of tensors that are left out.
        dtype: stored format to convert plain weights to (``BF16``); None = as they are.
        model_code: digest of the file that defines the family, for the manifest; empty for built-in ones.
    """

    architecture: str
    stages: tuple[Sequence[WeightSpec], ...]
    tp_size: int
    ignored: tuple[str, ...] = ()
    dtype: str | None = None
    model_code: str = ""
    layers: tuple[range, ...] = ()

    @property
    def all_specs(self) -> list[WeightSpec]:
        """The whole model's declaration."""
        return [spec for stage in self.stages for spec in stage]


@dataclass(frozen=True, slots=True)
class PlannedPiece:
    """A box of a source tensor, and how it is stored."""

    source: str
    box: Index
    info: TensorInfo
    name: str


@dataclass(frozen=True, slots=True)
class PlannedRank:
    """One rank's file: pieces in the order of the declaration, each box once."""

    rank: int
    stage: int
    tp_rank: int
    pieces: tuple[PlannedPiece, ...]


def stored_weights(source: TensorSource, weights: Sequence[WeightSpec], formats: FormatPlan) -> list[WeightSpec]:
    """What a split holds of a stage's weights: components of their formats, and scales of an fp8 cache."""
    scales = stored_kv_scales(source, weights) if formats.has_kv_scales else []
    return [*components_of(format_weights(weights, formats)), *scales]


def plan_ranks(source: TensorSource, job: SplitJob) -> tuple[Mapping[str, str], tuple[PlannedRank, ...]]:
    """Names of declared tensors in ``source``, and every rank's pieces.

    Raises:
        CheckpointError: ``source`` does not hold exactly what the job declares.
        ConfigError: the model cannot be split so.
    """
    stored_names = resolve(source, job.all_specs, job.ignored)
    ranks = [
        PlannedRank(stage * job.tp_size + tp_rank, stage, tp_rank, _pieces(source, stored_names, specs, tp_rank, job))
        for stage, specs in enumerate(job.stages)
        for tp_rank in range(job.tp_size)
    ]
    return stored_names, tuple(ranks)


def _pieces(
    source: TensorSource, stored_names: Mapping[str, str], specs: Sequence[WeightSpec], tp_rank: int, job: SplitJob
) -> tuple[PlannedPiece, ...]:
    pieces: dict[str, PlannedPiece] = {}
    for part, dtype in ((part, spec.dtype) for spec in specs for part in spec.parts):
        stored = stored_names[part.source]
        info = source.info(stored)
        box = stored_index(part, tp_rank, job.tp_size, info.shape)
        if math.prod(index_shape(box)) == 0:
            continue  # a rank that holds nothing but vocabulary padding
        name = stored + ("" if box == info.whole else _box_text(box))
        converted = None if part.encoding or dtype else job.dtype
        pieces[name] = PlannedPiece(stored, box, TensorInfo(index_shape(box), converted or info.dtype), name)
    return tuple(pieces.values())


def _box_text(box: Index) -> str:
    return f"[{', '.join(f'{part.start}:{part.stop}' for part in box)}]"
