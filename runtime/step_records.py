# SPDX-License-Identifier: Apache-2.0
"""Step times that engines measured on this machine, kept for ``launch.plan --optimise``. Needs no NumPy."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.runtime.config import EngineConfig
from phalanx.runtime.whole_file import write_whole

__all__ = ["StepRecord", "record_path"]


def record_path(cache: Path, config: Mapping[str, Any], dtype: str, options: EngineConfig) -> Path:
    """Where the times of a model, its types and a layout are kept below the cache directory.

    ``config``: the whole of ``config.json``, as numbers of experts and the format of stored weights count, too.
    """
    values = [json.dumps(config, sort_keys=True), dtype, options.quantize, str(options.expert_parallel)]
    digest = hashlib.blake2b("|".join(values).encode(), digest_size=8).hexdigest()
    return cache / "steps" / f"{digest}-tp{options.layout.tp}-pp{options.layout.pp}.json"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Device seconds of the slowest stage in decoding steps of ``rows`` sequences, attention over older tokens not counted."""

    device: str
    rows: tuple[int, ...]
    stage_seconds: tuple[float, ...]

    def write(self, path: Path) -> None:
        """Keep it; a cache that cannot be written stays as it is."""
        text = json.dumps({"device": self.device, "rows": self.rows, "stage_seconds": self.stage_seconds})
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{text}\n".encode())

    @classmethod
    def read(cls, path: Path) -> StepRecord | None:
        """What was kept; None if nothing was, or it is damaged."""
        try:
            raw = json.loads(path.read_text())
            record = cls(str(raw["device"]), tuple(map(int, raw["rows"])), tuple(map(float, raw["stage_seconds"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if record.rows and len(record.rows) == len(record.stage_seconds) else None

    def seconds(self, num_seqs: int) -> float:
        """Linear between the measured numbers of sequences; in proportion beyond the largest."""
        return _interpolated(num_seqs, self.rows, self.stage_seconds)


def _interpolated(x: float, xs: Sequence[int], ys: Sequence[float]) -> float:
    if x <= xs[0]:
        return ys[0]
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=False), strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1] * x / xs[-1]
