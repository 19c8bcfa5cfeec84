"""What the kernels of nll are asked: the Numba version of problem.hpp."""

from __future__ import annotations

from typing import NamedTuple

from neglog.kernels.numba.intrinsics import Real


class Problem(NamedTuple):
    """The arguments that all share: addresses, 0 where an array is absent; strides in elements."""

    zero: Real  # a number of the type that is computed in
    stored: Real  # a number of the type in memory, as halves.py has them
    rows: int
    vocab: int
    logits: int
    logits_stride: int
    target: int
    probs: int
    probs_stride: int
    weight: int  # of classes
    token_weight: int  # of rows
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float
    z_loss: float
    weight_sum: float  # over the vocabulary; the vocabulary's size without weights


class Output(NamedTuple):
    loss: int
    lse: int
    lse_low: int
    correct: int
    entropy: int
    argmax: int


class Gradient(NamedTuple):
    """Where the gradient is written, 0 for nowhere, and the gradients of the loss and the lse."""

    out: int
    out_stride: int
    bypass_cache: bool  # it is larger than any cache, and does not lie over the logits
    grad: int  # 0: every one is 1
    grad_stride: int
    grad_scale: float
    grad_lse: int
    grad_entropy: int
    entropy: int  # of each row, where grad_entropy is not 0
