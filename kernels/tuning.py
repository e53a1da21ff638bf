# SPDX-License-Identifier: Apache-2.0
"""Which kernel is fastest for a matrix product: measured once per device and cuBLASLt version, kept on disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from phalanx.kernels.cublaslt import Algorithm, GemmProblem
from phalanx.kernels.gemm8_tiles import TileShape
from phalanx.kernels.gemv import GemvShape

__all__ = ["GemmChoice", "GemmTimings", "Kernel", "timings_path"]

Kernel: TypeAlias = Algorithm | GemvShape | TileShape
"""One of cuBLASLt's algorithms, or how one of our own kernels cuts the work."""

_OWN_KERNELS: Mapping[str, type[GemvShape] | type[TileShape]] = {"gemv": GemvShape, "tiles": TileShape}


@dataclass(frozen=True, slots=True)
class GemmChoice:
    """A kernel for one problem.

    Attributes:
        kernel: what computes it.
        microseconds: measured time of one call; 0 = not measured.
        first_microseconds: of cuBLASLt's first suggestion, measured in the same run.
    """

    kernel: Kernel
    microseconds: float = 0.0
    first_microseconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``from_json`` reverses it."""
        own = (kind for kind, shape in _OWN_KERNELS.items() if isinstance(self.kernel, shape))
        return {
            "kind": next(own, "cublaslt"),
            **asdict(self.kernel),
            "microseconds": round(self.microseconds, 3),
            "first_microseconds": round(self.first_microseconds, 3),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> GemmChoice:
        """Raises KeyError, TypeError or ValueError for anything that ``to_json`` did not write."""
        kernel: Kernel
        if (shape := _OWN_KERNELS.get(entry["kind"])) is not None:
            kernel = shape(*(int(entry[field.name]) for field in fields(shape)))
        else:
            kernel = Algorithm(tuple(int(word) for word in entry["words"]), int(entry["workspace_bytes"]))
        return cls(kernel, float(entry["microseconds"]), float(entry["first_microseconds"]))


_GENERATION = 3
"""Of the kernels among which the tuner chooses: what was chosen among older ones was not compared with these."""


def timings_path(cache: Path, device_name: str, cublaslt_version: int) -> Path:
    """Where the timings of one kind of device, one cuBLASLt and one generation of our kernels live."""
    device = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return cache / "gemm" / f"{device}-cublaslt{cublaslt_version}-kernels{_GENERATION}.json"


class GemmTimings:
    """The choices measured so far. Reading a file that is missing or damaged gives an empty table."""

    def __init__(self, path: Path | None) -> None:
        """``path``: the file, or None to keep nothing."""
        self.path = path
        self._choices = _read(path) if path is not None else {}

    def __len__(self) -> int:
        return len(self._choices)

    def find(self, problem: GemmProblem) -> GemmChoice | None:
        """The measured choice, or None."""
        return self._choices.get(problem.key)

    def find_above(self, problem: GemmProblem, most_tokens: int) -> GemmChoice | None:
        """The choice for the fewest tokens that are more than the problem's, up to ``most_tokens``, all else equal."""
        above = [count for count in self.sizes(problem) if problem.num_tokens < count <= most_tokens]
        return self.find(replace(problem, num_tokens=above[0])) if above else None

    def sizes(self, problem: GemmProblem) -> list[int]:
        """Numbers of tokens, the problem's or more, for which it was measured, all else equal; ascending."""
        tokens, rest = problem.key.split("x", 1)
        others = (key.split("x", 1) for key in self._choices)
        return sorted(int(count) for count, tail in others if tail == rest and int(count) >= int(tokens))

    def items(self) -> list[tuple[str, GemmChoice]]:
        """Every problem's key with its choice, in the order of keys."""
        return sorted(self._choices.items())

    def add(self, choices: Mapping[GemmProblem, GemmChoice]) -> None:
        """Take over ``choices`` and write them to the file, together with what other ranks wrote meanwhile."""
        new = {problem.key: choice for problem, choice in choices.items()}
        if self.path is None:
            self._choices |= new
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._choices = _read(self.path) | self._choices | new
            _write(self.path, self._choices)


def _read(path: Path) -> dict[str, GemmChoice]:
    """The entries that make sense; what another version wrote is measured again."""
    try:
        entries = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    choices = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            choices[key] = GemmChoice.from_json(entry)
    return choices


def _write(path: Path, choices: Mapping[str, GemmChoice]) -> None:
    text = json.dumps({key: choice.to_json() for key, choice in sorted(choices.items())}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
