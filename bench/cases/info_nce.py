"""info_nce, in-batch: torch eager, torch.compile, info-nce-pytorch, and neglog's tiles."""

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

TEMPERATURE = 0.05


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Queries and their positive keys."""
    query, key = pairs.embeddings(shape["rows"], shape["features"], dtype, seed, device)
    picked = checked_rows(shape["rows"], device)
    matrix = pairs.Matrix(query.double(), key.double(), 1 / TEMPERATURE)
    loss, gradient = pairs.truth_of(matrix, picked, columns=False)
    by_query = gradient @ matrix.key / TEMPERATURE
    by_query = pairs.through_normalisation(by_query, matrix.query[picked])
    return pairs.problem_of("info_nce", shape, dtype, (query, key), (loss, by_query))


def _eager(query: Tensor, key: Tensor) -> Tensor:
    scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).t() / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(query), device=query.device))


def _neglog(query: Tensor, key: Tensor) -> Tensor:
    return neglog.info_nce(query, key, temperature=TEMPERATURE)


def contenders(problem: Problem) -> list[Contender]:
    """Scores in memory first; info-nce-pytorch where it is installed."""
    found = [torch_eager(_eager, 1), torch_compiled(_eager, 1)]
    if find_spec("info_nce"):
        theirs = importlib.import_module("info_nce").InfoNCE(TEMPERATURE)
        name = "info-nce-pytorch"
        found.append(Contender(name, name, theirs, 1, library=name))
    return [*found, neglog_default(_neglog, 1)]
