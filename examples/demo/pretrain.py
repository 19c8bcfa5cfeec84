"""What pretraining gives: a GPT reads the docstrings of libraries, then some pages of another book.

Its fine-tuning on a few pages of Python's own documentation stands beside a training from random
weights on the same pages, which gets three times the steps. Each has the learning rate that the
validation pages choose, and stops where they say; shown is the perplexity of further pages.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from random import Random
from statistics import mean, stdev
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import neglog
from neglog.bench import files, terminal
from neglog.bench.figure import MUTED, NEGLOG, TORCH, new_figure
from neglog.bench.machine import processor

from . import docstrings
from .gpt import CONTEXT, GPT
from .text import SPELLED, VOCAB, Tokenizer, topics, windows

if TYPE_CHECKING:
    from rich.console import Console

PRETRAINING, BATCH, RATE, WARMUP = 320, 16, 2e-3, 20
# Of fine-tuning. Three times the steps for who begins at random; rates for both, as each likes.
STEPS, MORE, PAGES_BATCH = 50, 3, 8
RATES = (1e-3, 3e-3)
# Tokens of Python's documentation: for validation, for the test, to learn from, for each seed.
VALIDATION, TEST, PAGES = 6_000, 12_000, 8_000
SEEDS = 3
CHECKS = 8  # of a fine-tuning


class Sizes(NamedTuple):
    """How much of everything."""

    pretraining: int
    steps: int
    seeds: int
    test: int


WHOLE = Sizes(PRETRAINING, STEPS, SEEDS, TEST)
QUICK = Sizes(8, 6, 2, 2_000)


class Pages(NamedTuple):
    """Token ids: what each seed learns from, what chooses, what is reported."""

    train: list[Tensor]
    validation: Tensor
    test: Tensor


class Curve(NamedTuple):
    """Of one start: after each of `steps`, for each seed, the test perplexity; and the best."""

    name: str
    rate: float
    steps: list[int]
    perplexities: list[list[float]]  # of each seed
    best: list[float]  # of each seed, at the step that validation chose

    def means(self) -> list[float]:
        """Over the seeds, after each of `steps`."""
        return [mean(column) for column in zip(*self.perplexities, strict=True)]


def show(options: argparse.Namespace, screen: Console, path: Path) -> None:
    """Pretrain, fine-tune, report, draw."""
    sizes = QUICK if options.quick else WHOLE
    if options.steps:
        sizes = sizes._replace(pretraining=options.steps)
    text = docstrings.read(options.quick)
    tokenizer = Tokenizer(text, VOCAB)
    corpus = torch.tensor(tokenizer.encode(text, SPELLED))
    pages = cut(tokenizer, sizes)
    screen.print(
        f"To pretrain: docstrings of libraries, {len(corpus):,} tokens. To fine-tune: "
        f"{len(pages.train[0]):,} tokens of Python's documentation, other pages for each of "
        f"{sizes.seeds} seeds; {len(pages.test):,} to test. {torch.get_num_threads()} threads."
    )
    torch.manual_seed(options.seed)
    model = GPT(len(tokenizer))
    random = copy.deepcopy(model)
    start = perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    for _ in train(model, corpus, RATE, sizes.pretraining, BATCH, generator):
        pass
    seconds, at_once = perf_counter() - start, perplexity(model, pages.test)
    screen.print(
        f"Pretrained for {sizes.pretraining} steps in {seconds:.0f} s: before any fine-tuning its "
        f"perplexity of the pages to test is {at_once:,.0f}; that of random weights "
        f"{perplexity(random, pages.test):,.0f}."
    )
    curves = (
        tuned("pretrained", model, pages, sizes.steps),
        tuned("from random weights", random, pages, MORE * sizes.steps),
    )
    report(curves, screen)
    files.write_figure(path, draw(curves, sizes))
    screen.print(f"[dim]wrote {path}[/]")


def cut(tokenizer: Tokenizer, sizes: Sizes) -> Pages:
    """Topics in an order of chance: whole ones for each part, so that no part knows another's."""
    names = sorted(topics())
    Random(0).shuffle(names)
    encoded = iter([torch.tensor(tokenizer.encode(topics()[name])) for name in names])

    def take(count: int) -> Tensor:
        parts: list[Tensor] = []
        while sum(map(len, parts)) < count:
            parts.append(next(encoded))
        return torch.cat(parts)[:count]

    validation, test = take(VALIDATION if sizes is not QUICK else sizes.test), take(sizes.test)
    return Pages([take(PAGES) for _ in range(sizes.seeds)], validation, test)


