"""linear_cross_entropy: torch eager, torch.compile, torch's own chunks, and neglog's tiles."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog import reference

from ..contender import (
    Contender,
    Grads,
    Problem,
    Spec,
    Truth,
    checked_rows,
    float64_array,
    neglog_default,
    torch_compiled,
    torch_eager,
)
from . import Shape
from .cross_entropy import IGNORED
from .pairs import YARDSTICK, three_matmuls

Oracle = Callable[[Tensor, Tensor], tuple[float, np.ndarray]]
MODEL = "3 matmuls of the counted rows x features x vocab, 2 operations each"


def problem(
    shape: Shape, dtype: str, seed: int, device: str = "cpu", counted: float = 1.0
) -> Problem:
    """Random input, weight and target, of which a share counts; some gradients are checked."""
    rows, features, vocab = shape["rows"], shape["features"], shape["vocab"]
    hidden, weight, target = head_and_target(shape, dtype, seed, device)
    target[max(1, round(rows * counted)) :] = IGNORED
    count = int((target != IGNORED).sum())
    picked = checked_rows(count, device)
    check_target = torch.full_like(target, IGNORED)
    check_target[picked] = target[picked]
    truth, some = truth_of_head(hidden[picked], weight, target[picked], _oracle)

    def compared(grads: Grads) -> tuple:
        return float64_array(grads[0][picked]), float64_array(grads[1][some])

    operations = 6 * count * features * vocab
    return Problem(
        spec=Spec(
            "linear_cross_entropy", shape, dtype, hidden.nbytes + weight.nbytes, YARDSTICK, 1,
            operations, "GFLOP/s", MODEL, "" if counted == 1.0 else f"{counted:.0%} counted", min,
        ),
        leaves=(hidden.requires_grad_(), weight.requires_grad_()),
        fixed=(target,),
        check_fixed=(check_target,),
        truth=truth,
        compared=compared,
        yardstick=three_matmuls(hidden[:count], weight),
        by_norm=True,
    )  # fmt: skip


def head_and_target(
    shape: Shape, dtype: str, seed: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight whose logits have a standard deviation of 1, and targets."""
    rows, features, vocab = shape["rows"], shape["features"], shape["vocab"]
    kind = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(rows, features, generator=generator, device=device).to(kind)
    weight = torch.randn(vocab, features, generator=generator, device=device)
    weight = weight.div_(features**0.5).to(kind)
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator, device=device)


def _oracle(logits: Tensor, target: Tensor) -> tuple[float, np.ndarray]:
    found = reference.nll(float64_array(logits), target.cpu().numpy())
    return float(found.loss), found.grad


def truth_of_head(
    hidden: Tensor, weight: Tensor, target: Tensor, oracle: Oracle
) -> tuple[Truth, Tensor]:
    """Of these rows alone; and the rows of the weight whose gradients it holds. oracle: of logits
    and target, the loss and its gradient by the logits."""
    x, w = hidden.double(), weight.double()
    # The logits are rounded as every contender's are: from there on the oracle is exact.
    logits = (x @ w.t()).to(hidden.dtype)
    loss, grad = oracle(logits, target)
    dz = torch.from_numpy(grad).to(hidden.device)
    by_hidden, by_weight = dz @ w, dz[:, target].t() @ x
    grads = float64_array(by_hidden), float64_array(by_weight)
    return Truth(loss, grads), target


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, target, options=options)


def contenders(problem: Problem) -> list[Contender]:
    """Logits in memory first; each does the same three matmuls."""
    found = [torch_eager(_eager, 1), torch_compiled(_eager, 1)]
    if hasattr(F, "linear_cross_entropy"):  # new in torch 2.13
        found.append(Contender("chunked", "torch, chunked", _chunked, 1))
    return [*found, neglog_default(neglog.linear_cross_entropy, 1)]
