"""`neglog demo`: two runs that differ in the loss alone, and what came of it."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from neglog.bench import files, terminal

from . import QUICK_STEPS, SHOWS, TASKS
from .plot import draw
from .task import Task
from .train import Run, Watch, facts, largest_difference, seconds_in, train

if TYPE_CHECKING:
    from rich.console import Console

# Seconds for both runs where no number of steps is asked.
DEADLINE = 60.0


@contextmanager
def _watched(screen: Console, names: Iterable[str], steps: int) -> Iterator[Watch]:
    """Live bars on a terminal; piped, a line now and then."""
    if not screen.is_terminal:
        yield partial(_print_now_and_then, screen, steps)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]{task.description:<7}"), BarColumn(bar_width=None),
        TextColumn("step {task.completed}/{task.total}"), TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[ms]} ms in the loss"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=screen) as progress:
        bars = {name: progress.add_task(name, total=steps, loss="-", ms="-") for name in names}

        def watch(name: str, step: int, loss: float, seconds: float) -> None:
            ms = f"{seconds * 1e3:5.1f}"
            progress.update(bars[name], completed=step, loss=f"{loss:.3f}", ms=ms)

        yield watch


def _print_now_and_then(
    screen: Console, steps: int, name: str, step: int, loss: float, seconds: float
) -> None:
    if step == steps or step & (step - 1) == 0:  # 1, 2, 4, 8: where a curve falls the fastest
        ms = seconds * 1e3
        screen.print(f"{name:<7} step {step:>4}/{steps}  loss {loss:.4f}  {ms:5.1f} ms in the loss")


def _train_both(screen: Console, task: Task, options: argparse.Namespace) -> tuple[Run, Run]:
    steps = options.steps or (QUICK_STEPS if options.quick else task.steps)
    deadline = math.inf if options.steps else DEADLINE
    with _watched(screen, task.losses, steps) as watch:
        runs = train(task, steps, options.seed, watch, deadline)
    made = len(runs[0].losses)
    if made < steps:
        screen.print(f"[dim]stopped at {made} steps, to end in time; --steps asks for more[/]")
    return runs


def _table(task: Task, runs: tuple[Run, Run]) -> terminal.Table:
    title = f"Same seed, same batches, {len(runs[0].losses)} steps in turn; medians"
    columns = (
        "loss", "ms in the loss", "ms a step", "share", "peak memory", "last loss", task.metric,
    )  # fmt: skip
    rows = []
    for run in runs:
        numbers = facts(run)
        rows.append((
            run.name, f"{numbers['loss_ms']:.1f}", f"{numbers['step_ms']:.0f}",
            f"{numbers['share']:.0%}", terminal.megabytes(run.extra), f"{run.losses[-1]:.4f}",
            task.metric_format.format(run.score),
        ))  # fmt: skip
    return terminal.Table(title, columns, rows, {1: "bold"})


def _conclude(screen: Console, task: Task, runs: tuple[Run, Run], seed: int) -> None:
    first, second = (facts(run)["loss_ms"] for run in runs)
    terminal.show(screen, _table(task, runs))
    screen.print(
        f"The loss, its matmuls and the gradients: {first:.1f} ms a step, and "
        f"{second:.1f}; {first / second:.1f} times as fast.\n"
        f"Largest difference of the two curves at the same step: {largest_difference(*runs):.1e}."
    )
    if task.by_hand is not None:
        name, loss = task.by_hand
        both = (loss, task.losses["neglog"])
        hand, ours = (seconds_in(some, task, runs[1].model, seed) * 1e3 for some in both)
        screen.print(f"One after the other, {name}: {hand:.1f} ms; neglog: {ours:.1f} ms.")
    screen.print(
        "[dim]Peak memory: the most the process held at once during a model's first two steps, "
        "beyond what it held before (VmHWM, reset at the start)[/]"
        if runs[0].extra is not None
        else "[dim]Peak memory: this system does not let a process reset its peak.[/]"
    )
    task.epilogue(runs[1].model, seed, screen.print)


def run(options: argparse.Namespace) -> None:
    """Train both, report, draw. All that can be refused is refused before the training."""
    path = files.check_output(options.out, ".png", options.force)
    for module in ("rich", "matplotlib", "psutil", "cpuinfo"):
        terminal.need(module, "demo", "demo")
    screen = terminal.console()
    assert path is not None
    if options.task in SHOWS:
        importlib.import_module(f"{__package__}.{options.task}").show(options, screen, path)
        return
    task = importlib.import_module(f"{__package__}.{options.task}").load(options.quick)
    screen.print(f"[bold]{options.task}[/]: {TASKS[options.task]}")
    screen.print(f"{task.describe()}; {torch.get_num_threads()} threads.")
    runs = _train_both(screen, task, options)
    _conclude(screen, task, runs, options.seed)
    files.write_figure(path, draw(task, runs))
    screen.print(f"[dim]wrote {path}[/]")
