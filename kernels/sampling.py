# SPDX-License-Identifier: Apache-2.0
"""Sampling over vocabulary-parallel logits. Every call enqueues on the current stream and does not wait.

Rows that need no more than the best token, greedy or with noise, stay where they are: ``local_argmax`` leaves eight bytes
a row and slice, one small all-gather brings them together, ``merge_argmax`` names the token on every rank.

Rows with top-k, top-p, min-p or log-probabilities need the whole vocabulary in one place. ``sample_rows`` and
``log_probabilities`` read it as a gather over the ranks leaves it, ``[R, S, V_local]``; one rank alone passes
``[1, S, V_local]``.

A token depends on its row's logits, seed and position alone: not on the batch, the rank or which of the two ways it took.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, require, scalar_name, vector_width
from phalanx.kernels.library import KernelFunction, Library
from phalanx.parallel.errors import ExecutorError

__all__ = [
    "MAX_TOP",
    "PlanMasks",
    "RowParameters",
    "TokenCache",
    "adjust_logits",
    "local_argmax",
    "log_probabilities",
    "merge_argmax",
    "num_splits",
    "sample_rows",
]

MAX_TOP = 1024
"""Maximum number of alternatives that ``log_probabilities`` reports a row."""

_ARGMAX_THREADS = 256
_MERGE_THREADS = 128
_ROW_THREADS = 512
_FEWEST_BLOCKS = 4 * 132  # four for each multiprocessor of an H200, whatever the device: ranks gather keys of one shape
_ADJUST_THREADS = 256
_ADJUST_SLICE = 8192  # columns of a block
_CLUSTERS = (8, 2)
_ROWS_PER_MULTIPROCESSOR = 2  # blocks of _ROW_THREADS that are resident at once


@dataclass(frozen=True, slots=True)
class RowParameters:
    """How each row samples; device arrays of S rows.

    Attributes:
        records: [S, W] int32, the bits of one admission record a row.
        positions: [S] int32, of the token to be sampled: what makes the noise new at every step.
        struct: the members of a record in CUDA C. The kernels use ``temperature`` (0 = greedy), ``seed_low``, ``seed_high``,
            ``top_k`` (0 = all tokens), ``top_p`` (1 = all tokens), ``min_p`` (0 = all tokens), ``repetition_penalty``,
            ``presence_penalty``, ``frequency_penalty`` (0 = none), ``seq_index``, ``num_prompt`` and ``num_biases``.
    """

    records: Array
    positions: Array
    struct: str

    def check(self, num_rows: int) -> None:
        """Raise ExecutorError unless there are ``num_rows`` records and positions."""
        require("records", self.records, (num_rows, self.records.shape[1]), "int32")
        require("positions", self.positions, (num_rows,), "int32")


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Where the tokens of each sequence are; device arrays of int32.

    Attributes:
        block_tables: [sequences, blocks per sequence] block ids.
        token_ids: [N, P], the token at each position of a block.
    """

    block_tables: Array
    token_ids: Array


@dataclass(frozen=True, slots=True)
class PlanMasks:
    """Which tokens rows may choose; device arrays of int32.

    Attributes:
        offsets: [S] where in ``words`` the row's mask begins, a bit for each token; -1 = any token.
        words: [W]
    """

    offsets: Array
    words: Array


def adjust_logits(
    library: Library, logits: Array, parameters: RowParameters, biases: Array, cache: TokenCache, masks: PlanMasks,
    out: Array, *, vocab_start: int, vocab_size: int,
) -> None:  # fmt: skip
    """``out`` = ``logits`` with each row's mask, the token biases of its sequence that still count, and its penalties.

    logits [S, V_local] are those of tokens from ``vocab_start`` on; biases [sequences, N, 4] int32, the bits of token, bias,
    first position without it and number of entries after it that must come before it, of which a record's ``num_biases`` count; ``cache`` holds the tokens before each row's
    position; out [S, V_local] float32.
    """
    num_rows, part_size = logits.shape
    require("logits", logits, (num_rows, part_size), logits)
    require("biases", biases, (*biases.shape[:2], 4), "int32")
    require("block_tables", cache.block_tables, (biases.shape[0], cache.block_tables.shape[1]), "int32")
    require("token_ids", cache.token_ids, cache.token_ids.shape[:2], "int32")
    require("offsets", masks.offsets, (num_rows,), "int32")
    require("words", masks.words, masks.words.shape, "int32")
    require("out", out, (num_rows, part_size), "float32")
    parameters.check(num_rows)
    kernel = library.function(
        "adjust_logits",
        "adjust_logits",
        SCALAR=scalar_name(logits),
        VEC=vector_width(logits, part_size),
        NUM_THREADS=_ADJUST_THREADS,
        SLICE=_ADJUST_SLICE,
        SAMPLING_STRUCT=parameters.struct,
    )
    sizes = (part_size, vocab_start, vocab_size, biases.shape[1], cache.block_tables.shape[1], cache.token_ids.shape[1])
    arrays = (logits, parameters.records, parameters.positions, biases, cache.block_tables, cache.token_ids)
    grid = (ceil_div(part_size, _ADJUST_SLICE), num_rows)
    kernel(grid, (_ADJUST_THREADS,), (*arrays, masks.offsets, masks.words, out, *map(np.int32, sizes)))


def num_splits(num_rows: int, part_size: int) -> int:
    """How many slices ``local_argmax`` cuts a row of ``part_size`` logits into, to fill a device with few rows.

    The same on every rank, also where their GPUs differ, so that their keys can be gathered.
    """
    wanted = ceil_div(_FEWEST_BLOCKS, num_rows)
    useful = ceil_div(part_size, 8 * _ARGMAX_THREADS)
    return max(1, min(wanted, useful))


