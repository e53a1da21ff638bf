# SPDX-License-Identifier: Apache-2.0
"""Recording what is enqueued on a stream as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["capture"]

Result = TypeVar("Result")


def capture(stream: Any, program: Callable[[], Result]) -> tuple[Any, Result]:
    """Record what ``program`` enqueues on the stream; returns the graph and what ``program`` returned.

    Python does not collect reference cycles meanwhile: an engine that was closed may be part of one, and to unload its modules, which
    CUDA forbids to a thread that captures, would spoil the graph. One thread of a process captures at a time: with two, the first to end
    would let Python collect in the other's capture.
    """
    from cupy.cuda import runtime

    collects = gc.isenabled()
    gc.disable()
    try:
        stream.begin_capture(runtime.streamCaptureModeThreadLocal)
        try:
            result = program()
        finally:
            graph = stream.end_capture()
    finally:
        if collects:
            gc.enable()
    return graph, result
