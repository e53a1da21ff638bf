# SPDX-License-Identifier: Apache-2.0
"""A text run through a decoder one layer at a time, so that memory holds one layer's weights and the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.checkpoint import Checkpoint
from phalanx.checkpoints.formats import components_of, format_weights
from phalanx.checkpoints.loader import load_weights
from phalanx.checkpoints.sinks import NumpySink
from phalanx.parallel.communicator import SelfCommunicator
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.numpy.attention import NumpyAttention
from phalanx.runtime.executors.numpy.ops import CAPABILITIES, NumpyOps, NumpyStep
from phalanx.runtime.executors.numpy.threads import Threads, thread_count
from phalanx.runtime.executors.weights import Weights
from phalanx.runtime.models import Model
from phalanx.runtime.models.base import vocabulary_shard
from phalanx.runtime.step import BatchState, StepPlan

__all__ = ["LayerRun", "LayerRuns", "Record"]

Float32Array = NDArray[np.float32]
Record = Callable[[str, Float32Array], None]
"""Told the name of a product's weight and its input ``[T, in]``, which it must not change."""


class RecordingOps(NumpyOps):
    """The NumPy engine's operations; inputs of products are shown to ``record`` first."""

    def __init__(self, record: Record, *parts: object) -> None:
        """``parts``: the arguments of `NumpyOps`."""
        super().__init__(*parts)  # type: ignore[arg-type]
        self._record = record

    def row_linear_partial(self, x: Float32Array, name: str) -> Float32Array:
        self._record(name, x)
        return super().row_linear_partial(x, name)


class RecordingAttention(NumpyAttention):
    """The NumPy engine's attention, which keeps the largest magnitudes of what it caches: ``amax`` ``[2]``, keys and values."""

    def __init__(self, *parts: object) -> None:
        """``parts``: the arguments of `NumpyAttention`."""
        super().__init__(*parts)  # type: ignore[arg-type]
        self.amax = np.zeros(2, np.float32)

    def cached(self, x: Float32Array, layer: int, side: int) -> Float32Array:
        self.amax[side] = max(self.amax[side], np.abs(x).max(initial=0))
        return super().cached(x, layer, side)


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What a text did in one layer.

    Attributes:
        weights: the layer's.
        cache_amax: ``[2]`` largest magnitudes of its rotated keys and of its values.
    """

    weights: Weights[Float32Array]
    cache_amax: Float32Array


class LayerRuns:
    """Hidden states of all windows of a text, which move on layer by layer.

    Args:
        windows: token ids of the pieces of the text, each a separate sequence.

    Raises:
        ConfigError: the NumPy engine lacks something that the model uses.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Model, config: ModelConfig, windows: Sequence[NDArray[np.int32]]
    ) -> None:
        CAPABILITIES.check(model, config, "float32")
        if any(model.decode.attention(config, layer).prefix_end for layer in range(config.num_layers)):
            raise ConfigError(
                "a text does not say where the prefix ends that this model's attention needs; use --method rtn and a scheme without static "
                "inputs, and leave --kv-cache out"
            )
        self._checkpoint, self._model, self._config = checkpoint, model, config
        self._windows = windows
        self._threads = Threads(thread_count())
        self._hidden: list[Float32Array | None] = [None for _ in windows]

    @property
    def num_tokens(self) -> int:
        """Of all windows."""
        return sum(map(len, self._windows))

    def stored(self, name: str) -> NDArray[Any]:
        """A tensor of the checkpoint, as it is stored."""
        source = self._checkpoint.source
        return source.read(name, source.info(name).whole)

    def run(self, layer: int, record: Record) -> LayerRun:
        """Run the next layer, whose number is ``layer``.

        Raises:
            CheckpointError: what comes out of it is not finite.
        """
        weights, spec = self._load(layer), self._model.decode.attention(self._config, layer)
        vocabulary = vocabulary_shard().span(self._config.vocab_size, 0, 1)
        longest = max(map(len, self._windows))
        attention = RecordingAttention({layer: spec}, 1, longest, 0, 1, longest, self._threads)
        ops = RecordingOps(record, weights, vocabulary, SelfCommunicator(), attention, self._threads)
        state, zero = BatchState.empty(1, 1), np.zeros(1, np.int32)
        for index, tokens in enumerate(self._windows):
            plan = StepPlan.pack(0, zero, zero, np.array([len(tokens)], np.int32), tokens, np.empty(0, np.int32))
            ops.bind(NumpyStep(plan.token_ids, plan.positions))
            attention.bind(plan, state)
            with np.errstate(invalid="ignore", over="ignore"):
                x, residual = self._model.decode.run(ops, self._config, range(layer, layer + 1), self._hidden[index])
                x = x if residual is None else ops.add(x, residual)
            if not np.isfinite(x).all():
                raise CheckpointError(
                    f"layer {layer} makes values of the calibration text that are not finite; copy the checkpoint again, or give another "
                    "--calibration text"
                )
            self._hidden[index] = x
        return LayerRun(weights, attention.amax)

    def _load(self, layer: int) -> Weights[Float32Array]:
        model, config, formats = self._model, self._config, self._checkpoint.formats
        specs = model.weights(config, range(layer, layer + 1), layer == 0, False)
        declared = format_weights(specs, formats)
        everything = components_of(format_weights(model.weights(config), formats))
        sink = NumpySink()
        ignored = (*model.ignored_tensors, r"lm_head\.weight", *formats.not_used)
        load_weights(self._checkpoint.source, components_of(declared), 0, 1, sink, ignored, everything)
        return Weights.of(declared, sink.weights)
