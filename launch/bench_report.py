# SPDX-License-Identifier: Apache-2.0
"""What every mode of ``launch.bench`` reports in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["summary", "table"]


def summary(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and 99th percentile in milliseconds; None of nothing."""
    import numpy as np

    if not len(seconds):
        return None
    mean, p50, p99 = np.mean(seconds), *np.percentile(seconds, (50, 99))
    return {"mean": 1e3 * float(mean), "p50": 1e3 * float(p50), "p99": 1e3 * float(p99)}


_HIDDEN = ("command", "versions", "errors")


def table(report: Mapping[str, Any]) -> str:
    """The report for people: a line for each figure; what only a machine needs is left out."""
    width = max(map(len, report))
    rows = {name: value for name, value in report.items() if name not in _HIDDEN and value is not None}
    return "".join(f"{name.replace('_', ' '):<{width}}  {_shown(value)}\n" for name, value in rows.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
