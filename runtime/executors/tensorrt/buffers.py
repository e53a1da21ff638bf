# SPDX-License-Identifier: Apache-2.0
"""Device memory of one rank in addition to its engine: caches, inputs, outputs, scratch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from phalanx.kernels.arena import ALIGNMENT_BYTES, Arena
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.topology import Topology
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.cuda.memory import DeviceArray
from phalanx.runtime.executors.tensorrt.network import NetworkShape, cache_shapes
from phalanx.runtime.models import Model

__all__ = ["WORD_BYTES", "BufferSizes", "aligned", "allocate"]

WORD_BYTES = 4
"""Of an int32 or a float32."""


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """Bytes and extents of one rank's buffers."""

    model: Model
    config: ModelConfig
    topology: Topology
    shape: NetworkShape

    @property
    def max_tokens(self) -> int:
        """Of one pass."""
        return max(self.shape.max_num_seqs, self.shape.max_prefill_tokens)

    @property
    def token_bytes(self) -> int:
        """Of one token's hidden state."""
        return self.config.hidden_size * self.shape.numpy_dtype.itemsize

    @property
    def caches(self) -> dict[str, tuple[int, int, int]]:
        """This stage's caches and the extents of one slot of each."""
        return cache_shapes(self.model, self.config, self.topology, self.shape)

    def slot_bytes(self, extents: tuple[int, int, int]) -> int:
        """Of one slot of these extents."""
        return math.prod(extents) * self.shape.numpy_dtype.itemsize

    @property
    def input_words(self) -> dict[str, int]:
        """int32 words of each input that describes the step."""
        words = {"positions": self.max_tokens, "write_indices": self.shape.max_num_seqs}
        if self.topology.is_first_stage:
            words["token_ids"] = self.max_tokens
        if self.topology.is_last_stage:
            words["logit_rows"] = self.shape.max_logit_rows
        return words

    @property
    def output_words(self) -> dict[str, int]:
        """32-bit words of each output of the last stage."""
        rows = self.shape.max_logit_rows
        return {"logits": rows * self.config.vocab_size, "token_out": rows, "logit_sum": rows}

    def pieces(self, scratch_bytes: int) -> dict[str, int]:
        """Every buffer by name, in bytes."""
        num_slots = self.shape.max_num_seqs
        pieces = {name: num_slots * self.slot_bytes(extents) for name, extents in self.caches.items()}
        pieces["inputs"] = sum(aligned(words * WORD_BYTES) for words in self.input_words.values())
        if not self.topology.is_first_stage:
            pieces["hidden"] = self.max_tokens * self.token_bytes
        if self.topology.is_last_stage:
            for name, words in self.output_words.items():
                pieces[name] = words * WORD_BYTES
        else:
            pieces["hidden_out"] = self.max_tokens * self.token_bytes
        return pieces | {"scratch": max(scratch_bytes, 1)}


def aligned(num_bytes: int) -> int:
    """Rounded up to what device addresses are multiples of."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def allocate(pieces: Mapping[str, int], shape: NetworkShape) -> dict[str, DeviceArray]:
    """All buffers as flat bytes.

    Raises:
        ConfigError: the device has less; the message says what to build instead.
    """
    total = sum(aligned(num_bytes) for num_bytes in pieces.values())
    try:
        arena = Arena(total)
    except ConfigError as error:
        raise ConfigError(
            f"{shape.max_num_seqs} slots of {shape.slot_length} tokens and the buffers need {total / 1e9:.2f} GB in addition to the "
            f"engine ({error}); build with a smaller --max-num-seqs or --max-model-len, or use more GPUs"
        ) from error
    return {name: arena.array(name, (num_bytes,), np.uint8) for name, num_bytes in pieces.items()}
