"""nt_xent: torch eager, torch.compile, pytorch-metric-learning, and half of neglog's tiles."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

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

TEMPERATURE = 0.5
# It holds every positive pair against every negative one: at 1024 views it took 18 GB.
METRIC_LEARNING_ROWS = 512


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """`rows` views in all, the second half of the same things as the first."""
    half = shape["rows"] // 2
    views = torch.cat(pairs.embeddings(half, shape["features"], dtype, seed, device))
    matrix = pairs.Matrix(
        views.double(), views.double(), 1 / TEMPERATURE, shift=half, without_self=True
    )
    picked = checked_rows(len(views), device)
    # The matrix is symmetric: columns have the loss of rows, and a view gets as a key what it would
    # get as a query if columns counted too.
    loss, gradient = pairs.truth_of(matrix, picked, columns=True)
    by_view = 2 * gradient @ matrix.key / TEMPERATURE
    by_view = pairs.through_normalisation(by_view, matrix.query[picked])
    shape = {"rows": len(views), "features": shape["features"]}
    return pairs.problem_of("nt_xent", shape, dtype, (views,), (loss, by_view))


def _eager(views: Tensor) -> Tensor:
    first, second = views.chunk(2)  # as every contender gets them
    z = F.normalize(torch.cat([first, second]), dim=1)
    scores = (z @ z.t() / TEMPERATURE).fill_diagonal_(-torch.inf)
    target = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(scores, target)


def _neglog(views: Tensor) -> Tensor:
    first, second = views.chunk(2)
    return neglog.nt_xent(first, second, TEMPERATURE)


def _metric_learning() -> Contender:
    losses = importlib.import_module("pytorch_metric_learning.losses")
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(TEMPERATURE))
    name = "pytorch-metric-learning"
    return Contender(name, name, lambda views: loss(*views.chunk(2)), 1, library=name)


def contenders(problem: Problem) -> list[Contender]:
    """Scores in memory first; pytorch-metric-learning where it is installed."""
    found = [torch_eager(_eager, 1), torch_compiled(_eager, 1)]
    few = problem.spec.shape["rows"] <= METRIC_LEARNING_ROWS
    if few and find_spec("pytorch_metric_learning"):
        found.append(_metric_learning())
    return [*found, neglog_default(_neglog, 1)]
