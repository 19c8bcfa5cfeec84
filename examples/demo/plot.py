"""The demo as a picture: the curves, their difference, the time in the loss, the memory."""

from __future__ import annotations

from typing import Any

from neglog.bench.figure import INK, MUTED, NEGLOG, TORCH, bars, label_bars, new_figure
from neglog.bench.machine import processor

from .task import Task
from .train import Run, facts, largest_difference

LINES = ({"color": TORCH, "linewidth": 5, "alpha": 0.55}, {"color": NEGLOG, "linewidth": 1.3})
COLORS = [TORCH, NEGLOG]


def draw(task: Task, runs: tuple[Run, Run]) -> Any:
    """The figure of two runs."""
    subtitle = f"{task.shape()}, same seed and batches, steps in turn; {processor()}"
    figure = new_figure((11, 6.2), task.title, subtitle)
    left, right = figure.add_gridspec(1, 2, width_ratios=(1.75, 1))
    grid = left.subgridspec(2, 1, height_ratios=(3, 1))
    curves = figure.add_subplot(grid[0])
    _curves(curves, task, runs)
    _difference(figure.add_subplot(grid[1], sharex=curves), runs)
    grid = right.subgridspec(2, 1)
    _times(figure.add_subplot(grid[0]), runs)
    _memory(figure.add_subplot(grid[1]), runs)
    return figure


def _curves(axes: Any, task: Task, runs: tuple[Run, Run]) -> None:
    for run, look in zip(runs, LINES, strict=True):
        label = f"{run.name}, {task.metric}: {task.metric_format.format(run.score)}"
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=label, **look)
    # Above the axes: there is no corner that the curves of every task leave free.
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), labelcolor=INK, title="Training loss",
        alignment="left", borderpad=0, title_fontproperties={"size": 11, "weight": "bold"},
    )  # fmt: skip
    axes.grid(axis="y")
    axes.tick_params(labelbottom=False)
    axes.spines["left"].set_visible(False)


def _difference(axes: Any, runs: tuple[Run, Run]) -> None:
    pairs = zip(runs[0].losses, runs[1].losses, strict=True)
    gaps = [max(abs(a - b), 1e-9) for a, b in pairs]  # equal losses have no logarithm
    axes.set_title(f"Difference of the curves: at most {largest_difference(*runs):.0e}")
    axes.fill_between(range(1, len(gaps) + 1), gaps, 1e-9, color=NEGLOG, alpha=0.25, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(1e-8, 1)
    axes.set_yticks([1e-7, 1e-4, 1e-1])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("step")


def _times(axes: Any, runs: tuple[Run, Run]) -> None:
    numbers = [facts(run) for run in runs]
    values = [fact["loss_ms"] for fact in numbers]
    axes.set_title("In the loss, each step")
    bars(axes, [run.name for run in runs], values, COLORS)
    label_bars(axes, values, "ms")
    for index, fact in enumerate(numbers):
        axes.text(
            0, index + 0.43, f"{fact['share']:.0%} of a step of {fact['step_ms']:.0f} ms",
            fontsize=8.5, color=MUTED, va="center",
        )  # fmt: skip


def _memory(axes: Any, runs: tuple[Run, Run]) -> None:
    extra = [run.extra / 1e6 for run in runs if run.extra is not None]
    if len(extra) < len(runs):
        axes.set_axis_off()
        return
    axes.set_title("Peak memory of a model in training")
    bars(axes, [run.name for run in runs], extra, COLORS)
    label_bars(axes, extra, "MB")
