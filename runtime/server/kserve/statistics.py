# SPDX-License-Identifier: Apache-2.0
"""Counts of each model's requests, as Triton's statistics extension shows them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from phalanx.runtime.server.board import Board

__all__ = ["ModelStatistics"]

LAST, ROWS, NUM_SUCCESSES, SUCCESS_NS, NUM_FAILURES, FAILURE_NS = range(6)


class ModelStatistics:
    """Counts of one model in all HTTP processes. Phases that a request has no own measurement of stay at zero.

    Args:
        board: where the processes count.
    """

    def __init__(self, name: str, board: Board) -> None:
        self._name = name
        self._cells = board.take(6)
        self._own = self._cells.own

    @contextmanager
    def measure(self, num_rows: int) -> Iterator[None]:
        """Count a request as a success, or as a failure if the body raises."""
        started = time.monotonic_ns()
        try:
            yield
        except BaseException:
            self.count_failure(time.monotonic_ns() - started)
            raise
        self.count_success(num_rows, time.monotonic_ns() - started)

    def count_success(self, num_rows: int, ns: int) -> None:
        """Count a request of ``num_rows`` rows that was answered."""
        self._own[NUM_SUCCESSES] += 1
        self._own[SUCCESS_NS] += ns
        self._own[ROWS] += num_rows
        self._own[LAST] = time.time_ns() // 1_000_000

    def count_failure(self, ns: int) -> None:
        """Count a request that was not answered."""
        self._own[NUM_FAILURES] += 1
        self._own[FAILURE_NS] += ns

    def shown(self) -> dict[str, Any]:
        """One entry of ``model_stats``; numbers, not texts, because clients add them up."""
        sums = [int(total) for total in self._cells.sums()]
        success = {"count": sums[NUM_SUCCESSES], "ns": sums[SUCCESS_NS]}
        phases = ("queue", "compute_input", "compute_output", "cache_hit", "cache_miss")
        return {
            "name": self._name,
            "version": "1",
            "last_inference": int(max(row[LAST] for row in self._cells.rows)),
            "inference_count": sums[ROWS],
            "execution_count": sums[NUM_SUCCESSES],
            "inference_stats": {
                "success": success,
                "fail": {"count": sums[NUM_FAILURES], "ns": sums[FAILURE_NS]},
                "compute_infer": success,
                **{phase: {"count": 0, "ns": 0} for phase in phases},
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }
