# SPDX-License-Identifier: Apache-2.0
"""How long a message each way of summing takes, and what the ranks' buffers need: arithmetic, without NumPy or a GPU."""

from __future__ import annotations

__all__ = ["MOST_BYTES", "MOST_RANKS", "exchange_bytes", "exchange_vectors", "is_two_shot"]

MOST_RANKS = 8
"""Ranks whose buffers a kernel takes: the GPUs that a host's NVLink switches join."""

_VECTOR_BYTES = 16

MOST_BYTES = 32 << 20
"""Above this, NCCL, which comes nearer with size (245 us to 201 at 64 MiB between two H200s): the buffers take up to 3.5
times this on every rank."""

_HOP_BYTES = 256 << 10
"""What a GPU sends over NVLink in the time that a second hop takes, which has to save more: 0.8 us at 330 GB/s."""

_ONE_SHOT_MOST_BYTES = 2 << 20
"""Above this, two-shot even between two GPUs, where it sends as much: each sum is formed once instead of on all ranks."""


def exchange_bytes(num_ranks: int, most_bytes: int = MOST_BYTES) -> int:
    """Bytes of one rank's buffers for messages of at most ``most_bytes``."""
    most_vectors = most_bytes // _VECTOR_BYTES
    sizes = {min(most_vectors, _one_shot_vectors(num_ranks)), most_vectors}
    return 2 * _VECTOR_BYTES * max(exchange_vectors(size, num_ranks, is_two_shot(size, num_ranks)) for size in sizes)


def is_two_shot(num_vectors: int, num_ranks: int) -> bool:
    """Whether a message of so many vectors of 16 bytes takes two hops: where one-shot's extra bytes cost more."""
    return num_vectors > _one_shot_vectors(num_ranks)


def _one_shot_vectors(num_ranks: int) -> int:
    """The longest message for one-shot. It sends R - 1 times the bytes, two-shot 2 (R - 1) / R times."""
    extra = (num_ranks - 1) * (num_ranks - 2) / num_ranks
    num_bytes = min(_ONE_SHOT_MOST_BYTES, _HOP_BYTES / extra if extra else _ONE_SHOT_MOST_BYTES)
    return int(num_bytes) // _VECTOR_BYTES


def exchange_vectors(num_vectors: int, num_ranks: int, two_shot: bool) -> int:
    """Vectors of half a buffer that a message takes."""
    if two_shot:
        return 2 * (num_ranks - 1) * -(-num_vectors // num_ranks)
    return (num_ranks - 1) * num_vectors
