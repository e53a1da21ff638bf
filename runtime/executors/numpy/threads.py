# SPDX-License-Identifier: Apache-2.0
"""A few threads that share large NumPy operations; NumPy gives the interpreter away inside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import threadpool_limits

__all__ = ["Threads", "thread_count"]


def thread_count() -> int:
    """Threads that this rank may use: the fewest that the usual variables name, else every core."""
    given = [os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
    return min((int(text) for text in given if text.isdigit() and int(text)), default=len(os.sched_getaffinity(0)))


class Threads:
    """Runs tasks on ``count`` threads, the caller's included.

    BLAS itself is held to one thread for the whole process: its threads would split each task again, and wait for each other.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1, "numpy") if count > 1 else None
        if count > 1:
            threadpool_limits(1, user_api="blas")

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run all tasks, the first ones first, and wait for them; raises what the first failing one raised."""
        waiting = list(reversed(tasks))

        def drain() -> None:
            while waiting:
                try:
                    task = waiting.pop()
                except IndexError:  # another thread took the last one
                    return
                task()

        helpers = min(self.count, len(tasks)) - 1
        running = [self._pool.submit(drain) for _ in range(helpers) if self._pool is not None]
        drain()
        for future in running:
            future.result()
