"""info_nce, in-batch: torch eager, torch.compile, info-nce-pytorch, and neglog's tiles."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog.benchmark.cases import Contender, Problem, Shape, pairs

TEMPERATURE = 0.05
MATMULS = 3


def problem(shape: Shape, dtype: str, seed: int) -> Problem:
    """Queries and their positive keys."""
    query, key = pairs.embeddings(shape["rows"], shape["features"], dtype, seed)
    picked = pairs.some_rows(shape["rows"])
    matrix = pairs.Matrix(query.double(), key.double(), 1 / TEMPERATURE)
    loss, gradient = pairs.truth_of(matrix, picked, columns=False)
    by_query = gradient @ matrix.key / TEMPERATURE
    unit = matrix.query[picked]  # the normalisation lets nothing through along itself
    by_query -= unit * (by_query * unit).sum(1, keepdim=True)
    return pairs.problem_of(shape, dtype, (query, key), MATMULS, loss, by_query)


def _eager(query: Tensor, key: Tensor) -> Tensor:
    scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).t() / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(query)))


def _neglog(query: Tensor, key: Tensor) -> Tensor:
    return neglog.info_nce(query, key, temperature=TEMPERATURE)


def contenders(compiled: bool, shape: Shape, dtype: str) -> list[Contender]:
    """Scores in memory first; info-nce-pytorch where it is installed."""
    runs = pairs.default_backend(shape, dtype)
    found = [Contender("eager", "torch eager", _eager, 1)]
    if compiled:
        one_graph = torch.compile(_eager, fullgraph=True, dynamic=False)
        found.append(Contender("compile", "torch.compile", one_graph, 1))
    if find_spec("info_nce"):
        theirs = importlib.import_module("info_nce").InfoNCE(TEMPERATURE)
        found.append(Contender("info_nce", "info-nce-pytorch", theirs, 1))
    return [*found, Contender("neglog", f"neglog ({runs})", _neglog, 1, backend=runs)]


def small_contenders() -> list[Contender]:
    return [Contender("eager", "torch eager", _eager, 1),
            Contender("neglog", "neglog", _neglog, 1)]  # fmt: skip
