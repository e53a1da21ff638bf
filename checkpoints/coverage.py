# SPDX-License-Identifier: Apache-2.0
"""The proof that a split holds everything: each element of each source tensor, in as many copies as declared.

The plan comes from the declared `Shard` alone (`planned_copies`), the count from the index ranges in the manifest; neither uses
the other's arithmetic.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from phalanx.checkpoints.boxes import copies
from phalanx.checkpoints.manifest import MANIFEST_FILE, Manifest
from phalanx.checkpoints.source import Index
from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import CheckpointError
from phalanx.parallel.sharding import Shard

__all__ = ["planned_copies", "verify_coverage"]


def planned_copies(stages: Sequence[Sequence[WeightSpec]], tp_size: int) -> dict[str, dict[int, int]]:
    """For every source tensor: how many of its stored elements are to be held how often, over all ranks.

    An unsplit part is on every tensor-parallel rank, a split one once, a copied unit (key/value heads fewer than ranks) on
    each rank of its group; a stage that needs the same elements twice holds them once (tied embeddings, q, k and v with one
    scale). Unsplit parts of a source that overlap (gate and up share a scale for 128 rows) are each there in full.
    """
    stages_of: Counter[Part] = Counter()
    for specs in stages:
        # Each once, but in their order: sets of strings have another in every process, and manifests are compared by bytes.
        stages_of.update([*dict.fromkeys(part.stored for spec in specs for part in spec.parts)])
    plan: dict[str, Counter[int]] = defaultdict(Counter)
    unsplit: dict[str, list[Part]] = defaultdict(list)
    for part, num_stages in stages_of.items():
        if part.shard is None:
            plan[part.source] += Counter()  # its place in the order
            unsplit[part.source] += [part] * num_stages
            continue
        for number, elements in _copies_in_stage(part, part.shard, tp_size).items():
            plan[part.source][num_stages * number] += elements
    for source, parts in unsplit.items():
        for number, elements in _overlaps(parts).items():
            plan[source][tp_size * number] += elements
    return {source: dict(counts) for source, counts in plan.items()}


def verify_coverage(manifest: Manifest) -> None:
    """Check that every element of every source tensor is held exactly as often as planned.

    Raises:
        CheckpointError: naming the first tensor for which that is not so.
    """
    boxes: dict[str, list[Index]] = defaultdict(list)
    for entry in manifest.ranks:
        for piece in entry.tensors:
            boxes[piece.source].append(piece.box)
    for name, tensor in manifest.sources.items():
        held = copies(tensor.shape, boxes[name])
        planned = {int(number): elements for number, elements in tensor.copies.items() if number.isdigit()}
        if held != planned or 0 in held:
            raise CheckpointError(
                f"{MANIFEST_FILE} does not cover {name[:120]!r}: elements by number of copies are {_text(held)}, "
                f"planned {_text(planned)}; split again"
            )


def _copies_in_stage(part: Part, shard: Shard, tp_size: int) -> dict[int, int]:
    """How many elements of a split part are held how often over the ranks of one stage."""
    extent = part.shape[shard.axis]
    others = math.prod(part.shape) // extent
    return {number: others * rows for number, rows in shard.copies(extent, tp_size).items()}


def _overlaps(parts: Sequence[Part]) -> Counter[int]:
    """How many elements of a source are in how many of its ``parts``."""
    rows = [(part.first_row, part.first_row + part.shape[0]) for part in parts]
    width, result = math.prod(parts[0].shape[1:]), Counter[int]()
    for low, high in pairwise(sorted({edge for edges in rows for edge in edges})):
        if number := sum(start <= low and high <= stop for start, stop in rows):
            result[number] += (high - low) * width
    return result


def _text(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{number}x: {elements}" for number, elements in sorted(counts.items()))
