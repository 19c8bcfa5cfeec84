"""What was measured, as a picture."""

from __future__ import annotations

from typing import Any

from .figure import COLORS, COPY, INK, MUTED, OTHER, bars, label_bars, new_figure
from .report import JSON, label, shape_text, title


def large_figure(results: list[JSON], subtitle: str) -> Any:
    """For each shape a line of two panels: time, split in forward and backward, and memory."""
    height = 0.9 + sum(_line_height(result) for result in results)
    figure = new_figure((11, height), f"{results[0]['op']}: forward and backward", subtitle)
    grid = figure.add_gridspec(
        len(results), 2, width_ratios=(1.5, 1), height_ratios=[_line_height(r) for r in results]
    )
    for line, result in enumerate(results):
        times = figure.add_subplot(grid[line, 0])
        _times(times, result)
        _memory(figure.add_subplot(grid[line, 1], sharey=times), result)
    return figure


def _line_height(result: JSON) -> float:
    return 1.2 + 0.36 * len(result["contenders"])


def _colors(contenders: list[JSON]) -> list[str]:
    return [COLORS.get(contender["library"], OTHER) for contender in contenders]


def _times(axes: Any, result: JSON) -> None:
    contenders = result["contenders"]
    names, colors = [label(c).strip() for c in contenders], _colors(contenders)
    total = [c["total_ms"] for c in contenders]
    axes.set_title(title(result).partition(", ")[2])
    bars(axes, names, total, colors, alpha=0.55)
    # Another call, which in a noisy run can take longer than both.
    forward = [min(c["forward_ms"], c["total_ms"]) for c in contenders]
    bars(axes, names, forward, colors)
    label_bars(axes, total, "ms")
    stick = result["yardstick"]["ms"]
    axes.axvline(stick, color=COPY, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlabel(
        f"dark: forward, light: backward; dashed: {result['yardstick']['label']}, {stick:.1f} ms",
        loc="left", fontsize=8.5, color=MUTED,
    )  # fmt: skip


def _memory(axes: Any, result: JSON) -> None:
    contenders = result["contenders"]
    extra = [c["peak_extra_bytes"] for c in contenders]
    if None in extra:
        axes.set_axis_off()
        return
    values = [count / 1e6 for count in extra]
    axes.set_title("Peak extra memory")
    bars(axes, None, values, _colors(contenders))
    label_bars(axes, values, "MB")


def brief_figure(results: list[JSON], subtitle: str) -> Any:
    """Microseconds of each shape, one bar a contender."""
    names = [shape_text(result["shape"]) for result in results]
    many = len(results[0]["contenders"])
    height = 1.6 + (0.2 + 0.28 * many) * len(names)
    figure = new_figure((9, height), f"{results[0]['op']}: forward and backward", subtitle)
    axes = figure.add_subplot()
    thick = 0.8 / many
    for number, contender in enumerate(results[0]["contenders"]):
        values = [result["contenders"][number]["total_ms"] * 1e3 for result in results]
        places = [line + (number - (many - 1) / 2) * thick for line in range(len(names))]
        (color,) = _colors([contender])
        label = contender["label"].strip()
        axes.barh(places, values, height=0.9 * thick, color=color, label=label)
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f"  {value:,.1f} us", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 3)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=many, labelcolor=INK)
    axes.set_xticks([], minor=True)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
    return figure
