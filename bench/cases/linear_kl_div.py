"""linear_kl_div_loss from a teacher's hidden states: torch with the logits of both in memory, and
neglog's tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog import reference

from ..contender import Contender, Grads, Problem, Spec, checked_rows, float64_array
from . import Shape
from .kl_div import only_these, plain
from .linear_cross_entropy import head_and_target, truth_of_head
from .pairs import YARDSTICK, three_matmuls
from .token_logprobs import compared_contenders

MODEL = (
    "4 matmuls of the rows x features x vocab, 2 operations each: the scores of both, and the "
    "student's two gradients"
)


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Random hidden states and weights of student and teacher; some gradients are checked."""
    hidden, weight, target = head_and_target(shape, dtype, seed, device)
    states, head, _ = head_and_target(shape, dtype, seed + 1, device)
    picked = checked_rows(len(target), device)
    # Rounded as every contender's are, as the student's are in truth_of_head.
    scores = float64_array((states[picked].double() @ head.double().t()).to(states.dtype))

    def oracle(logits: Tensor, target: Tensor) -> tuple:
        made = reference.kl(float64_array(logits), scores)
        return float(made.loss), made.grad

    truth, some = truth_of_head(hidden[picked], weight, target[picked], oracle)

    def compared(grads: Grads) -> tuple:
        return float64_array(grads[0][picked]), float64_array(grads[1][some])

    rows, features, vocab = shape["rows"], shape["features"], shape["vocab"]
    return Problem(
        spec=Spec(
            "linear_kl_div", shape, dtype, 2 * (hidden.nbytes + weight.nbytes),
            f"{YARDSTICK}, the scores twice", 1, 8 * rows * features * vocab, "GFLOP/s", MODEL, "",
            min,
        ),
        leaves=(hidden.requires_grad_(), weight.requires_grad_()),
        fixed=(states, head, target),
        check_fixed=(states, head, only_these(target, picked)),
        truth=truth,
        compared=compared,
        yardstick=three_matmuls(hidden, weight, scores_again=True),
        by_norm=True,
    )  # fmt: skip


def _plain(hidden: Tensor, weight: Tensor, states: Tensor, head: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(states, head)
    return plain(F.linear(hidden, weight), teacher, target)


def _own(hidden: Tensor, weight: Tensor, states: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return neglog.linear_kl_div_loss(hidden, weight, states, target, teacher_weight=head)


def contenders(problem: Problem) -> list[Contender]:
    return compared_contenders(_plain, _own, 1)
