"""One training run, its loss timed apart from the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

from neglog.benchmark.machine import PeakMemory
from neglog.demo.task import Features, Loss, Task

WARMUP = 20
# Called after each step: its number from 1, its loss, seconds in the loss.
Watch = Callable[[int, float, float], None]


class Run(NamedTuple):
    """Per step: loss, seconds in the loss, seconds in all. extra: peak memory beyond the start."""

    name: str
    losses: list[float]
    in_loss: list[float]
    in_step: list[float]
    extra: int | None
    perplexity: float
    model: nn.Module


def facts(run: Run) -> dict[str, float]:
    """Milliseconds a step in the loss and in all (medians), and the loss's share."""
    in_loss, in_step = median(run.in_loss), median(run.in_step)
    return {"loss_ms": in_loss * 1e3, "step_ms": in_step * 1e3, "share": in_loss / in_step}


def largest_difference(first: Run, second: Run) -> float:
    """Between the two curves, at the same step, as far as both go."""
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=False))


def loss_and_gradient(loss: Loss, features: Features, batch: Any) -> tuple[float, float]:
    """The loss, and the seconds it and its gradient took; the model's own backward comes after.

    The graph is cut at the features, so that the clock sees all of the loss, its head's matmuls
    among it, and none of the model.
    """
    leaves = tuple(feature.detach().requires_grad_() for feature in features)
    start = perf_counter()
    value = loss(leaves, batch)
    gradients = torch.autograd.grad(value, leaves)
    seconds = perf_counter() - start
    torch.autograd.backward(features, gradients)
    return value.item(), seconds


def seconds_in(loss: Loss, task: Task, model: nn.Module, seed: int, repeats: int = 5) -> float:
    """The median time of a loss on the features of a model that is trained no further."""
    batches = islice(task.batches(seed), 1 + repeats)  # the first pays for pages and pools
    return median(
        [loss_and_gradient(loss, task.features(model, batch), batch)[1] for batch in batches][1:]
    )


def train(
    task: Task, name: str, steps: int, seed: int, watch: Watch, deadline: float = math.inf
) -> Run:
    """Up to `steps` steps by the loss `name`, none begun once `deadline` seconds have gone."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), task.rate, weight_decay=0.1, fused=True)
    # No decay towards the end: a run that the deadline stops is then no different until there.
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    losses: list[float] = []
    in_loss: list[float] = []
    in_step: list[float] = []
    begun = perf_counter()
    with PeakMemory() as peak:
        for batch in task.batches(seed):
            start = perf_counter()
            optimizer.zero_grad()
            features = task.features(model, batch)
            value, seconds = loss_and_gradient(task.losses[name], features, batch)
            optimizer.step()
            warmup.step()
            losses.append(value)
            in_loss.append(seconds)
            in_step.append(perf_counter() - start)
            watch(len(losses), value, seconds)
            if len(losses) >= steps or perf_counter() - begun > deadline:
                break
    return Run(name, losses, in_loss, in_step, peak.extra, task.perplexity(model), model)
