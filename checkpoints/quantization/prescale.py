# SPDX-License-Identifier: Apache-2.0
"""Factors of a product's inputs, one for each column: what SmoothQuant and AWQ divided the weight's columns by (``pre_quant_scale``).

Source: ModelOpt ``torch/export/quant_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from phalanx.checkpoints.quantization.encodings import Scales
from phalanx.checkpoints.spec import DummyRange, Part, WeightSpec, find_stored
from phalanx.parallel.errors import CheckpointError

if TYPE_CHECKING:
    from phalanx.checkpoints.formats import Format
    from phalanx.checkpoints.source import Array

__all__ = ["common_prescale", "has_prescale", "prescale_component", "with_prescale"]


def with_prescale(
    choose: Callable[[WeightSpec], Format], suffix: str, is_scaled: Callable[[WeightSpec], bool]
) -> Callable[[WeightSpec], Format]:
    """``choose``, with factors for the inputs of weights that ``is_scaled`` says have them."""
    from phalanx.checkpoints.quantization.group_codes import GroupCodes
    from phalanx.checkpoints.quantization.row_codes import RowCodes

    def of_weight(spec: WeightSpec) -> Format:
        chosen = choose(spec)
        return chosen.with_prescale(suffix) if isinstance(chosen, GroupCodes | RowCodes) and is_scaled(spec) else chosen

    return of_weight


def has_prescale(spec: WeightSpec, suffix: str, stored: Collection[str], in_all_layers: bool = False) -> bool:
    """Whether ``stored``, the names of a checkpoint's tensors, have factors for the inputs of a weight.

    Raises:
        CheckpointError: for some of its parts only, or, with ``in_all_layers``, for the same weight of other layers only.
    """
    found = {part.source: find_stored(part.siblings(suffix), stored) is not None for part in spec.parts}
    if len(set(found.values())) > 1:
        first, other = (next(name for name, has in found.items() if has == wanted) for wanted in (True, False))
        raise CheckpointError(
            f"the inputs of {first} have factors ({suffix}), but those of {other}, which is computed in the same product, have not; "
            "export the checkpoint with ModelOpt again, or use the unquantised one"
        )
    has = all(found.values())
    if in_all_layers and not has and (name := _scaled_elsewhere(spec, suffix, stored)):
        raise CheckpointError(
            f"the inputs of {spec.parts[0].source} have no factors ({suffix}), but those of the same matrix in another layer have ({name}); "
            "copy the checkpoint again"
        )
    return has


def _scaled_elsewhere(spec: WeightSpec, suffix: str, stored: Collection[str]) -> str | None:
    """Name of the factors of a weight that is called like ``spec`` but for its numbers, if there are any."""
    own = {name for part in spec.parts for name in part.siblings(suffix)}
    called = re.compile("|".join({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in own}))
    return min((name for name in stored if name.endswith(f".{suffix}") and called.fullmatch(name)), default=None)


def prescale_component(spec: WeightSpec, suffix: str) -> WeightSpec:
    """``<owner>.prescale`` ``[parts, I]``, float32, stored as ``<module>.<suffix>`` ``[I]``."""
    parts = tuple(_factors(part, suffix) for part in spec.parts)
    return WeightSpec(f"{spec.owner}.prescale", parts, dtype="F32", dummy=DummyRange(1.0, 1.0))


def common_prescale(prescale: Array) -> Array:
    """``[1, I]``, the one row of factors that all parts of a weight share.

    Raises:
        CheckpointError: they differ, so that the parts cannot be computed as one product.
    """
    if (prescale != prescale[:1]).any():
        raise CheckpointError(
            "the inputs of matrices that are computed as one product (q, k and v; gate and up; experts) have different factors "
            "(pre_quant_scale); export the checkpoint with ModelOpt, which gives them the same"
        )
    return prescale[:1]


def _factors(part: Part, suffix: str) -> Part:
    source, *aliases = part.siblings(suffix)
    shard = part.shard if part.shard is not None and part.shard.axis == 1 else None
    return replace(
        part, source=source, aliases=tuple(aliases), shape=(1, part.shape[1]), shard=shard, transposed=False,
        first_row=0, source_rows=0, encoding=Scales(of="inputs"),
    )  # fmt: skip
