"""linear_token_logprobs with an entropy bonus: torch with the logits in memory, and neglog's
tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog

from ..contender import Contender, Grads, Problem, Spec, checked_rows, float64_array
from . import Shape
from .cross_entropy import IGNORED
from .linear_cross_entropy import head_and_target, truth_of_head
from .pairs import YARDSTICK, three_matmuls
from .token_logprobs import compared_contenders, plain, policy_loss, truth_of

MODEL = "4 matmuls of the rows x features x vocab, 2 operations each: the scores are made twice"


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Random hidden states, weight and target; the gradients of some are checked."""
    hidden, weight, target = head_and_target(shape, dtype, seed, device)
    picked = checked_rows(len(target), device)
    check_target = torch.full_like(target, IGNORED)
    check_target[picked] = target[picked]
    truth, some = truth_of_head(hidden[picked], weight, target[picked], truth_of)

    def compared(grads: Grads) -> tuple:
        return float64_array(grads[0][picked]), float64_array(grads[1][some])

    rows, features, vocab = shape["rows"], shape["features"], shape["vocab"]
    return Problem(
        spec=Spec(
            "linear_token_logprobs", shape, dtype, hidden.nbytes + weight.nbytes,
            f"{YARDSTICK}, the scores twice", 1, 8 * rows * features * vocab, "GFLOP/s", MODEL, "",
            min,
        ),
        leaves=(hidden.requires_grad_(), weight.requires_grad_()),
        fixed=(target,),
        check_fixed=(check_target,),
        truth=truth,
        compared=compared,
        yardstick=three_matmuls(hidden, weight, scores_again=True),
        by_norm=True,
    )  # fmt: skip


def _plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return plain(F.linear(hidden, weight), target)


def _own(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    found = neglog.linear_token_logprobs(hidden, weight, target)
    return policy_loss(found.logprob, found.entropy, target)


def contenders(problem: Problem) -> list[Contender]:
    return compared_contenders(_plain, _own, 1)
