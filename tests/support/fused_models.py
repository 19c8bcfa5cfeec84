"""One training step of a model of transformers, and what happened to its logits on the way."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neglog import dispatch
from neglog.integrations import transformers as ours
from neglog.integrations.transformers import unfuse

TOLERANCE = 1e-5  # of loss and gradients, relative to the largest gradient; float32
__all__ = ["TOLERANCE", "Step", "difference", "fuse", "heads", "logits_made", "step", "unfuse"]


def fuse(model: nn.Module) -> nn.Module:
    """However small its logits are."""
    return ours.fuse(model, min_bytes=0)


class Step(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]
    # Whether linear_cross_entropy ran; which lines of code made logits, of the whole head.
    fused: bool
    made: list[str]


def heads(model: nn.Module) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [h for h in (head if isinstance(head, (list, tuple)) else [head]) if h is not None]


@contextmanager
def logits_made(model: nn.Module) -> Iterator[list[str]]:
    """Each product with the head's whole weight that F.linear makes, by the line that asked for it.

    It needs no word of neglog: the weight is recognised by its memory.
    """
    own, lines = F.linear, []
    weights = {head.weight.data_ptr() for head in heads(model) if isinstance(head, nn.Module)}

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() in weights and weight.dim() == 2:
            lines.append(_line())
        return own(input, weight, bias)

    F.linear = linear
    try:
        yield lines
    finally:
        F.linear = own


def _line() -> str:
    """The innermost line that is the model's own, or its loss function's."""
    frames = [f for f in traceback.extract_stack() if "transformers/" in f.filename]
    frames = [f for f in frames if "/neglog/" not in f.filename]
    if not frames:
        return "a line outside transformers"
    last = frames[-1]
    return f"{last.filename.rsplit('/', 1)[1]}:{last.lineno} `{last.line}`"


def step(model: nn.Module, given: dict[str, Any]) -> Step:
    """Loss and gradients, from the same random numbers each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    with dispatch.record() as ran, logits_made(model) as made:
        loss = loss_of(model, given)
        loss.backward()
    gradients = {
        name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
    }
    fused = any(op.startswith("linear_nll") for op in ran)
    return Step(loss.detach().clone(), gradients, fused, list(dict.fromkeys(made)))


def loss_of(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The model's own; of its logits, where it has none."""
    out = model(**given)
    loss = getattr(out, "loss", None)
    if loss is None:
        logits = out.logits
        target = given.get("labels", given.get("input_ids")).flatten()
        loss = F.cross_entropy(logits.flatten(0, -2), target[: logits.shape[:-1].numel()])
    return loss.mean()


def difference(plain: Step, fused: Step) -> float:
    """The largest one of loss and gradients, relative to loss and largest gradient."""
    loss = abs(float(fused.loss - plain.loss)) / max(abs(float(plain.loss)), 1e-30)
    largest = max(float(g.abs().max()) for g in plain.gradients.values() if g.numel())
    nothing = torch.zeros(())
    gradients = max(
        float((fused.gradients.get(name, nothing) - plain.gradients.get(name, nothing)).abs().max())
        for name in plain.gradients.keys() | fused.gradients.keys()
        if plain.gradients.get(name, nothing).numel()
    )
    return max(loss, gradients / largest)
