"""clip_loss: open_clip's formula, one matrix for both sides, torch.compile, and neglog's tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog.benchmark.cases import Contender, Problem, Shape, pairs

SCALE = 100.0
# The mathematics: scores, and the gradients of both sides; open_clip makes the scores twice.
MATMULS = 3


def problem(shape: Shape, dtype: str, seed: int) -> Problem:
    """Pairs of embeddings and a scale that learns."""
    image, text = pairs.embeddings(shape["rows"], shape["features"], dtype, seed)
    picked = pairs.some_rows(shape["rows"])
    matrix = pairs.Matrix(image.double(), text.double(), SCALE)
    loss, gradient = pairs.truth_of(matrix, picked, columns=True)
    leaves = (image, text, torch.tensor(SCALE))
    return pairs.problem_of(shape, dtype, leaves, MATMULS, loss, SCALE * gradient @ matrix.key)


def _target(image: Tensor) -> Tensor:
    return torch.arange(len(image))


def _open_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    target = _target(image)
    of_images = scale * image @ text.t()
    of_texts = scale * text @ image.t()
    return (F.cross_entropy(of_images, target) + F.cross_entropy(of_texts, target)) / 2


def _one_matrix(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    target = _target(image)
    scores = scale * image @ text.t()
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2


def _kept(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    room = {"workspace_mb": len(image) ** 2 * image.itemsize / 2**20 + 1}
    return neglog.clip_loss(image, text, scale, options=room)


def contenders(compiled: bool, shape: Shape, dtype: str) -> list[Contender]:
    """Scores in memory first."""
    runs = pairs.default_backend(shape, dtype)
    found = [
        Contender("eager", "torch eager (open_clip)", _open_clip, 1),
        Contender("shared", "torch eager, one matrix", _one_matrix, 1),
    ]
    if compiled:
        one_graph = torch.compile(_one_matrix, fullgraph=True, dynamic=False)
        found.append(Contender("compile", "torch.compile, one matrix", one_graph, 1))
    return [
        *found,
        Contender("neglog", f"neglog ({runs})", neglog.clip_loss, 1, backend=runs),
        Contender("kept", "  given room for all scores", _kept, 1, backend=runs),
    ]


def small_contenders() -> list[Contender]:
    return [
        Contender("eager", "torch eager", _one_matrix, 1),
        Contender("neglog", "neglog", neglog.clip_loss, 1),
    ]