def train(
    model: GPT, tokens: Tensor, rate: float, steps: int, batch: int, generator: torch.Generator
) -> Any:
    """Yields before the first step and after each."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.1, fused=True)
    for step in range(steps):
        yield step
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARMUP, 1 - step / steps)
        ids = windows(tokens, CONTEXT, batch, generator)
        loss = neglog.linear_cross_entropy(model.hidden(ids), model.token.weight, ids, shift=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    yield steps


@torch.no_grad()
def perplexity(model: GPT, tokens: Tensor) -> float:
    """exp of the mean loss per token."""
    length = (len(tokens) - 1) // CONTEXT * CONTEXT
    ids, target = tokens[:length].view(-1, CONTEXT), tokens[1 : length + 1].view(-1, CONTEXT)
    total = sum(
        float(neglog.linear_cross_entropy(model.hidden(some), model.token.weight, wanted,
                                          reduction="sum"))
        for some, wanted in zip(ids.split(BATCH), target.split(BATCH), strict=True)
    )  # fmt: skip
    return math.exp(total / length)


class Try(NamedTuple):
    """One fine-tuning: the perplexities after each check."""

    validation: list[float]
    test: list[float]

    def best(self) -> int:
        """Which check validation would have stopped at."""
        return self.validation.index(min(self.validation))


def tuned(name: str, start: GPT, pages: Pages, steps: int) -> Curve:
    """Every rate with the first seed; the best one with all."""
    checks = sorted({round(steps * number / CHECKS) for number in range(CHECKS + 1)})
    first = {rate: fine_tune(start, pages, 0, rate, steps, checks) for rate in RATES}
    rate = min(RATES, key=lambda one: min(first[one].validation))
    tries = [first[rate]]
    tries += [
        fine_tune(start, pages, seed, rate, steps, checks) for seed in range(1, len(pages.train))
    ]
    best = [one.test[one.best()] for one in tries]
    return Curve(name, rate, checks, [one.test for one in tries], best)


def fine_tune(
    start: GPT, pages: Pages, seed: int, rate: float, steps: int, checks: list[int]
) -> Try:
    """Of a copy; `start` stays as it is."""
    model = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(seed)
    found = Try([], [])
    for step in train(model, pages.train[seed], rate, steps, PAGES_BATCH, generator):
        if step in checks:
            found.validation.append(perplexity(model, pages.validation))
            found.test.append(perplexity(model, pages.test))
    return found


def report(curves: tuple[Curve, Curve], screen: Console) -> None:
    """The table, and what it says."""
    rows = [
        (
            curve.name, f"{curve.rate:g}", str(curve.steps[-1]), f"{mean(curve.best):.1f}",
            f"{stdev(curve.best):.1f}", ", ".join(f"{one:.1f}" for one in curve.best),
        )
        for curve in curves
    ]  # fmt: skip
    columns = ("start", "rate", "steps", "test perplexity", "spread", "of each seed")
    title = "Fine-tuned on a few pages; rate and step chosen by validation"
    terminal.show(screen, terminal.Table(title, columns, rows))
    pretrained, random = curves
    ratio = mean(random.best) / mean(pretrained.best)
    screen.print(
        f"Pretraining: perplexity {mean(pretrained.best):.1f} in place of {mean(random.best):.1f}, "
        f"{ratio:.2f} times lower, after a third of the steps."
    )


def draw(curves: tuple[Curve, Curve], sizes: Sizes) -> Any:
    """Perplexity against steps, a thin line a seed."""
    title = "What pretraining gave: a small GPT, fine-tuned on a few pages"
    subtitle = (
        f"{sizes.pretraining} steps of pretraining on docstrings; {PAGES:,} tokens of Python's "
        f"documentation, {sizes.seeds} seeds; {processor()}"
    )
    figure = new_figure((9, 5.2), title, subtitle)
    axes = figure.add_subplot()
    for curve, color in zip(curves, (NEGLOG, TORCH), strict=True):
        for one in curve.perplexities:
            axes.plot(curve.steps, one, color=color, linewidth=0.8, alpha=0.4)
        label = f"{curve.name}: {mean(curve.best):.1f} ± {stdev(curve.best):.1f}"
        axes.plot(curve.steps, curve.means(), color=color, linewidth=2.4, label=label)
    axes.set_yscale("log")
    axes.set_title("Perplexity of pages that were not trained on (lower is better)")
    axes.set_xlabel("step of fine-tuning", color=MUTED)
    axes.grid(axis="y")
    axes.legend(loc="upper right")
    return figure
