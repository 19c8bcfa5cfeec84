"""A few operations in a row, on the logits and on what the operations gave, as a user's code would.

A program is a list of (operation, which tensor). All tensors made so far live: what one operation
writes, the others must see if they share memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.deferred import views
from tests.support.deferred.given import VOCAB, Case, Given

CHANGES: dict[str, Case] = {
    "* 2": lambda x, s: x * 2,
    "/ 3": lambda x, s: x / 3,
    "* 0.5 first": lambda x, s: 0.5 * x,
    "-": lambda x, s: -x,
    "+ 1": lambda x, s: x + 1,
    "- maximum": lambda x, s: x - x.max(),
    "+ bias": lambda x, s: x + torch.linspace(-1, 1, x.shape[-1]).to(x.dtype),
    "+ itself": lambda x, s: x + x,
    "tanh": lambda x, s: torch.tanh(x),
    "softcap": lambda x, s: 2 * torch.tanh(x / 2),
    "float": lambda x, s: x.float(),
    "double": lambda x, s: x.double(),
    "to float32": lambda x, s: x.to(torch.float32),
    "clone": lambda x, s: x.clone(),
    "detach": lambda x, s: x.detach(),
    "clamp": lambda x, s: x.clamp(-1, 1),
    "log_softmax": lambda x, s: x.log_softmax(-1),
    "softmax": lambda x, s: F.softmax(x, -1),
    "cat": lambda x, s: torch.cat([x, x]),
    "stack": lambda x, s: torch.stack([x, x * 2]),
    "sum": lambda x, s: x.sum(-1),
    "gather": lambda x, s: x.gather(-1, torch.zeros_like(x[..., :1], dtype=torch.long)),
    "logsumexp": lambda x, s: x.logsumexp(-1, keepdim=True),
    "nll": lambda x, s: x.log_softmax(-1).gather(
        -1, (torch.arange(x[..., :1].numel()) % x.shape[-1]).view(x[..., :1].shape)
    ),
    "first of split": lambda x, s: x.split(1)[0],
    "last of unbind": lambda x, s: x.unbind()[-1],
    "first of chunk": lambda x, s: x.chunk(2, -1)[0],
    "[list]": lambda x, s: x[[0, -1]],
    "[mask]": lambda x, s: x[torch.arange(len(x)) % 2 == 0],
    "loss": lambda x, s: F.cross_entropy(
        x.reshape(-1, x.shape[-1]), torch.arange(x[..., 0].numel()) % x.shape[-1]
    ),
    "loss of each": lambda x, s: F.cross_entropy(
        x.reshape(-1, VOCAB), torch.arange(x[..., 0].numel()) % VOCAB, reduction="none"
    ),
    "loss, classes second": lambda x, s: F.cross_entropy(
        x.transpose(1, 2), torch.ones(x[..., 0].shape, dtype=torch.long), label_smoothing=0.1
    ),
    "loss in no_grad": lambda x, s: torch.no_grad()(
        lambda: F.cross_entropy(x.reshape(-1, VOCAB), torch.arange(x[..., 0].numel()) % VOCAB)
    )(),
    "read": lambda x, s: x.sum().item() and x,
    "numpy": lambda x, s: torch.from_numpy(x.detach().numpy()),
    "retain_grad": lambda x, s: x.retain_grad() or x,
}
WRITES: dict[str, Case] = {
    "mul_": lambda x, s: x.mul_(1.5),
    "add_": lambda x, s: x.add_(1),
    "/=": lambda x, s: x.div_(2),
    "[0] =": lambda x, s: views.item_set(x, 0, 0.5),
    "[..., 1] =": lambda x, s: views.item_set(x, (..., 1), -3.0),
    "[..., 2:] +=": lambda x, s: views.item_added(x, (..., slice(2, None)), 1.0),
    "masked_fill_": lambda x, s: x.masked_fill_(x < 0, 0.1),
    "detach, mul_": lambda x, s: x.detach().mul_(1.25),
    "add_ in no_grad": lambda x, s: views.without_gradient(x, lambda y: y.add_(0.5)),
    "copy_": lambda x, s: x.copy_(torch.ones_like(x)),
}
STEPS: dict[str, Case] = {**views.INDICES, **views.VIEWS, **CHANGES, **WRITES}
Program = list[tuple[str, int]]


def drawn(seed: int) -> Program:
    """2 to 6 operations. Half go on from the latest result; writes are as frequent as views."""
    choose = random.Random(seed)
    kinds: list[list[str]] = [list(views.INDICES), list(views.VIEWS), list(CHANGES), list(WRITES)]
    program = []
    for number in range(choose.randint(2, 6)):
        latest = choose.random() < 0.6
        program.append(
            (choose.choice(choose.choice(kinds)), number if latest else choose.randint(0, number))
        )
    return program


def running(program: Program) -> Case:
    """All tensors that it made. An operation that raises leaves its input as the result."""

    def case(x: Tensor, s: Given) -> Any:
        live: list[Tensor] = [x]
        raised = []
        for name, which in program:
            step: Callable[..., Any] = STEPS[name]
            try:
                live.append(step(live[which], s))
            except Exception as error:
                raised.append(f"{name}: {type(error).__name__}")
                live.append(live[which])
        return live, raised

    return case
