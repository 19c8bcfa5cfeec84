"""Every public loss, in each form that composes other ops, as a function of tensors alone."""

from typing import NamedTuple

import torch
from torch import Tensor

import neglog

ROWS, CLASSES = 40, 9
IGNORED = -100


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, Y, HEAD = normal(ROWS, CLASSES), normal(ROWS, CLASSES, seed=1), normal(CLASSES, CLASSES, seed=2)
PROBABILITIES = Y.softmax(1)
LABELS = torch.arange(ROWS) % CLASSES
TARGET = torch.where(LABELS % 4 == 3, IGNORED, LABELS)
WEIGHT = torch.arange(1.0, CLASSES + 1) / 7
EXTENDED = {"z_loss": 0.1, "softcap": 5.0, "label_smoothing": 0.1, "num_items": 17}
# At 600 rows all similarities no longer fit.
TILES = {"options": {"workspace_mb": 0.5}}


def in_sequences(x: Tensor) -> Tensor:
    """Each row four times, as the positions of a sequence."""
    return x[:, None].expand(-1, 4, *x.shape[1:])


ROW_CALLS = {
    "cross_entropy": (lambda x, t: neglog.cross_entropy(x, t), (X, TARGET)),
    "cross_entropy, none": (
        lambda x, t: neglog.cross_entropy(x, t, reduction="none"), (X, TARGET),
    ),
    "cross_entropy, probabilities": (
        lambda x, t: neglog.cross_entropy(x, t), (X, PROBABILITIES),
    ),
    "cross_entropy, options": (
        lambda x, t, w: neglog.cross_entropy(x, t, w, logit_scale=2.0, **EXTENDED),
        (X, TARGET, WEIGHT),
    ),
    "cross_entropy, statistics": (
        lambda x, t: neglog.cross_entropy(x, t, return_stats=True).logsumexp, (X, TARGET),
    ),
    "cross_entropy, in place": (
        lambda x, t: neglog.cross_entropy(x * 1, t, inplace_backward=True), (X, TARGET),
    ),
    "cross_entropy, by torch": (
        lambda x, t: neglog.cross_entropy(x, t, z_loss=0.1, backend="torch"), (X, TARGET),
    ),
    "masked_cross_entropy": (
        lambda x, t: neglog.masked_cross_entropy(x, t, t > 2), (X, LABELS),
    ),
    "masked_cross_entropy, probabilities": (
        lambda x, t: neglog.masked_cross_entropy(x, t, t[:, 0] > 0.1), (X, PROBABILITIES),
    ),
    "linear_cross_entropy": (
        lambda x, t, w: neglog.linear_cross_entropy(x, w, t), (X, TARGET, HEAD),
    ),
    "linear_cross_entropy, none": (
        lambda x, t, w: neglog.linear_cross_entropy(x, w, t, reduction="none"), (X, TARGET, HEAD),
    ),
    "linear_cross_entropy, shift": (
        lambda x, t, w: neglog.linear_cross_entropy(x, w, t, shift=True), (X, TARGET, HEAD),
    ),
    "linear_cross_entropy, shift, none": (
        lambda x, t, w: neglog.linear_cross_entropy(
            in_sequences(x), w, in_sequences(t), shift=True, reduction="none"
        ),
        (X, TARGET, HEAD),
    ),
    "linear_cross_entropy, probabilities": (
        lambda x, t, w: neglog.linear_cross_entropy(x, w, t, mask=t[:, 0] > 0.1),
        (X, PROBABILITIES, HEAD),
    ),
    "linear_cross_entropy, by torch": (
        lambda x, t, w: neglog.linear_cross_entropy(x, w, t, backend="torch"), (X, TARGET, HEAD),
    ),
    "token_logprobs": (lambda x, t: sum(neglog.token_logprobs(x, t)[:3]), (X, TARGET)),
    "linear_token_logprobs": (
        lambda x, t, w: sum(neglog.linear_token_logprobs(x, w, t)[:3]), (X, TARGET, HEAD),
    ),
    "cross_entropy, weights of rows": (
        lambda x, t: neglog.cross_entropy(x, t, token_weight=t % 3, per_sequence=True), (X, TARGET),
    ),
    "kl_div_loss": (lambda x, y: neglog.kl_div_loss(x, y), (X, Y)),
    "kl_div_loss, mixed": (
        lambda x, y, t: neglog.kl_div_loss(x, y, t, beta=0.3, temperature=2.0, hard_weight=0.5),
        (X, Y, TARGET),
    ),
    "kl_div_loss, named": (
        lambda x, y: neglog.kl_div_loss(
            x, y.log_softmax(1)[:, :2] - 1,
            teacher_ids=torch.arange(2, device=x.device).expand(x.shape[0], 2),
        ),
        (X, Y),
    ),
    "kl_div_loss, by torch": (
        lambda x, y: neglog.kl_div_loss(x, y, beta=1.0, backend="torch"), (X, Y),
    ),
    "linear_kl_div_loss": (
        lambda x, y, w: neglog.linear_kl_div_loss(x, w, y, teacher_weight=w), (X, Y, HEAD),
    ),
    "linear_kl_div_loss, none": (
        lambda x, y, w: neglog.linear_kl_div_loss(x, w, y, reduction="none"), (X, Y, HEAD),
    ),
    "CrossEntropyLoss": (neglog.nn.CrossEntropyLoss(z_loss=0.1), (X, TARGET)),
}  # fmt: skip
PAIR_CALLS = {
    "info_nce": (lambda x, y: neglog.info_nce(x, y, **TILES), (X, Y)),
    "info_nce, statistics": (
        lambda x, y: neglog.info_nce(x, y, return_stats=True, **TILES).logsumexp, (X, Y),
    ),
    "info_nce, symmetric": (
        lambda x, y: neglog.info_nce(x, y, symmetric=True, label_smoothing=0.1, **TILES), (X, Y),
    ),
    "info_nce, exclude": (
        lambda x, ids: neglog.info_nce(x, 2 * x.roll(1, 1), exclude=ids, **TILES), (X, LABELS),
    ),
    "info_nce, queue": (lambda x, y, keys: neglog.info_nce(x, y, keys, **TILES), (X, Y, HEAD)),
    "info_nce, in batch": (
        lambda x, y, keys: neglog.info_nce(
            x, y, keys, negative_mode="in_batch", hard_negative_weight=0.5, **TILES
        ),
        (X, Y, HEAD),
    ),
    "info_nce, paired": (
        lambda x, y: neglog.info_nce(
            x, y, torch.stack([x + y, x - y], 1), negative_mode="paired", **TILES
        ),
        (X, Y),
    ),
    "clip_loss": (lambda x, y: neglog.clip_loss(x, y, 3.0, **TILES), (X, Y)),
    "siglip_loss": (lambda x, y: neglog.siglip_loss(x, y, 3.0, -1.0, **TILES), (X, Y)),
    "nt_xent": (lambda x, y: neglog.nt_xent(x, y, **TILES), (X, Y)),
    "dcl": (lambda x, y: neglog.dcl(x, y, **TILES), (X, Y)),
    "sup_con": (lambda x, labels: neglog.sup_con(x, labels, **TILES), (X, LABELS)),
}  # fmt: skip
CALLS = {**ROW_CALLS, **PAIR_CALLS}


class Outcome(NamedTuple):
    """Of a call: its result, and the gradient of the result's sum by the first argument."""

    value: Tensor
    gradient: Tensor


def outcome(function, given) -> Outcome:
    x = given[0].detach().clone().requires_grad_()
    value = function(x, *given[1:])
    return Outcome(value.detach(), torch.autograd.grad(value.sum(), x)[0])


def of_rows(given, count: int) -> list[Tensor]:
    """The same with another number of rows."""
    times = count // ROWS + 1
    return [
        x.repeat(times, *[1] * (x.dim() - 1))[:count].clone() if has_rows(x) else x for x in given
    ]


def has_rows(x: Tensor) -> bool:
    return x.shape[0] == ROWS


def assert_same(found, expected) -> None:
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-4, atol=1e-5, equal_nan=True)