def local_argmax(
    library: Library, logits: Array, parameters: RowParameters, keys: Array, *, vocab_start: int, vocab_size: int
) -> None:
    """The best token of each slice of this rank's logits, without filters, as keys for ``merge_argmax``.

    logits [S, V_local] are those of tokens from ``vocab_start`` on; tokens from ``vocab_size`` on are padding and never
    win. keys [num_splits, S] uint64 with ``num_splits(S, V_local)`` rows.
    """
    num_rows, part_size = logits.shape
    require("logits", logits, (num_rows, part_size), logits)
    require("keys", keys, (num_splits(num_rows, part_size), num_rows), "uint64")
    parameters.check(num_rows)
    kernel = library.function(
        "local_argmax",
        "local_argmax",
        SCALAR=scalar_name(logits),
        VEC=vector_width(logits, part_size),
        NUM_THREADS=_ARGMAX_THREADS,
        SAMPLING_STRUCT=parameters.struct,
    )
    sizes = (np.int32(part_size), np.int32(vocab_start), np.int32(vocab_size))
    rows = (parameters.records, parameters.positions)
    kernel((keys.shape[0], num_rows), (_ARGMAX_THREADS,), (logits, *rows, keys, *sizes))


def merge_argmax(library: Library, keys: Array, token_ids: Array) -> None:
    """The winners over slices and ranks. keys [R * num_splits, S] uint64; token_ids [S] int32.

    A row with a non-finite logit gets -1.
    """
    num_parts, num_rows = keys.shape
    require("keys", keys, (num_parts, num_rows), "uint64")
    require("token_ids", token_ids, (num_rows,), "int32")
    kernel = library.function("merge_argmax", "merge_argmax", SCALAR="float", NUM_THREADS=_MERGE_THREADS)
    grid = (ceil_div(num_rows * 32, _MERGE_THREADS),)
    kernel(grid, (_MERGE_THREADS,), (keys, token_ids, np.int32(num_parts), np.int32(num_rows)))


def sample_rows(
    library: Library, logits: Array, parameters: RowParameters, token_ids: Array, *, vocab_size: int
) -> None:
    """Sample with filters: temperature, then top-k, then top-p over what is left, then min-p.

    logits [R, S, V_local]; token = part * V_local + column, of which the first ``vocab_size`` exist. token_ids [S] int32;
    a row with a non-finite logit gets -1. Equal logits rank by the lower token.
    """
    num_parts, num_rows, part_size = _checked_parts(logits, vocab_size)
    require("token_ids", token_ids, (num_rows,), "int32")
    parameters.check(num_rows)
    kernel, grid = _row_kernel(library, "sample_rows", logits, parameters.struct)
    sizes = (np.int32(num_parts), np.int32(part_size), np.int32(vocab_size))
    kernel(grid, (_ROW_THREADS,), (logits, parameters.records, parameters.positions, token_ids, *sizes))


def log_probabilities(
    library: Library,
    logits: Array,
    token_ids: Array,
    logprobs: Array,
    top_ids: Array,
    top_logprobs: Array,
    *,
    vocab_size: int,
) -> None:
    """Log-probabilities of one given token a row and of the most probable ones, before temperature and filters.

    logits [R, S, V_local] as for ``sample_rows``; token_ids [S] int32 (negative: NaN); logprobs [S] float32; top_ids
    [S, k] int32 and top_logprobs [S, k] float32, best first, k from 0 to ``MAX_TOP``.
    """
    num_parts, num_rows, part_size = _checked_parts(logits, vocab_size)
    num_top = top_ids.shape[1]
    if num_top > min(MAX_TOP, vocab_size):
        raise ExecutorError(f"{num_top} alternatives a row are above {min(MAX_TOP, vocab_size)}; ask for fewer")
    require("token_ids", token_ids, (num_rows,), "int32")
    require("logprobs", logprobs, (num_rows,), "float32")
    require("top_ids", top_ids, (num_rows, num_top), "int32")
    require("top_logprobs", top_logprobs, (num_rows, num_top), "float32")
    kernel, grid = _row_kernel(library, "log_probabilities", logits)
    sizes = (np.int32(num_parts), np.int32(part_size), np.int32(vocab_size), np.int32(num_top))
    kernel(grid, (_ROW_THREADS,), (logits, token_ids, logprobs, top_ids, top_logprobs, *sizes))


def _checked_parts(logits: Array, vocab_size: int) -> tuple[int, int, int]:
    num_parts, num_rows, part_size = logits.shape
    require("logits", logits, (num_parts, num_rows, part_size), logits)
    if vocab_size > num_parts * part_size:
        raise ExecutorError(f"vocab_size={vocab_size} is above the {num_parts} x {part_size} columns of the logits")
    return num_parts, num_rows, part_size


def _row_kernel(library: Library, name: str, logits: Array, struct: str = "") -> tuple[KernelFunction, tuple[int]]:
    """The kernel and its grid: a cluster of blocks a row while there are fewer rows than the device has room for."""
    _, num_rows, part_size = logits.shape
    room = _ROWS_PER_MULTIPROCESSOR * library.num_multiprocessors
    fitting = [cluster for cluster in _CLUSTERS if library.has_clusters and num_rows * cluster <= room]
    cluster = fitting[0] if fitting else 1
    kernel = library.function(
        name,
        name,
        SCALAR=scalar_name(logits),
        VEC=vector_width(logits, part_size),
        NUM_THREADS=_ROW_THREADS,
        CLUSTER=cluster,
        SAMPLING_STRUCT=struct,
    )
    return kernel, (num_rows * cluster,)
