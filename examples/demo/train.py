"""Two training runs in turn, their losses timed apart from the models."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

from neglog.bench.machine import PeakMemory

from .task import Features, Loss, Task

WARMUP = 20
# Called after each step: the run, the step's number from 1, its loss, seconds in the loss.
Watch = Callable[[str, int, float, float], None]


class Run(NamedTuple):
    """Per step: loss, seconds in the loss, seconds in all. extra: peak memory of two steps."""

    name: str
    losses: list[float]
    in_loss: list[float]
    in_step: list[float]
    extra: int | None
    score: float
    model: nn.Module


def facts(run: Run) -> dict[str, float]:
    """Milliseconds a step in the loss and in all (medians), and the loss's share."""
    in_loss, in_step = median(run.in_loss), median(run.in_step)
    return {"loss_ms": in_loss * 1e3, "step_ms": in_step * 1e3, "share": in_loss / in_step}


def largest_difference(first: Run, second: Run) -> float:
    """Between the two curves, at the same step."""
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))


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


class Training:
    """A model in training, by the loss `name` of the task."""

    def __init__(self, task: Task, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.task, self.name, self.model = task, name, task.model()
        self.batches = task.batches(seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), task.rate, weight_decay=0.1, fused=True
        )
        # No decay towards the end: where the deadline stops it then makes no other curve.
        self.warmup = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1 / WARMUP, total_iters=WARMUP
        )
        self.losses: list[float] = []
        self.in_loss: list[float] = []
        self.in_step: list[float] = []

    def step(self) -> None:
        """One batch."""
        batch = next(self.batches)
        start = perf_counter()
        self.optimizer.zero_grad()
        features = self.task.features(self.model, batch)
        value, seconds = loss_and_gradient(self.task.losses[self.name], features, batch)
        self.optimizer.step()
        self.warmup.step()
        self.losses.append(value)
        self.in_loss.append(seconds)
        self.in_step.append(perf_counter() - start)


def peak_memory(task: Task, name: str, seed: int) -> int | None:
    """Of a model's first two steps, the optimizer's state among it; the model is dropped again."""
    with PeakMemory() as peak:
        training = Training(task, name, seed)
        training.step()
        training.step()
    return peak.extra


def train(
    task: Task, steps: int, seed: int, watch: Watch, deadline: float = math.inf
) -> tuple[Run, Run]:
    """Up to `steps` steps of each loss, none begun once `deadline` seconds have gone.

    In turn, step by step: what else the machine does meanwhile, it does to both.
    """
    # The first steps of a process pay for threads, pools and loading, and memory is no one's alone.
    for name in task.losses:
        seconds_in(task.losses[name], task, task.model(), seed, 1)
    extra = [peak_memory(task, name, seed) for name in task.losses]
    trainings = [Training(task, name, seed) for name in task.losses]
    begun = perf_counter()
    for step in range(1, steps + 1):
        for training in trainings:
            training.step()
            watch(training.name, step, training.losses[-1], training.in_loss[-1])
        if perf_counter() - begun > deadline:
            break
    first, second = (
        Run(made.name, made.losses, made.in_loss, made.in_step, memory,
            task.score(made.model), made.model)
        for made, memory in zip(trainings, extra, strict=True)
    )  # fmt: skip
    return first, second
