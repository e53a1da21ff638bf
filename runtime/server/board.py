# SPDX-License-Identifier: Apache-2.0
"""What the HTTP processes of one server count together: a page of memory that all of them map."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from phalanx.parallel.errors import CapacityError

__all__ = ["Board", "Cells", "Room", "create_board"]

COLUMNS = 2048
ROW_BYTES = COLUMNS * 8


def create_board(num_processes: int) -> int:
    """Descriptor of an empty board, to be inherited by the HTTP processes. The memory goes when the last of them has ended."""
    descriptor = os.memfd_create("phalanx-http")
    os.ftruncate(descriptor, num_processes * ROW_BYTES)
    return descriptor


class Board:
    """Numbers that every HTTP process reads; each writes in its own row only, so counting needs no lock.

    All processes take the same columns in the same order, since they run the same code.

    Args:
        descriptor: what `create_board` returned.
        row: number of this process.
    """

    def __init__(self, descriptor: int, row: int = 0) -> None:
        self._descriptor = descriptor
        self._memory = memoryview(mmap.mmap(descriptor, 0)).cast("B").cast("d")
        self._row = row
        self._next_column = 0
        self.num_rows = len(self._memory) // COLUMNS

    @classmethod
    def of_one(cls) -> Board:
        """Return the board of a single process, which no other process sees."""
        return cls(create_board(1))

    def take(self, count: int) -> Cells:
        """The next ``count`` columns."""
        first, self._next_column = self._next_column, self._next_column + count
        assert self._next_column <= COLUMNS, "the board has no more columns"
        rows = [self._memory[row * COLUMNS + first : row * COLUMNS + first + count] for row in range(self.num_rows)]
        return Cells(rows, self._row)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep the other processes out of their `lock`. A process that ends leaves it."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


class Cells:
    """Some columns of the board.

    Attributes:
        rows: ``[processes][columns]``, float64.
        own: the row of this process, the only one that it writes.
    """

    __slots__ = ("own", "rows")

    def __init__(self, rows: list[memoryview[float]], row: int) -> None:
        self.rows = rows
        self.own = rows[row]

    def sums(self) -> list[float]:
        """The sum over all processes, for each column."""
        return [sum(column) for column in zip(*self.rows, strict=True)]


class Room:
    """How many requests are open in all processes together, against one limit."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._cells = board.take(1)

    @property
    def num_own(self) -> int:
        """Requests that are open in this process."""
        return int(self._cells.own[0])

    def num_open(self) -> list[int]:
        """Requests that are open in each process."""
        return [int(row[0]) for row in self._cells.rows]

    def enter(self, count: int, limit: int) -> None:
        """Open ``count`` requests.

        Raises:
            CapacityError: more than ``limit`` would then be open.
        """
        with self._board.lock():
            num_open = sum(self.num_open())
            if num_open + count > limit:
                raise CapacityError(f"{num_open} requests are open, at most {limit} may be; try again later")
            self._cells.own[0] += count

    def leave(self, count: int) -> None:
        """Close ``count`` requests."""
        self._cells.own[0] -= count
