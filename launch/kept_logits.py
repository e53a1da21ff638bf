# SPDX-License-Identifier: Apache-2.0
"""Logits of a text's tokens, kept in a temporary file of each rank that computed some: its own places and tokens only."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import ConfigError

if TYPE_CHECKING:
    from phalanx.launch.scoring import Window

__all__ = ["KeptLogits", "keeping_logits"]


@contextmanager
def keeping_logits(windows: Sequence[Window], num_places: int) -> Iterator[KeptLogits]:
    """`KeptLogits` in a temporary file, which is there until the block ends."""
    with tempfile.TemporaryFile(prefix="phalanx-logits-") as file:
        yield KeptLogits(file, windows, num_places)


class KeptLogits:
    """What one rank saw of one model, a `LogitsReader`. Place t is that of token t + 1, which it predicts.

    Args:
        file: where they are kept.
        windows: of the text, in the order of their seeds.
        num_places: one less than tokens of the text.

    Attributes:
        held: ``[num_places]`` for which places there are logits here.
        first_token, num_tokens: of which tokens; 0, 0 if of none.
    """

    def __init__(self, file: IO[bytes], windows: Sequence[Window], num_places: int) -> None:
        self.held = np.zeros(num_places, np.bool_)
        self.first_token = self.num_tokens = 0
        self._starts = np.array([window.start for window in windows])
        self._first_scored = np.array([window.first_scored for window in windows])
        self._file = file

    def __call__(
        self, seeds: NDArray[np.uint64], positions: NDArray[np.int32], first_token: int, logits: NDArray[np.float32]
    ) -> None:
        """Keep what counts of some rows.

        Raises:
            ConfigError: there is no room for them.
        """
        self.first_token, self.num_tokens = first_token, logits.shape[1]
        windows = seeds.astype(np.intp)
        places = self._starts[windows] + positions
        counts = places + 1 >= self._first_scored[windows]
        try:
            for place, row in zip(places[counts].tolist(), logits[counts], strict=True):
                self._file.seek(place * row.nbytes)
                self._file.write(row.tobytes())
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"logits of {len(self.held):,} tokens, {len(self.held) * logits.shape[1] * 4:,} bytes a rank, cannot be kept in "
                f"{tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a larger place, or give a shorter text"
            ) from None
        self.held[places[counts]] = True

    def read(self, first_place: int, num_places: int, first_token: int, stop_token: int) -> NDArray[np.float32]:
        """``[num_places, tokens]``; zeros where nothing is `held`."""
        row = self.num_tokens
        rows = np.zeros((num_places, row), np.float32)
        self._file.seek(first_place * row * 4)
        data = np.frombuffer(self._file.read(rows.nbytes), np.float32)
        rows.reshape(-1)[: len(data)] = data
        return rows[:, first_token - self.first_token : stop_token - self.first_token]
