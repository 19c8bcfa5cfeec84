"""A batch whose graph does not fit in memory: neglog.cached_step against the whole graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

import neglog
from neglog.bench.machine import PeakMemory
from neglog.bench.terminal import megabytes

from .sentences import Text
from .task import Loss, Say
from .train import loss_and_gradient

CHUNK = 64
# Both methods run at the first size; at the second, cached_step alone.
WHOLE, LARGE, QUICK_LARGE = 128, 2048, 256
# A step longer than this many seconds is halved: other machines, and busy ones.
LIMIT = 120.0


class Step(NamedTuple):
    """What one gradient cost. embeddings: those that the loss saw."""

    loss: float
    seconds: float
    extra: int | None
    gradients: list[Tensor]
    embeddings: tuple[Tensor, ...]


def whole_graph(model: nn.Module, text: Text, loss: Loss) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Twice the text, the graphs of all chunks kept until the loss: dropout as cached_step's."""
    rows = range(0, len(text.ids), CHUNK)
    first, second = (
        torch.cat([model(text.rows(slice(row, row + CHUNK))) for row in rows]) for _ in range(2)
    )
    value = loss((first, second), None)
    value.backward()
    return value.detach(), (first, second)


def cached(model: nn.Module, text: Text, loss: Loss) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Twice the text, one chunk's graph at a time."""
    seen: list[tuple[Tensor, ...]] = []

    def of_embeddings(*embeddings: Tensor) -> Tensor:
        seen.append(embeddings)
        return loss(embeddings, None)

    return neglog.cached_step(model, (text, text), of_embeddings, chunk_size=CHUNK), seen[0]


def measure(
    gradient: Callable[..., tuple[Tensor, tuple[Tensor, ...]]], model: nn.Module, text: Text,
    loss: Loss, seed: int,
) -> Step:  # fmt: skip
    """Of one gradient, which the model keeps no longer."""
    model.zero_grad()
    torch.manual_seed(seed)
    start = perf_counter()
    with PeakMemory() as peak:
        value, embeddings = gradient(model, text, loss)
    seconds = perf_counter() - start
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    model.zero_grad()
    embeddings = tuple(embedding.detach() for embedding in embeddings)
    return Step(value.item(), seconds, peak.extra, gradients, embeddings)


def apart(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference of two gradients, beside the largest number of the first."""
    pairs = zip(first, second, strict=True)
    gap = max((one - other).abs().max().item() for one, other in pairs)
    return gap / max(one.abs().max().item() for one in first)


def compare(
    model: nn.Module, text: Text, losses: tuple[Loss, Loss], seed: int, quick: bool, say: Say
) -> None:
    """Both methods at the size where both can run, then the large batch."""
    small = text.rows(slice(WHOLE))
    whole = measure(whole_graph, model, small, losses[0], seed)
    ours = measure(cached, model, small, losses[1], seed)
    gap = apart(whole.gradients, ours.gradients)
    say(
        f"Batch {WHOLE}, same dropout: torch with the whole graph {_cost(whole)}, loss "
        f"{whole.loss:.5f}; neglog.cached_step, {CHUNK} at a time, {_cost(ours)}, loss "
        f"{ours.loss:.5f}. The gradients differ by {gap:.0e} of the largest number at most."
    )
    rows = _affordable(QUICK_LARGE if quick else LARGE, ours.seconds)
    large = measure(cached, model, text.rows(slice(rows)), losses[1], seed)
    say(
        f"Batch {rows} by neglog.cached_step: one step {_cost(large)}, loss {large.loss:.4f}: "
        f"each sentence among {rows}, the encoder at {CHUNK}.{_shortened(rows, quick)}"
    )
    say(_instead(whole, large, rows))
    taken = [_median_ms(loss, large.embeddings) for loss in losses]
    say(
        f"Of that step the loss and its gradient are {taken[1]:.0f} ms; torch's formula takes "
        f"{taken[0]:.0f} ms on the same embeddings. Written by hand in torch, a GradCache has the "
        "same encoder passes."
    )


def _cost(step: Step) -> str:
    return f"{step.seconds:.1f} s and {megabytes(step.extra)}"


def _affordable(rows: int, seconds: float) -> int:
    while rows > WHOLE and seconds * rows / WHOLE > LIMIT:
        rows //= 2
    return rows


def _shortened(rows: int, quick: bool) -> str:
    if quick or rows == LARGE:
        return ""
    return f" (Not {LARGE}: that would take this machine more than {LIMIT:.0f} s.)"


def _instead(whole: Step, large: Step, rows: int) -> str:
    """What the whole graph would need: it grows with the batch, the gradients do not."""
    seconds = whole.seconds * rows / WHOLE
    if whole.extra is None or large.extra is None:
        return f"The whole graph would take about {seconds:.0f} s, by its size at {WHOLE}; not run."
    fixed = sum(gradient.nbytes for gradient in whole.gradients)
    extra = (whole.extra - fixed) * rows // WHOLE + fixed
    return (
        f"With the whole graph that batch would need about {megabytes(extra)} and {seconds:.0f} s, "
        f"by what it took at {WHOLE}; not run. Of either, "
        f"{megabytes(fixed)} are the encoder's gradients."
    )


def _median_ms(loss: Loss, embeddings: tuple[Tensor, ...], repeats: int = 5) -> float:
    """The first call pays for pages and pools."""
    timed = partial(loss_and_gradient, loss)
    taken = [timed(tuple(x.requires_grad_() for x in embeddings), None)[1] for _ in range(repeats)]
    return sorted(taken)[repeats // 2] * 1e3
