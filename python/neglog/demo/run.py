"""`neglog demo`: two runs that differ in the loss alone, and what came of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import neglog
from neglog.benchmark import files, terminal
from neglog.demo import QUICK_STEPS, STEPS, TASKS
from neglog.demo.gpt import CONTEXT
from neglog.demo.plot import draw
from neglog.demo.text import load
from neglog.demo.train import NAMES, Run, Watch, facts, largest_difference, train

if TYPE_CHECKING:
    from rich.console import Console

# Seconds for the first run where no number of steps is asked; the second makes as many steps.
DEADLINE = 40.0
QUICK_HELD_OUT = 4097
PROMPT = "The"


@contextmanager
def _watched(screen: Console, name: str, steps: int) -> Iterator[Watch]:
    """A live bar on a terminal; piped, a line now and then."""
    if not screen.is_terminal:
        yield partial(_print_now_and_then, screen, name, steps)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]{task.description:<7}"), BarColumn(bar_width=None),
        TextColumn("step {task.completed}/{task.total}"), TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[ms]} ms in the loss"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=screen) as progress:
        bar = progress.add_task(name, total=steps, loss="-", ms="-")

        def watch(step: int, loss: float, seconds: float) -> None:
            ms = f"{seconds * 1e3:5.1f}"
            progress.update(bar, completed=step, loss=f"{loss:.3f}", ms=ms)

        yield watch


def _print_now_and_then(
    screen: Console, name: str, steps: int, step: int, loss: float, seconds: float
) -> None:
    if step == 1 or step == steps or step % max(1, steps // 6) == 0:
        ms = seconds * 1e3
        screen.print(f"{name:<7} step {step:>4}/{steps}  loss {loss:.4f}  {ms:5.1f} ms in the loss")


def _train_both(screen: Console, data: Any, options: argparse.Namespace) -> tuple[Run, Run]:
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    deadline = math.inf if options.steps else DEADLINE
    losses = (torch.nn.functional.cross_entropy, neglog.cross_entropy)
    runs: list[Run] = []
    # The first steps of a process pay for threads, memory pools and loading: neither run shall.
    short = data._replace(held_out=data.held_out[: CONTEXT + 1])
    for loss in losses:
        train(loss, short, 2, options.seed, lambda *_: None)
    for name, loss in zip(NAMES, losses, strict=True):
        with _watched(screen, name, steps) as watch:
            runs.append(train(loss, data, steps, options.seed, watch, deadline))
        if len(runs[-1].losses) < steps:
            steps = len(runs[-1].losses)
            screen.print(f"[dim]stopped at {steps} steps, to end in time; --steps asks for more[/]")
        deadline = math.inf
    return runs[0], runs[1]


def _table(runs: tuple[Run, Run]) -> Any:
    steps = len(runs[0].losses)
    title = f"Same seed, same batches, {steps} steps; medians"
    made = terminal.table(
        title, "loss", "ms in the loss", "ms a step", "share", "peak memory", "last loss",
        "held-out perplexity",
    )  # fmt: skip
    for name, run in zip(NAMES, runs, strict=True):
        told = facts(run)
        made.add_row(
            name, f"{told['loss_ms']:.1f}", f"{told['step_ms']:.0f}", f"{told['share']:.0%}",
            terminal.megabytes(run.extra), f"{run.losses[-1]:.4f}", f"{run.perplexity:.2f}",
            style="bold" if name == "neglog" else None,
        )  # fmt: skip
    return made


def _conclude(screen: Console, runs: tuple[Run, Run], data: Any, seed: int) -> None:
    from rich.markup import escape

    first, second = (facts(run)["loss_ms"] for run in runs)
    screen.print(_table(runs))
    screen.print(
        f"In the loss {first:.1f} ms a step, and {second:.1f}: {first / second:.1f} times faster.\n"
        f"Largest difference of the two curves: {largest_difference(*runs):.1e}."
    )
    if runs[0].extra is None:
        screen.print("[dim]Peak memory: this system does not let a process reset its peak.[/]")
    generator = torch.Generator().manual_seed(seed)
    ids = runs[1].model.generate(data.tokenizer.encode(PROMPT), 30, generator)
    line = " ".join(data.tokenizer.decode(ids).split())
    screen.print(f"The model writes: [italic]{escape(line)}[/]")


def run(options: argparse.Namespace) -> None:
    """Train both, tell, draw. All that can be refused is refused before the training."""
    path = files.check_output(options.out, ".png", options.force)
    screen = terminal.console("demo")
    terminal.need("matplotlib", "demo")
    data = load()
    if options.quick:
        data = data._replace(held_out=data.held_out[:QUICK_HELD_OUT])
    screen.print(f"[bold]{options.task}[/]: {TASKS[options.task]}")
    screen.print(
        f"Python's own documentation, {len(data.train):,} tokens to train on, "
        f"{len(data.held_out):,} held out, vocabulary {len(data.tokenizer):,}; "
        f"{torch.get_num_threads()} threads."
    )
    runs = _train_both(screen, data, options)
    _conclude(screen, runs, data, options.seed)
    assert path is not None
    files.write_figure(path, draw(*runs, len(data.tokenizer)))
    screen.print(f"[dim]wrote {path}[/]")
