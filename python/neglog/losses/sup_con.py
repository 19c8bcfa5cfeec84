"""Supervised contrastive loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neglog import route
from neglog.checks import check_comparison, check_groups
from neglog.losses._pairs import compare, embeddings, scale_of, workspace_of
from neglog.losses._result import reduce_and_cast
from neglog.losses._types import Backend, Reduction, WorkspaceOptions
from neglog.ops.dtypes import real_dtype


def sup_con(
    features: Tensor, labels: Tensor, temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean", *, normalize: bool = True,
    options: WorkspaceOptions | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Supervised contrastive loss: -log p of a row's label mates, averaged over them.

    Args:
        features: (N, D); labels: (N,) integers.
        temperature: a number or a tensor (), which receives a gradient.
        reduction: a row without a mate has loss 0 and no share in the "mean", which is 0 if no row
            has one, as pytorch-metric-learning's SupConLoss has it.
        normalize, options, backend: as in `info_nce`.

    Source: arXiv:2004.11362, its L_out.
    """
    check_comparison(temperature, reduction, features=features)
    check_groups("labels", labels, features)
    z = embeddings(features, normalize)
    where = route.choose(z, backend=backend, workspace=workspace_of(options))
    scale = scale_of(temperature, z)
    rows = torch.arange(z.shape[0], device=z.device)
    mates = _Mates.of(labels)
    # A row's only mate is a positive, whose loss may be near 0 and then needs the score that its
    # log-sum-exp was made of. With more mates than one the loss is log 2 or more.
    only = mates.number == 1
    positive = torch.where(only, mates.first, rows)
    compared = compare(where, z, z, scale, positive=positive, excluded=rows, symmetric=True)
    of_many = compared.row_lse - scale * mates.mean_score(z)
    loss = torch.where(only, compared.row_loss, torch.where(mates.number > 0, of_many, 0))
    if reduction == "mean":
        loss, reduction = loss.sum() / (mates.number > 0).sum().clamp(min=1), "none"
    return reduce_and_cast(loss, reduction, features)


class _Mates(NamedTuple):
    """The other rows with a row's label, (N,) each."""

    of_row: Tensor  # the label's number: its first place in the order of all
    number: Tensor
    first: Tensor  # a mate, if there is one

    @classmethod
    def of(cls, labels: Tensor) -> _Mates:
        # torch.unique, whose result's size depends on the values, would break a graph that is
        # being compiled.
        labels = labels.long().contiguous()
        sorted_labels, order = labels.sort(stable=True)
        of_row = torch.searchsorted(sorted_labels, labels)
        number = torch.zeros_like(of_row).index_add(0, of_row, torch.ones_like(of_row))[of_row] - 1
        one, other = order[of_row], order[(of_row + 1).clamp(max=labels.shape[0] - 1)]
        rows = torch.arange(one.shape[0], device=one.device)
        return cls(of_row, number, torch.where(one == rows, other, one))

    def mean_score(self, z: Tensor) -> Tensor:
        """Each row's mean similarity to its mates, by sums over labels."""
        # In double: a sum less one of its terms cancels where that is the longest.
        wide = z.double() if z.device.type in ("cpu", "cuda") else z.to(real_dtype(z.dtype))
        others = _sum_of_label(wide, self.of_row) - wide
        score = (wide * others).sum(-1) / self.number.clamp(min=1)
        return score.to(real_dtype(z.dtype))


def _sum_of_label(wide: Tensor, of_row: Tensor) -> Tensor:
    """For each row the sum over its label's rows, and its derivative, in one order: on CUDA threads
    race in index_add, which is the backward of index_select too; on the CPU in that of indexing."""
    zeros = torch.zeros_like(wide)
    if wide.is_cuda:
        return zeros.index_put((of_row,), wide, accumulate=True)[of_row]
    return zeros.index_add(0, of_row, wide).index_select(0, of_row)
