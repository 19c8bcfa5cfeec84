"""transformers' Trainer on a GPT-2 and on a BERT, with `fuse(model)` and without."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neglog.bench import files, terminal
from neglog.bench.figure import NEGLOG, TORCH, bars, label_bars, new_figure
from neglog.bench.machine import processor

from . import QUICK_STEPS

if TYPE_CHECKING:
    from rich.console import Console

    from neglog.examples.trainers.measure import Result

STEPS = 30
MODELS = {"gpt_trainer": "GPT-2, next tokens", "bert_mlm_trainer": "BERT, hidden tokens"}
NAMES = ("model", "fuse(model)")


def show(options: argparse.Namespace, screen: Console, path: Path) -> None:
    """Train both twice, report, draw."""
    for module in ("transformers", "accelerate"):
        terminal.need(module, "demo --task trainer", "transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from neglog.examples.trainers import text

    steps = options.steps or (QUICK_STEPS // 2 if options.quick else STEPS)
    screen.print(
        f"Small models of {text.VOCAB:,} tokens, 1,024 of them a step; {steps} steps of Trainer, "
        "each training in a process of its own."
    )
    found = {name: _trained(name, steps, screen) for name in MODELS}
    _report(found, screen)
    files.write_figure(path, _draw(found, steps))
    screen.print(f"[dim]wrote {path}[/]")


def _trained(name: str, steps: int, screen: Console) -> tuple[Result, Result]:
    import importlib

    from neglog.examples.trainers.measure import in_a_process

    train = importlib.import_module(f"neglog.examples.trainers.{name}").train
    results = []
    for ours in (False, True):
        result = in_a_process(train, ours, steps)
        screen.print(
            f"{MODELS[name]:<20} {NAMES[ours]:<12} {result.seconds * 1e3:4.0f} ms a step  "
            f"last loss {result.losses[-1]:.4f}"
        )
        results.append(result)
    return results[0], results[1]


def _report(found: dict[str, tuple[Result, Result]], screen: Console) -> None:
    columns = ("model", "", "ms a step", "peak memory", "first loss", "last loss")
    rows = [
        (
            MODELS[name], label, f"{result.seconds * 1e3:.0f}", terminal.megabytes(result.peak),
            f"{result.losses[0]:.4f}", f"{result.losses[-1]:.4f}",
        )
        for name, results in found.items()
        for label, result in zip(NAMES, results, strict=True)
    ]  # fmt: skip
    terminal.show(screen, terminal.Table("Same seed, same batches; medians", columns, rows))
    for name, (plain, fused) in found.items():
        screen.print(
            f"{MODELS[name]}: {plain.seconds / fused.seconds:.1f} times as fast a step; largest "
            f"difference of the two curves at the same step: {_difference(plain, fused):.1e}."
        )
    screen.print(
        "[dim]Peak memory: the most a training held beyond model and data: gradients, optimizer, "
        "activations, logits (VmHWM)[/]"
    )


def _difference(plain: Result, fused: Result) -> float:
    return max(abs(a - b) for a, b in zip(plain.losses, fused.losses, strict=True))


def _draw(found: dict[str, tuple[Result, Result]], steps: int) -> Any:
    subtitle = f"{steps} steps, same seed and batches; {processor()}"
    title = "transformers' Trainer, twice: only fuse(model) differs"
    figure = new_figure((11, 6.2), title, subtitle)
    grid = figure.add_gridspec(2, 3, width_ratios=(1.6, 1, 1))
    for row, (name, results) in enumerate(found.items()):
        _curves(figure.add_subplot(grid[row, 0]), MODELS[name], results)
        seconds = [result.seconds * 1e3 for result in results]
        _bars(figure.add_subplot(grid[row, 1]), "A step", seconds, "ms")
        peaks = [(result.peak or 0) / 1e6 for result in results]
        if all(peaks):
            _bars(figure.add_subplot(grid[row, 2]), "Peak memory", peaks, "MB")
    return figure


def _curves(axes: Any, name: str, results: tuple[Result, Result]) -> None:
    looks = ({"color": TORCH, "linewidth": 5, "alpha": 0.55}, {"color": NEGLOG, "linewidth": 1.3})
    for label, result, look in zip(NAMES, results, looks, strict=True):
        axes.plot(range(1, len(result.losses) + 1), result.losses, label=label, **look)
    axes.set_title(name)
    axes.set_xlabel(f"step; the curves differ by at most {_difference(*results):.0e}")
    axes.legend(loc="upper right")
    axes.grid(axis="y")


def _bars(axes: Any, title: str, values: list[float], unit: str) -> None:
    axes.set_title(title)
    bars(axes, list(NAMES), values, [TORCH, NEGLOG])
    label_bars(axes, values, unit)
