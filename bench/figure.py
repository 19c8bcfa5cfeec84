"""The look that every picture shares."""

from __future__ import annotations

from typing import Any

INK, MUTED, RULE = "#1f2430", "#6b7280", "#e2e5ea"
TORCH, COMPILE, NEGLOG, OTHER, COPY = "#e8794a", "#d9a441", "#2b6cb0", "#8b6bb0", "#9aa3af"
# By whose code it is.
COLORS = {"torch": TORCH, "torch.compile": COMPILE, "neglog": NEGLOG}

STYLE: dict[Any, Any] = {
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


def new_figure(size: tuple[float, float], heading: str, subtitle: str) -> Any:
    """An empty figure with its two lines of title. What is added is laid out to fit below them,
    however long its labels are."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    width, height = size
    left = 0.3 / width
    figure.text(left, 1 - 0.32 / height, heading, fontsize=15, weight="bold", va="center")
    figure.text(left, 1 - 0.62 / height, subtitle, fontsize=9.5, color=MUTED, va="center")
    engine: Any = figure.get_layout_engine()
    below = (left, 0.15 / height, 1 - 2 * left, 1 - 0.95 / height)
    engine.set(rect=below, wspace=0.06, hspace=0.06)
    return figure


def bars(
    axes: Any, names: list[str] | None, values: list[float], colors: list[str], alpha: float = 1.0
) -> None:
    """Horizontal bars, the first on top. names: None where the panel beside it has them."""
    axes.barh(range(len(values)), values, color=colors, height=0.62, alpha=alpha)
    if names is None:
        axes.tick_params(labelleft=False)
    else:
        axes.set_yticks(range(len(names)), names, color=INK)


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
