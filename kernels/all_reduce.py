# SPDX-License-Identifier: Apache-2.0
"""Sum over the GPUs of one host through each other's memory. Enqueues on the current stream and does not wait.

Two ways, equal bit by bit. *One-shot*: every rank sends everything to every other, once over the link. *Two-shot*: each rank
sums one chunk and sends it to all, twice over the link, but fewer bytes. See ``all_reduce.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phalanx.kernels.all_reduce_sizes import MOST_RANKS, exchange_vectors, is_two_shot
from phalanx.kernels.arrays import VECTOR_BYTES, Array, ceil_div, scalar_name
from phalanx.kernels.library import Library
from phalanx.parallel.errors import ExecutorError

__all__ = ["ABSENT_BYTE", "Exchange", "Launch", "all_reduce", "choose_launch", "fits"]

ABSENT_BYTE = 0xFF
"""What every byte of the exchange buffers holds before the first call."""

_DTYPES = frozenset({"bfloat16", "float16", "float32"})


@dataclass(frozen=True, slots=True)
class Exchange:
    """Where the ranks meet; addresses are this process's.

    Attributes:
        buffers: by rank, ``[2, capacity]`` vectors of 16 bytes each, full of `ABSENT_BYTE` at first.
        state: uint32 ``[2]`` on this rank's GPU, zero at first.
        abort: address of a uint32 of the host's memory, zero until a waiting kernel shall end.
    """

    rank: int
    buffers: tuple[int, ...]
    capacity: int
    state: Array
    abort: int

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.buffers)


@dataclass(frozen=True, slots=True)
class Launch:
    """How one call runs. Ranks may differ in blocks and threads, not in ``two_shot``."""

    two_shot: bool
    num_blocks: int
    num_threads: int


def fits(array: Array, exchange: Exchange) -> bool:
    """Whether the buffers hold ``array`` and its type is one that the kernels sum. The same on all ranks."""
    num_vectors = ceil_div(array.nbytes, VECTOR_BYTES)
    if not num_vectors or array.dtype.name not in _DTYPES:
        return False
    num_ranks = exchange.num_ranks
    return exchange_vectors(num_vectors, num_ranks, is_two_shot(num_vectors, num_ranks)) <= exchange.capacity


def choose_launch(num_vectors: int, num_ranks: int, num_multiprocessors: int) -> Launch:
    """One-shot while its extra bytes cost less than a second hop; never more blocks than run at once."""
    two_shot = is_two_shot(num_vectors, num_ranks)
    num_items = ceil_div(num_vectors, num_ranks) if two_shot else num_vectors
    num_threads = next((n for n in (128, 512) if num_items <= n * num_multiprocessors), 1024)
    return Launch(two_shot, min(num_multiprocessors, ceil_div(num_items, num_threads)), num_threads)


def all_reduce(library: Library, x: Array, exchange: Exchange, launch: Launch | None = None) -> None:
    """Replace ``x`` by its sum over the ranks. *Collective.* Enqueues; one call at a time on a rank.

    ``x``: C-contiguous, at a multiple of 16 bytes, such that it `fits`. ``launch``: instead of the chosen one.
    """
    num_vectors, rank, num_ranks = ceil_div(x.nbytes, VECTOR_BYTES), exchange.rank, exchange.num_ranks
    launch = launch or choose_launch(num_vectors, num_ranks, library.num_multiprocessors)
    num_held = exchange_vectors(num_vectors, num_ranks, launch.two_shot)
    if not x.flags.c_contiguous or x.data.ptr % VECTOR_BYTES or num_held > exchange.capacity:
        raise ExecutorError(
            f"{x.dtype.name}{list(x.shape)} at {x.data.ptr:#x} takes {num_held} vectors of {VECTOR_BYTES} bytes, of which "
            f"{exchange.capacity} fit; sum a shorter, C-contiguous and aligned array, or use NCCL"
        )
    kernel = library.function(
        "all_reduce", "all_reduce_two_shot" if launch.two_shot else "all_reduce_one_shot",
        SCALAR=scalar_name(x), RANK=rank, NUM_RANKS=num_ranks, NUM_THREADS=launch.num_threads,
        HAS_TAIL=int(x.nbytes % VECTOR_BYTES > 0),
    )  # fmt: skip
    peers = [exchange.buffers[(rank + k) % num_ranks] for k in range(num_ranks)]
    buffers = [np.uint64(address) for address in [*peers, *[0] * (MOST_RANKS - num_ranks)]]
    arguments = (
        x,
        np.int32(num_vectors),
        np.int32(x.nbytes % VECTOR_BYTES // x.dtype.itemsize),
        *buffers,
        np.int64(exchange.capacity),
        exchange.state,
        np.uint64(exchange.abort),
    )
    kernel((launch.num_blocks,), (launch.num_threads,), arguments)
