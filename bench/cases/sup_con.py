"""sup_con: the formula in torch eager, torch.compile, and half of neglog's tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog

from ..contender import (
    Contender,
    Problem,
    checked_rows,
    neglog_default,
    torch_compiled,
    torch_eager,
)
from . import Shape, pairs

TEMPERATURE = 0.1
ROWS_OF_A_LABEL = 4


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Embeddings, four of each label."""
    features = torch.cat(
        pairs.embeddings(shape["rows"] // 2, shape["features"], dtype, seed, device)
    )
    labels = torch.arange(len(features), device=device) % (len(features) // ROWS_OF_A_LABEL)
    exact = features.double().requires_grad_()
    loss = _eager(exact, labels)
    (gradient,) = torch.autograd.grad(loss, exact)
    truth = loss.item(), gradient[checked_rows(len(features), device)]
    made = pairs.problem_of("sup_con", shape, dtype, (features,), truth)
    return made._replace(fixed=(labels,), check_fixed=(labels,))


def _eager(features: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(features, dim=1)
    scores = (z @ z.t() / TEMPERATURE).fill_diagonal_(-torch.inf)
    mates = (labels[:, None] == labels).fill_diagonal_(False)
    log_p = torch.where(mates, F.log_softmax(scores, 1), 0)
    return -(log_p.sum(1) / mates.sum(1)).mean()


def _neglog(features: Tensor, labels: Tensor) -> Tensor:
    return neglog.sup_con(features, labels, TEMPERATURE)


def contenders(problem: Problem) -> list[Contender]:
    """Scores in memory first."""
    return [torch_eager(_eager, 1), torch_compiled(_eager, 1), neglog_default(_neglog, 1)]
