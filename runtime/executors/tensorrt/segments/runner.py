# SPDX-License-Identifier: Apache-2.0
"""Engines of segments on a GPU.

An engine has one context for each of its profiles, whatever layer calls it and with however many tokens: shapes and addresses
are set anew before an execution. A CUDA graph holds kernel launches with the addresses of its capture, so later calls with
others leave it as it was; the tests on a GPU replay graphs after runs of other shapes. But a new shape must not be set in a
capture (CUDA then invalidates it), only in the run before. So segments that a step calls with two numbers of rows, all and
those that need logits, are loaded twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.parallel.errors import ExecutorError
from phalanx.runtime.executors.cuda.memory import DeviceArray
from phalanx.runtime.executors.tensorrt.library8 import TensorRT8
from phalanx.runtime.executors.tensorrt.log import BuildLog
from phalanx.runtime.executors.tensorrt.segments.lowering import input_name, output_name
from phalanx.runtime.executors.tensorrt.segments.program import Segment, SegmentCall

__all__ = ["DeviceSegments"]


@dataclass(slots=True)
class _Context:
    """An execution context and the number of tokens that its shapes are set for."""

    library_object: Any
    num_tokens: int = 0


class DeviceSegments:
    """Runs segments as TensorRT engines on this rank's GPU.

    All contexts share one block of scratch memory, since segments run one after the other on one stream.

    Args:
        plans: each segment's.
        calls: all that there will be.
        sizes: of the engines' profiles.

    Raises:
        ExecutorError: TensorRT cannot load a plan or make a context.
    """

    def __init__(
        self, library: TensorRT8, plans: Mapping[Segment, bytes], calls: Iterable[SegmentCall], sizes: Sequence[int]
    ) -> None:
        import cupy

        self._library, self._sizes, self._log = library, sizes, BuildLog()
        logger = library.logger(self._log)
        self._log.keep_alive(logger)
        self._runtime = library.module.Runtime(logger)
        self._engines = {key: self._load(plans[key[0]]) for key in dict.fromkeys(map(_key, calls))}
        scratch_bytes = max(engine.device_memory_size for engine in self._engines.values())
        self._scratch = cupy.zeros(max(scratch_bytes, 1), np.uint8)
        self._stream = cupy.cuda.get_current_stream()
        self._contexts = {
            (key, profile): self._context(engine, profile)
            for key, engine in self._engines.items()
            for profile in range(len(sizes))
        }

    def run(
        self, call: SegmentCall, inputs: Sequence[DeviceArray], weights: Sequence[DeviceArray], outputs: Sequence[DeviceArray]
    ) -> None:  # fmt: skip
        num_tokens = len(outputs[0])
        held = self._contexts[_key(call), bisect_left(self._sizes, num_tokens)]
        context = held.library_object
        for index, array in enumerate(inputs):
            if held.num_tokens != num_tokens:
                self._require(context.set_input_shape(input_name(index), array.shape), f"shape {array.shape}")
            self._bind(context, input_name(index), array)
        held.num_tokens = num_tokens
        for (name, _), array in zip(call.segment.weights, weights, strict=True):
            self._bind(context, name, array)
        for index, array in enumerate(outputs):
            self._bind(context, output_name(index), array)
        self._require(context.execute_async_v3(self._stream.ptr), "to start a segment")

    def _load(self, plan: bytes) -> Any:
        engine = self._runtime.deserialize_cuda_engine(plan)
        self._require(engine is not None, "a plan; build it again with phalanx build")
        return engine

    def _context(self, engine: Any, profile: int) -> _Context:
        context = self._library.create_segment_context(engine, profile, self._scratch.data.ptr, self._stream.ptr)
        self._require(context is not None, "an execution context (it needs more device memory than is free)")
        return _Context(context)

    def _bind(self, context: Any, name: str, array: DeviceArray) -> None:
        self._require(context.set_tensor_address(name, array.data.ptr), f"the address of {name}")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise ExecutorError(f"TensorRT refused {what}: {self._log.cause() or 'it gave no reason'}")


def _key(call: SegmentCall) -> tuple[Segment, bool]:
    return call.segment, call.is_tail
