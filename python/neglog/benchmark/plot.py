"""What was measured, as a figure."""

from __future__ import annotations

from statistics import median
from typing import Any

from neglog.benchmark.figure import (
    COMPILE,
    COPY,
    INK,
    MUTED,
    NEGLOG,
    TORCH,
    bars,
    label_bars,
    new_figure,
)
from neglog.benchmark.measure import Measurement, SmallResult
from neglog.benchmark.report import shape_text

PURPOSE = "bench --plot"
LABELS = {"eager": "torch eager", "neglog": "neglog"}
COLORS = {"eager": TORCH, "compile": COMPILE}


def large_figure(op: str, measurements: list[Measurement], subtitle: str) -> Any:
    """A line of two panels for each shape: time, split in forward and backward, and memory."""
    lines = len(measurements)
    height = 1.1 + 3.0 * lines
    figure = new_figure(PURPOSE, (11, height), f"{op}: forward and backward", subtitle)
    grid = figure.add_gridspec(
        lines, 2, left=0.15, right=0.97, top=1 - 1.35 / height, bottom=0.45 / height,
        width_ratios=(1.5, 1), wspace=0.42, hspace=0.5,
    )  # fmt: skip
    for line, measured in enumerate(measurements):
        _times(figure.add_subplot(grid[line, 0]), measured)
        _memory(figure.add_subplot(grid[line, 1]), measured)
    return figure


def _times(axes: Any, measured: Measurement) -> None:
    names = [r.contender.label.strip() for r in measured.results]
    colors = [COLORS.get(r.contender.name, NEGLOG) for r in measured.results]
    forward = [median(r.forward) * 1e3 for r in measured.results]
    total = [median(r.total) * 1e3 for r in measured.results]
    places = range(len(names))
    axes.set_title(f"{shape_text(measured.spec.shape)}, {measured.spec.dtype}")
    axes.barh(places, total, color=colors, alpha=0.55, height=0.62)
    axes.barh(places, forward, color=colors, height=0.62)
    axes.set_yticks(places, names, color=INK)
    label_bars(axes, total, "ms")
    stick = median(measured.yardstick) * 1e3
    axes.axvline(stick, color=COPY, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(
        stick, len(names) - 0.42, f" {measured.spec.yardstick}, {stick:.1f} ms",
        color=MUTED, fontsize=8.5, va="top",
    )  # fmt: skip
    axes.text(
        1, 0, "dark: forward, light: backward", transform=axes.transAxes, ha="right", va="top",
        fontsize=8.5, color=MUTED,
    )  # fmt: skip


def _memory(axes: Any, measured: Measurement) -> None:
    known = [r for r in measured.results if r.extra is not None]
    bars(
        axes,
        "Peak extra memory",
        [r.contender.label.strip() for r in known],
        [(r.extra or 0) / 1e6 for r in known],
        [COLORS.get(r.contender.name, NEGLOG) for r in known],
        "MB",
    )


def small_figure(op: str, results: list[SmallResult], subtitle: str) -> Any:
    """Microseconds of each shape, torch above neglog."""
    names = [shape_text(result.shape) for result in results]
    height = 1.4 + 0.75 * len(names)
    figure = new_figure(PURPOSE, (9, height), f"{op}, small shapes", subtitle)
    axes = figure.add_axes((0.24, 0.35 / height, 0.73, 1 - 1.35 / height))
    for offset, name, color in ((-0.19, "eager", TORCH), (0.19, "neglog", NEGLOG)):
        values = [median(result.seconds[name]) * 1e6 for result in results]
        places = [index + offset for index in range(len(names))]
        axes.barh(places, values, color=color, height=0.34, label=LABELS[name])
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f"  {value:,.1f} us", va="center", fontsize=9, color=color)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 3)
    axes.legend(loc="upper right", labelcolor=INK)
    axes.set_xticks([], minor=True)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
    return figure
