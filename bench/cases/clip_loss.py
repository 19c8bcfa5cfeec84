"""clip_loss: open_clip's formula, one matrix for both sides, torch.compile, and neglog's tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog

from ..contender import (
    ALL_SUITES,
    Contender,
    Problem,
    checked_rows,
    neglog_default,
    torch_compiled,
    torch_eager,
)
from . import Shape, pairs

SCALE = 100.0


def problem(
    shape: Shape, dtype: str, seed: int, device: str = "cpu", check: bool = True
) -> Problem:
    """Pairs of embeddings and a scale that learns."""
    image, text = pairs.embeddings(shape["rows"], shape["features"], dtype, seed, device)
    truth = None
    if check:
        matrix = pairs.Matrix(image.double(), text.double(), SCALE)
        picked = checked_rows(len(image), device)
        loss, gradient = pairs.truth_of(matrix, picked, columns=True)
        truth = loss, SCALE * gradient @ matrix.key
    leaves = (image, text, torch.tensor(SCALE, device=device))
    return pairs.problem_of("clip_loss", shape, dtype, leaves, truth)


def _open_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """It forms the scores twice."""
    target = torch.arange(len(image), device=image.device)
    of_images = scale * image @ text.t()
    of_texts = scale * text @ image.t()
    return (F.cross_entropy(of_images, target) + F.cross_entropy(of_texts, target)) / 2


def _one_matrix(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    target = torch.arange(len(image), device=image.device)
    scores = scale * image @ text.t()
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2


def _all_scores_kept(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    room = len(image) ** 2 * image.itemsize / 2**20 + 1
    return neglog.clip_loss(image, text, scale, options={"workspace_mb": room})


def contenders(problem: Problem) -> list[Contender]:
    """Scores in memory first."""
    return [
        torch_eager(_open_clip, 1, "torch eager (open_clip)"),
        Contender("one_matrix", "torch eager, one matrix", _one_matrix, 1, baseline=True,
                  suites=ALL_SUITES),
        torch_compiled(_one_matrix, 1, "torch.compile, one matrix"),
        neglog_default(neglog.clip_loss, 1),
        Contender("kept", "  given room for all scores", _all_scores_kept, 1, "neglog"),
    ]  # fmt: skip
