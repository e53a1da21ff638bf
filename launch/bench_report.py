"""What every mode of ``launch.bench`` reports in the same way."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["summary"]


def summary(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and 99th percentile in milliseconds; None of nothing."""
    import numpy as np

    if not len(seconds):
        return None
    mean, p50, p99 = np.mean(seconds), *np.percentile(seconds, (50, 99))
    return {"mean": 1e3 * float(mean), "p50": 1e3 * float(p50), "p99": 1e3 * float(p99)}
