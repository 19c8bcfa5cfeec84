"""One training run, its loss timed apart from the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog.benchmark.machine import PeakMemory
from neglog.demo.gpt import GPT
from neglog.demo.text import Data

BATCH = 16
RATE = 2e-3
WARMUP = 20
NAMES = ("torch", "neglog")  # of the two runs

Loss = Callable[[Tensor, Tensor], Tensor]
# Called after each step: its number from 1, its loss, seconds in the loss.
Watch = Callable[[int, float, float], None]


class Run(NamedTuple):
    """Per step: loss, seconds in the loss, seconds in all. extra: peak memory beyond the start."""

    losses: list[float]
    in_loss: list[float]
    in_step: list[float]
    extra: int | None
    perplexity: float
    model: GPT


def facts(run: Run) -> dict[str, float]:
    """Milliseconds a step in the loss and in all (medians), and the loss's share."""
    in_loss, in_step = median(run.in_loss), median(run.in_step)
    return {"loss_ms": in_loss * 1e3, "step_ms": in_step * 1e3, "share": in_loss / in_step}


def largest_difference(first: Run, second: Run) -> float:
    """Between the two curves, at the same step."""
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))


def batches(tokens: Tensor, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows (batch, context) and the same one token on, without end."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.arange(context + 1)
    while True:
        start = torch.randint(len(tokens) - context, (BATCH, 1), generator=generator)
        window = tokens[start + reach]
        yield window[:, :-1], window[:, 1:]


def loss_and_gradient(loss: Loss, logits: Tensor, target: Tensor) -> tuple[float, float]:
    """The loss, and the seconds it and its gradient took; the model's own backward comes after.

    The graph is cut at the logits, so that the clock sees all of the loss and none of the model.
    """
    leaf = logits.detach().flatten(0, 1).requires_grad_()
    start = perf_counter()
    value = loss(leaf, target.flatten())
    (gradient,) = torch.autograd.grad(value, leaf)
    seconds = perf_counter() - start
    logits.backward(gradient.view_as(logits))
    return value.item(), seconds


@torch.no_grad()
def perplexity(model: GPT, tokens: Tensor) -> float:
    """exp of the mean loss per held-out token, by torch's own function whatever trained it."""
    length = (len(tokens) - 1) // model.context * model.context
    ids = tokens[:length].view(-1, model.context)
    target = tokens[1 : length + 1].view(-1, model.context)
    total = 0.0
    for some, wanted in zip(ids.split(BATCH), target.split(BATCH), strict=True):
        logits = model(some).flatten(0, 1)
        total += F.cross_entropy(logits, wanted.flatten(), reduction="sum").item()
    return math.exp(total / length)


def train(
    loss: Loss, data: Data, steps: int, seed: int, watch: Watch, deadline: float = math.inf
) -> Run:
    """Up to `steps` steps, none begun once `deadline` seconds have gone."""
    torch.manual_seed(seed)
    model = GPT(len(data.tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1)
    # No decay towards the end: a run that the deadline stops is then no different until there.
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    losses: list[float] = []
    in_loss: list[float] = []
    in_step: list[float] = []
    begun = perf_counter()
    with PeakMemory() as peak:
        for ids, target in batches(data.train, model.context, seed):
            start = perf_counter()
            optimizer.zero_grad()
            value, seconds = loss_and_gradient(loss, model(ids), target)
            optimizer.step()
            warmup.step()
            losses.append(value)
            in_loss.append(seconds)
            in_step.append(perf_counter() - start)
            watch(len(losses), value, seconds)
            if len(losses) >= steps or perf_counter() - begun > deadline:
                break
    return Run(losses, in_loss, in_step, peak.extra, perplexity(model, data.held_out), model)
