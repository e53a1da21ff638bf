"""What every mode of ``launch.bench`` reports in the same way."""

from __future__ import annotations

import platform
from collections.abc import Sequence

__all__ = ["Progress", "summary", "versions"]


def summary(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and 99th percentile in milliseconds; None of nothing."""
    import numpy as np

    if not len(seconds):
        return None
    mean, p50, p99 = np.mean(seconds), *np.percentile(seconds, (50, 99))
    return {"mean": 1e3 * float(mean), "p50": 1e3 * float(p50), "p99": 1e3 * float(p99)}


def versions() -> dict[str, str]:
    """Python and the packages that decide speed, as far as installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("phalanx-llm", "numpy", "mpi4py", "cupy-cuda13x", "cupy-cuda12x", "nvmath-python", "tensorrt"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Progress:
    """A bar of output tokens on standard error, when that is a terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("output tokens", total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, tokens: int) -> None:
        """Add output tokens."""
        self._bar.advance(self._task, tokens)
