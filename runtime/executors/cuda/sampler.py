# SPDX-License-Identifier: Apache-2.0
"""From this rank's logits to tokens and log-probabilities, equal on all tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.kernels import sampling
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.sampling import PlanMasks, RowParameters, TokenCache
from phalanx.kernels.step_update import StepArrays
from phalanx.parallel.nccl_comm import DeviceCommunicator
from phalanx.parallel.sharding import Span
from phalanx.runtime.executors.cuda.activations import ActivationPool
from phalanx.runtime.executors.cuda.memory import DeviceArray
from phalanx.runtime.memory import ADJUSTED_ROWS, LOGIT_ROWS
from phalanx.runtime.sampling.fields import SAMPLING_STRUCT

__all__ = ["CudaSampler"]


class CudaSampler:
    """Chooses and scores tokens of rows of logits ``[B, V local]``.

    Without filters the ranks exchange eight bytes a row and slice; filters and log-probabilities need whole rows, which
    are gathered a few at a time.

    Args:
        vocabulary: rows of the vocabulary that this rank holds.
        vocab_size: V; columns after it are padding.
        group: the tensor-parallel group.
    """

    def __init__(
        self, library: KernelLibrary, vocabulary: Span, vocab_size: int, group: DeviceCommunicator, arrays: StepArrays,
        pool: ActivationPool,
    ) -> None:  # fmt: skip
        self._library, self.vocabulary, self._vocab_size = library, vocabulary, vocab_size
        self._group, self._arrays, self._pool = group, arrays, pool

    def choose(self, logits: DeviceArray, rows: range, filters: bool, adjusts: bool, token_ids: DeviceArray) -> None:
        """Sample a token for each of the step's logit ``rows`` into ``token_ids`` [B] int32.

        A row with a logit that is not finite gets -1. ``filters``: some row has top-k, top-p or min-p; ``adjusts``: some row
        has token biases, penalties or a mask. ``logits`` stay as they are.
        *Collective.* Enqueues on the current stream; does not wait.
        """
        if not adjusts:
            self._choose(logits, rows, filters, token_ids)
            return
        for start in range(0, len(rows), ADJUSTED_ROWS):
            some = slice(start, min(start + ADJUSTED_ROWS, len(rows)))
            self._choose(self._adjusted(logits[some], rows[some]), rows[some], filters, token_ids[some])

    def _adjusted(self, logits: DeviceArray, rows: range) -> DeviceArray:
        adjusted, arrays = self._pool.array(logits.shape, "float32"), self._arrays
        sampling.adjust_logits(
            self._library, logits, self._parameters(rows), arrays.biases,
            TokenCache(arrays.block_tables, arrays.cached_tokens), self._masks(rows), adjusted,
            vocab_start=self.vocabulary.start, vocab_size=self._vocab_size,
        )  # fmt: skip
        return adjusted

    def _masks(self, rows: range) -> PlanMasks:
        return PlanMasks(self._arrays.row_masks[rows.start : rows.stop], self._arrays.plan)

    def _choose(self, logits: DeviceArray, rows: range, filters: bool, token_ids: DeviceArray) -> None:
        if not filters:
            self._choose_best(logits, self._parameters(rows), token_ids)
            return
        for part, whole in self._whole_rows(logits):
            parameters = self._parameters(rows[part.start : part.stop])
            sampling.sample_rows(
                self._library, whole, parameters, token_ids[part.start : part.stop], vocab_size=self._vocab_size
            )

    def score(
        self, logits: DeviceArray, token_ids: DeviceArray, logprobs: DeviceArray, top_ids: DeviceArray,
        top_logprobs: DeviceArray,
    ) -> None:  # fmt: skip
        """Log-probabilities of ``token_ids`` [B] and of the best ``k`` alternatives.

        *Collective.* Enqueues; does not wait.
        """
        for part, whole in self._whole_rows(logits):
            some = slice(part.start, part.stop)
            sampling.log_probabilities(
                self._library, whole, token_ids[some], logprobs[some], top_ids[some], top_logprobs[some],
                vocab_size=self._vocab_size,
            )  # fmt: skip

    def _choose_best(self, logits: DeviceArray, parameters: RowParameters, token_ids: DeviceArray) -> None:
        num_rows, part_size = logits.shape
        splits = sampling.num_splits(num_rows, part_size)
        keys = self._pool.array((splits, num_rows), "uint64")
        sampling.local_argmax(
            self._library, logits, parameters, keys, vocab_start=self.vocabulary.start, vocab_size=self._vocab_size
        )
        if self._group.size > 1:
            keys = self._group.all_gather(keys, self._pool.array((self._group.size, splits, num_rows), "uint64"))
        sampling.merge_argmax(self._library, keys.reshape(-1, num_rows), token_ids)

    def _whole_rows(self, logits: DeviceArray) -> Iterator[tuple[range, DeviceArray]]:
        """All columns of some rows at a time: ``[R, rows, V local]``."""
        if self._group.size == 1:
            yield range(len(logits)), logits[None]
            return
        for start in range(0, len(logits), LOGIT_ROWS):
            part = range(start, min(start + LOGIT_ROWS, len(logits)))
            some = logits[part.start : part.stop]
            yield part, self._group.all_gather(some, self._pool.array((self._group.size, *some.shape), some.dtype))

    def _parameters(self, rows: range) -> RowParameters:
        arrays, some = self._arrays, slice(rows.start, rows.stop)
        return RowParameters(arrays.row_sampling[some], arrays.row_positions[some], SAMPLING_STRUCT)
