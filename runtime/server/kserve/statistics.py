# SPDX-License-Identifier: Apache-2.0
"""Counts of each model's requests, as Triton's statistics extension shows them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ModelStatistics"]


@dataclass(slots=True)
class Duration:
    """How often something happened and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Once more."""
        self.count += 1
        self.ns += ns

    def shown(self) -> dict[str, int]:
        """Numbers, not texts: clients add them up."""
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class ModelStatistics:
    """Counts of one model. Phases that a request has no own measurement of stay at zero."""

    name: str
    last_inference: int = 0
    num_rows: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)

    @contextmanager
    def measure(self, num_rows: int) -> Iterator[None]:
        """Count a request as a success, or as a failure if the body raises."""
        started = time.monotonic_ns()
        try:
            yield
        except BaseException:
            self.fail.add(time.monotonic_ns() - started)
            raise
        self.count_success(num_rows, time.monotonic_ns() - started)

    def count_success(self, num_rows: int, ns: int) -> None:
        """Count a request of ``num_rows`` rows that was answered."""
        self.success.add(ns)
        self.num_rows += num_rows
        self.last_inference = time.time_ns() // 1_000_000

    def shown(self) -> dict[str, Any]:
        """One entry of ``model_stats``."""
        unmeasured = Duration().shown()
        phases = ("queue", "compute_input", "compute_output", "cache_hit", "cache_miss")
        return {
            "name": self.name,
            "version": "1",
            "last_inference": self.last_inference,
            "inference_count": self.num_rows,
            "execution_count": self.success.count,
            "inference_stats": {
                "success": self.success.shown(),
                "fail": self.fail.shown(),
                "compute_infer": self.success.shown(),
                **dict.fromkeys(phases, unmeasured),
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }
