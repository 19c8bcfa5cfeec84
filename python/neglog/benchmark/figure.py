"""The look that every figure shares."""

from __future__ import annotations

from typing import Any

from neglog.benchmark.terminal import need

INK, MUTED, RULE = "#1f2430", "#6b7280", "#e2e5ea"
TORCH, COMPILE, NEGLOG, COPY = "#e8794a", "#d9a441", "#2b6cb0", "#9aa3af"

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.dpi": 150,
}


def new_figure(purpose: str, size: tuple[float, float], title: str, subtitle: str) -> Any:
    """An empty figure with its two lines of title."""
    matplotlib = need("matplotlib", purpose)
    matplotlib.use("Agg")
    matplotlib.rcParams.update(_STYLE)
    figure = need("matplotlib.figure", purpose).Figure(figsize=size, dpi=150)
    inch = 1 / size[1]
    figure.text(0.04, 1 - 0.32 * inch, title, fontsize=15, weight="bold", va="center")
    figure.text(0.04, 1 - 0.62 * inch, subtitle, fontsize=9.5, color=MUTED, va="center")
    return figure


def bars(
    axes: Any, title: str, names: list[str], values: list[float], colors: list[str], unit: str
) -> None:
    """Horizontal bars, first on top, each with its number at the end."""
    axes.set_title(title)
    axes.barh(range(len(values)), values, color=colors, height=0.62)
    axes.set_yticks(range(len(names)), names, color=INK)
    label_bars(axes, values, unit)


def label_bars(axes: Any, values: list[float], unit: str) -> None:
    """The number at the end of each bar, and no axis: the numbers say it."""
    widest = max(values, default=0) or 1
    for index, value in enumerate(values):
        number = f"{value:,.0f}" if value >= 100 or value < 0.05 else f"{value:.1f}"
        axes.text(value + widest * 0.02, index, f"{number} {unit}", va="center", fontsize=9.5)
    axes.set_xlim(0, widest * 1.28)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
