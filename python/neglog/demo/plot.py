"""The demo as a picture: the curves, their difference, the time in the loss, the memory."""

from __future__ import annotations

from typing import Any

from neglog.benchmark.figure import INK, MUTED, NEGLOG, TORCH, bars, new_figure
from neglog.benchmark.machine import processor
from neglog.demo.task import Task
from neglog.demo.train import Run, facts, largest_difference

PURPOSE = "demo"


def draw(task: Task, runs: tuple[Run, Run]) -> Any:
    """The figure of two runs."""
    figure = new_figure(
        PURPOSE, (11, 6.2), task.title,
        f"{task.shape()}, same seed and batches, steps in turn; {processor()}",
    )  # fmt: skip
    grid = figure.add_gridspec(
        4, 2, left=0.07, right=0.97, top=0.8, bottom=0.09, width_ratios=(1.75, 1),
        height_ratios=(1, 1, 1, 0.85), wspace=0.24, hspace=0.75,
    )  # fmt: skip
    curves = figure.add_subplot(grid[:3, 0])
    _curves(curves, task, runs)
    _difference(figure.add_subplot(grid[3, 0], sharex=curves), runs)
    told = [facts(run) for run in runs]
    names, colors = [run.name for run in runs], [TORCH, NEGLOG]
    times = figure.add_subplot(grid[:2, 1])
    bars(times, "In the loss, each step", names, [f["loss_ms"] for f in told], colors, "ms")
    _shares(times, told)
    memory = figure.add_subplot(grid[2:, 1])
    extra = [run.extra / 1e6 for run in runs if run.extra is not None]
    if len(extra) < len(runs):
        memory.set_axis_off()
    else:
        bars(memory, "Peak memory of a model in training", names, extra, colors, "MB")
    return figure


def _curves(axes: Any, task: Task, runs: tuple[Run, Run]) -> None:
    axes.set_title("Training loss")
    looks = ({"color": TORCH, "linewidth": 5, "alpha": 0.55}, {"color": NEGLOG, "linewidth": 1.3})
    for run, look in zip(runs, looks, strict=True):
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=_label(task, run), **look)
    axes.grid(axis="y")
    axes.tick_params(labelbottom=False)
    axes.spines["left"].set_visible(False)
    axes.legend(loc="upper right", labelcolor=INK)


def _label(task: Task, run: Run) -> str:
    return f"{run.name}, {task.metric}: {task.metric_format.format(run.score)}"


def _difference(axes: Any, runs: tuple[Run, Run]) -> None:
    pairs = zip(runs[0].losses, runs[1].losses, strict=True)
    gaps = [max(abs(a - b), 1e-9) for a, b in pairs]  # a logarithm has no place for equal ones
    axes.set_title(f"Difference of the curves: at most {largest_difference(*runs):.0e}")
    axes.fill_between(range(1, len(gaps) + 1), gaps, 1e-9, color=NEGLOG, alpha=0.25, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(1e-8, 1)
    axes.set_yticks([1e-7, 1e-4, 1e-1])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("step")


def _shares(axes: Any, told: list[dict[str, float]]) -> None:
    for index, fact in enumerate(told):
        axes.text(
            0, index + 0.43, f"{fact['share']:.0%} of a step of {fact['step_ms']:.0f} ms",
            fontsize=8.5, color=MUTED, va="center",
        )  # fmt: skip
