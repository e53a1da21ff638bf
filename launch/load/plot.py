# SPDX-License-Identifier: Apache-2.0
"""A plot of ``launch.bench serve``: tokens a second over time, and how first tokens and gaps are distributed. SVG needs no library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.launch.load.messages import Answer
from phalanx.parallel.errors import ConfigError

__all__ = ["check_plot", "write_plot"]

WIDTH, HEIGHT, MARGIN = 420, 260, 56
NUM_BINS = 100


@dataclass(frozen=True, slots=True)
class Panel:
    """One curve with its axes, both from 0."""

    title: str
    x_label: str
    y_label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def check_plot(path: Path) -> None:
    """Raise ConfigError unless a plot can be written in the format of the file's name."""
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"--plot {path} ends in neither .svg nor .png; use one of them")
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise ConfigError(f"--plot {path} needs matplotlib; pip install matplotlib, or use a name that ends in .svg")


def write_plot(path: Path, answers: Sequence[Answer], start: float, title: str) -> None:
    """Write the plot of a load that began at ``start``."""
    panels = _panels(answers, start)
    if path.suffix == ".svg":
        path.write_text(_svg(panels, title))
    else:
        _png(path, panels, title)


def _panels(answers: Sequence[Answer], start: float) -> list[Panel]:
    arrivals = np.array([time - start for answer in answers for time in answer.arrivals])
    counts, edges = np.histogram(arrivals, NUM_BINS, (0.0, float(arrivals.max(initial=1e-3))))
    first = [answer.time_to_first_token for answer in answers if answer.arrivals]
    gaps = np.concatenate([np.empty(0), *(np.diff(answer.arrivals) for answer in answers)])
    return [
        Panel("events", "seconds", "a second", (edges[:-1] + edges[1:]) / 2, counts / np.diff(edges)),
        _distribution("time to first token", first),
        _distribution("gap between events of a stream", gaps),
    ]


def _distribution(title: str, seconds: Sequence[float] | NDArray[np.float64]) -> Panel:
    """Percent of the values that are not above x, at 201 points."""
    percent = np.linspace(0, 100, 201)
    values = np.percentile(seconds, percent) if len(seconds) else np.zeros_like(percent)
    return Panel(title, "ms", "% at most", 1e3 * values, percent)


def _svg(panels: Sequence[Panel], title: str) -> str:
    width = WIDTH * len(panels)
    body = "".join(
        f'<g transform="translate({WIDTH * index},20)">{_svg_panel(panel)}</g>' for index, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 20}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{width / 2}" y="16" text-anchor="middle" font-size="13">{_escaped(title)}</text>{body}</svg>\n'
    )


def _svg_panel(panel: Panel) -> str:
    left, right, top, bottom = MARGIN, WIDTH - 16, 24, HEIGHT - 40
    x_ticks, y_ticks = _ticks(float(panel.x.max(initial=0))), _ticks(float(panel.y.max(initial=0)))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / x_ticks[-1], bottom - (bottom - top) * y / y_ticks[-1]

    points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in zip(panel.x, panel.y, strict=True))
    parts = [
        f'<text x="{(left + right) / 2}" y="16" text-anchor="middle">{panel.title}</text>',
        f'<text x="{(left + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{panel.x_label}</text>',
        f'<text transform="translate(12,{(top + bottom) / 2}) rotate(-90)" text-anchor="middle">{panel.y_label}</text>',
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>',
    ]
    for tick in x_ticks:
        parts.append(f'<text x="{at(tick, 0)[0]:.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        y = at(0, tick)[1]
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    return "".join(parts) + f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="1.5"/>'


def _ticks(largest: float) -> list[float]:
    """Four to ten round numbers from 0 up to ``largest`` or a little more."""
    largest = max(largest, 1e-9)
    power = 10.0 ** np.floor(np.log10(largest))
    step = next(size * power for size in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if largest / (size * power) <= 8)
    return [float(step * index) for index in range(int(np.ceil(largest / step)) + 1)]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _png(path: Path, panels: Sequence[Panel], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.2), layout="constrained")
    axes: Any
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.plot(panel.x, panel.y)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label, xlim=(0, None), ylim=(0, None))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
