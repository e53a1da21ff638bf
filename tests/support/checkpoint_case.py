"""One small checkpoint of the tests, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CheckpointCase"]


@dataclass(frozen=True, slots=True)
class CheckpointCase:
    """A named configuration; ``config`` is what goes into ``config.json``, ``max_model_len`` what the engine is asked for,
    ``model_file`` what defines the family if it is not built in, ``prefix_end`` what ends the prefix of its prompts."""

    name: str
    config: dict[str, Any]
    dtype: str = "float32"
    layouts: tuple[tuple[int, int], ...] = field(default=tuple((tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3)))
    max_model_len: int | None = None
    model_file: Path | None = None
    prefix_end: tuple[int, ...] = ()
