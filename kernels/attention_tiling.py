# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the attention kernels: what fits a GPU's shared memory and registers, and the scratch memory it takes.

The constants restate the layouts of ``attention_decode*.cuh``, ``attention_prefill*.cu`` and ``attention_work_split.cuh``; the
kernels refuse to compile with a shared-memory size below what they use.
"""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.kernels.arrays import ceil_div

__all__ = [
    "DECODE_TILE",
    "DecodeTiling",
    "PrefillTiling",
    "WorkspaceLayout",
    "shared_bytes_per_multiprocessor",
]

DECODE_TILE = 64
DECODE_CONSUMERS = 128
SPLIT_HEADER = 8
SPLIT_RANGE = 12
_WARPS = 4
_RESERVED_BYTES = 1024  # of shared memory, taken by the driver for each block
_SMALL_BYTES = 256  # barriers, flags and alignment
_DEEPEST_RING = 12
_FEW_DIMS = 128  # of a head: with one column of heads a thread's queries and sums then fit into the 96 registers that four blocks leave it on Hopper
_SHARED_KIB = {80: 164, 87: 164, 90: 228, 100: 228, 101: 228, 103: 228, 110: 228}
_SMALLEST_SHARED_KIB = 100  # sm_86, sm_89, sm_120


def shared_bytes_per_multiprocessor(architecture: str) -> int:
    """Shared memory of one multiprocessor of ``"sm_90a"`` and the like (CUDA programming guide, compute capabilities)."""
    number = int(architecture.removeprefix("sm_").rstrip("af"))
    return 1024 * _SHARED_KIB.get(number, _SMALLEST_SHARED_KIB)


def row_bytes(head_dim: int) -> int:
    """One row of keys in shared memory, padded to an odd number of 16-byte pieces: two for each 16 dims, and one."""
    return (2 * ceil_div(head_dim, 16) + 1) * 16


@dataclass(frozen=True, slots=True)
class DecodeTiling:
    """Constants of one specialisation of ``attention_decode.cu``.

    Attributes:
        heads_per_item: query heads that share one pass over the keys.
        head_tiles: passes that a group of query heads needs.
        ring: shared-memory slots, each a tile of keys or of values.
        blocks_per_multiprocessor: thread blocks that run at once on one multiprocessor.
        shared_bytes: of one block.
        partial_floats: one partial result in the workspace.
    """

    heads_per_item: int
    head_tiles: int
    ring: int
    blocks_per_multiprocessor: int
    shared_bytes: int
    partial_floats: int

    @property
    def defines(self) -> dict[str, int]:
        """The kernel's own compile-time constants."""
        return {
            "HEADS_PER_ITEM": self.heads_per_item,
            "RING": self.ring,
            "MIN_BLOCKS": self.blocks_per_multiprocessor,
            "SHARED_BYTES": self.shared_bytes,
        }

    @classmethod
    def choose(cls, head_dim: int, group: int, architecture: str, has_fp8_pages: bool = False) -> DecodeTiling:
        """As many heads to a pass as registers hold, then as many blocks to a multiprocessor, with the deepest ring.

        A block computes a tile in a chain of products and barriers, under which others load: four keep the memory busier than
        two with deeper rings (on an H200 by 3 to 15 % with 64 sequences of 2,048 tokens and more).
        """
        steps = ceil_div(head_dim, 16)
        head_tiles = ceil_div(group, 16 if head_dim > 128 else 24)
        heads_per_item = ceil_div(group, head_tiles)
        columns = ceil_div(heads_per_item, 8)
        total = shared_bytes_per_multiprocessor(architecture)
        slot_bytes = DECODE_TILE * ((steps | 1) * 16 if has_fp8_pages else row_bytes(head_dim))
        fixed = 2 * columns * 8 * row_bytes(head_dim) + columns * (DECODE_TILE * 16 + 2 * _WARPS * 8 * 4) + _SMALL_BYTES
        per_slot = slot_bytes + 32 + 16

        def deepest(blocks: int) -> int:
            return min(_DEEPEST_RING, (total // blocks - _RESERVED_BYTES - fixed) // per_slot)

        suits_four = head_dim <= _FEW_DIMS and columns == 1 and architecture == "sm_90a"  # elsewhere some spill
        blocks = 4 if suits_four and deepest(4) >= 2 else 2 if deepest(2) >= 3 else 1
        ring = deepest(blocks)
        partial_floats = ceil_div(steps, _WARPS) * columns * DECODE_CONSUMERS * 4 + columns * 16
        return cls(heads_per_item, head_tiles, ring, blocks, fixed + ring * per_slot, partial_floats)


@dataclass(frozen=True, slots=True)
class PrefillTiling:
    """Which prefill kernel runs, and its constants.

    Attributes:
        source: name of the kernel and of its file.
        rows: query rows (tokens times heads of a group) of one block.
        threads: of one block.
        shared_bytes: of one block.
        defines: the kernel's own compile-time constants.
    """

    source: str
    rows: int
    threads: int
    shared_bytes: int
    defines: dict[str, int]

    @classmethod
    def choose(cls, head_dim: int, architecture: str) -> PrefillTiling:
        """Hopper's kernel for the head sizes that it supports, else the portable one with the largest tile that fits."""
        limit = shared_bytes_per_multiprocessor(architecture) - _RESERVED_BYTES
        if architecture == "sm_90a" and head_dim in (64, 128, 256):
            return cls._wgmma(head_dim, limit)
        candidates = [(8, 64), (8, 32), (4, 32), (4, 16), (2, 16)]
        sizes = [(warps * 16 + 4 * keys) * row_bytes(head_dim) + _SMALL_BYTES for warps, keys in candidates]
        best = next(i for i, size in enumerate(sizes) if size <= limit)
        warps, keys = candidates[best]
        defines = {"WARPS": warps, "KEYS": keys, "SHARED_BYTES": sizes[best]}
        return cls("attention_prefill", warps * 16, warps * 32, sizes[best], defines)

    @classmethod
    def _wgmma(cls, head_dim: int, limit: int) -> PrefillTiling:
        rows = 128
        keys, query_slots = (64, 1) if head_dim > 128 else (128, 2)
        fixed = query_slots * rows * head_dim * 2 + 2 * 1024  # barriers and alignment, in units of the swizzle's period
        ring = min(8, (limit - fixed) // (keys * head_dim * 2))
        shared_bytes = fixed + ring * keys * head_dim * 2
        defines = {"KEYS": keys, "RING": ring, "QUERY_SLOTS": query_slots, "SHARED_BYTES": shared_bytes}
        return cls("attention_prefill_wgmma", rows, 384, shared_bytes, defines)


@dataclass(frozen=True, slots=True)
class WorkspaceLayout:
    """Byte offsets of the parts of a workspace, each 256-byte aligned; see ``attention_work_split.cuh``."""

    work_split: int
    decode_ends: int
    prefill_ends: int
    prefill_tiles: int
    flags: int
    partials: int
    num_bytes: int

    @classmethod
    def of(cls, max_workers: int, max_num_seqs: int, max_prefill_tiles: int, partial_floats: int) -> WorkspaceLayout:
        """Sizes: two partial results with a flag each a worker, eight integers a prefill tile, one a sequence and kind."""
        sizes = (
            4 * (SPLIT_HEADER + SPLIT_RANGE * max_workers),
            4 * max_num_seqs,
            4 * max_num_seqs,
            32 * max_prefill_tiles,
            4 * 2 * max_workers,
            4 * 2 * max_workers * partial_floats,
        )
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + 256 * ceil_div(size, 256))
        return cls(*offsets)
