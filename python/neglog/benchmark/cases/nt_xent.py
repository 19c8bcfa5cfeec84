"""nt_xent: torch eager, torch.compile, pytorch-metric-learning, and half of neglog's tiles."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog.benchmark.cases import Contender, Problem, Shape, pairs

TEMPERATURE = 0.5
# It holds every positive pair against every negative one: at 1024 views it took 18 GB.
METRIC_LEARNING_ROWS = 512
MATMULS = 3  # of a matrix of all views; its symmetry halves the first, and lets two be one


def problem(shape: Shape, dtype: str, seed: int) -> Problem:
    """`rows` views in all, the second half of the same things as the first."""
    views = torch.cat(pairs.embeddings(shape["rows"] // 2, shape["features"], dtype, seed))
    matrix = pairs.Matrix(
        views.double(), views.double(), 1 / TEMPERATURE, len(views) // 2, without_self=True
    )
    picked = pairs.some_rows(len(views))
    # The matrix is symmetric: columns have the loss of rows, and a view gets as a key what it would
    # get as a query if columns counted too.
    loss, gradient = pairs.truth_of(matrix, picked, columns=True)
    by_view = 2 * gradient @ matrix.key / TEMPERATURE
    unit = matrix.query[picked]
    by_view -= unit * (by_view * unit).sum(1, keepdim=True)
    return pairs.problem_of(
        {"rows": len(views), "features": shape["features"]}, dtype, (views,), MATMULS, loss, by_view
    )


def _eager(views: Tensor) -> Tensor:
    first, second = views.chunk(2)  # as every contender gets them
    z = F.normalize(torch.cat([first, second]), dim=1)
    scores = (z @ z.t() / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(z) // 2))


def _neglog(views: Tensor) -> Tensor:
    first, second = views.chunk(2)
    return neglog.nt_xent(first, second, TEMPERATURE)


def _metric_learning() -> Contender:
    losses = importlib.import_module("pytorch_metric_learning.losses")
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(TEMPERATURE))
    return Contender(
        "metric_learning", "pytorch-metric-learning", lambda views: loss(*views.chunk(2)), 1
    )


def contenders(compiled: bool, shape: Shape, dtype: str) -> list[Contender]:
    """Scores in memory first; pytorch-metric-learning where it is installed."""
    runs = pairs.default_backend(shape, dtype)
    found = [Contender("eager", "torch eager", _eager, 1)]
    if compiled:
        one_graph = torch.compile(_eager, fullgraph=True, dynamic=False)
        found.append(Contender("compile", "torch.compile", one_graph, 1))
    if shape["rows"] <= METRIC_LEARNING_ROWS and find_spec("pytorch_metric_learning"):
        found.append(_metric_learning())
    return [*found, Contender("neglog", f"neglog ({runs})", _neglog, 1, backend=runs)]


def small_contenders() -> list[Contender]:
    return [Contender("eager", "torch eager", _eager, 1),
            Contender("neglog", "neglog", _neglog, 1)]  # fmt: skip
