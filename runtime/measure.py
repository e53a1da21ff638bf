# SPDX-License-Identifier: Apache-2.0
"""Measuring an engine from inside: when each request's tokens came, as arrays."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import ExecutorError
from phalanx.runtime.engine import Engine
from phalanx.runtime.request import Request

__all__ = ["Measurement", "measure"]

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Times in seconds since all requests were submitted.

    Attributes:
        seconds: until the last token.
        step_ends: ``[steps]`` end of each step.
        step_tokens: ``[steps]`` output tokens that it brought.
        first_token: ``[requests]`` arrival of the first output token.
        last_token: ``[requests]`` arrival of the last one.
        num_tokens: ``[requests]`` output tokens.
    """

    seconds: float
    step_ends: Float64Array
    step_tokens: Int64Array
    first_token: Float64Array
    last_token: Float64Array
    num_tokens: Int64Array

    @property
    def output_tokens(self) -> int:
        """Output tokens of all requests."""
        return int(self.num_tokens.sum())

    @property
    def steady_tokens_per_second(self) -> float:
        """Rate over the middle half of all output tokens, when neither the first prompts nor the last stragglers matter."""
        produced = np.cumsum(self.step_tokens)
        low, high = np.searchsorted(produced, (0.25 * produced[-1], 0.75 * produced[-1]))
        if high <= low:
            return self.output_tokens / self.seconds
        return float((produced[high] - produced[low]) / (self.step_ends[high] - self.step_ends[low]))

    @property
    def time_per_output_token(self) -> Float64Array:
        """Seconds between a request's tokens after the first; requests with one token are left out."""
        several = self.num_tokens > 1
        return (self.last_token - self.first_token)[several] / (self.num_tokens[several] - 1)


def measure(engine: Engine, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> Measurement:
    """Submit all requests at once and run them to the end; ``progress`` gets the output tokens of each step.

    Raises:
        ExecutorError: a request ended with an error: a measurement over the rest would be wrong.
    """
    origin = time.perf_counter()
    offset = [engine.submit(request) for request in requests][0]
    first, last = np.zeros(len(requests)), np.zeros(len(requests))
    counts, ends, tokens = np.zeros(len(requests), np.int64), [], []
    indices = {request.request_id: index for index, request in enumerate(requests)}
    while engine.has_work:
        batches = engine.step_batches()
        now = time.perf_counter() - origin
        before = counts.sum()
        for batch in batches:
            plain = batch.numbers - offset
            first[plain[counts[plain] == 0]] = now
            counts[plain] += 1
            last[plain] = now
            for delta in batch.deltas:
                if delta.error is not None:
                    raise ExecutorError(f"request {delta.request_id} failed: {delta.error}")
                index = indices[delta.request_id]
                if delta.token_ids:
                    first[index] = first[index] if counts[index] else now
                    counts[index] += len(delta.token_ids)
                    last[index] = now
        ends.append(now)
        tokens.append(int(counts.sum() - before))
        if progress is not None:
            progress(tokens[-1])
    return Measurement(float(last.max()), np.array(ends), np.array(tokens), first, last, counts)
