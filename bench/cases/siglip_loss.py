"""siglip_loss: open_clip's formula, torch.compile, and neglog's tiles."""

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

SCALE, BIAS = 10.0, -10.0  # as the paper begins


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Pairs of embeddings, and a scale and a bias that learn."""
    image, text = pairs.embeddings(shape["rows"], shape["features"], dtype, seed, device)
    numbers = (torch.tensor(x, device=device) for x in (SCALE, BIAS))
    picked = checked_rows(len(image), device)
    truth = _truth(image.double(), text.double(), picked)
    return pairs.problem_of("siglip_loss", shape, dtype, (image, text, *numbers), truth)


def _truth(image: Tensor, text: Tensor, picked: Tensor) -> tuple[float, Tensor]:
    """The loss, and its gradient by some images."""
    everything = torch.arange(len(image), device=image.device)

    def signed(rows: Tensor) -> tuple[Tensor, Tensor]:
        sign = 2.0 * (everything == rows[:, None]) - 1
        return sign, sign * (SCALE * image[rows] @ text.t() + BIAS)

    chunks = everything.split(pairs.CHUNK)
    total = sum(float(F.softplus(-signed(rows)[1]).sum()) for rows in chunks)
    sign, z = signed(picked)
    gradient = -SCALE * (sign * torch.sigmoid(-z)) @ text
    return total / len(image), gradient / len(image)


def _open_clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    count = len(image)
    sign = 2 * torch.eye(count, device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(sign * (scale * image @ text.t() + bias)).sum() / count


def contenders(problem: Problem) -> list[Contender]:
    """Scores in memory first."""
    return [
        torch_eager(_open_clip, 1, "torch eager (open_clip)"),
        torch_compiled(_open_clip, 1),
        neglog_default(neglog.siglip_loss, 1),
    ]
