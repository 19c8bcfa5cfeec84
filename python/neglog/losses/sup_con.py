"""Supervised contrastive loss."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog import route
from neglog.checks_of_pairs import check_comparison, check_groups
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._pairs import compare, embeddings, scale_of, workspace_of
from neglog.losses._positives import add_rows, mean_of, take_rows, widened
from neglog.losses._result import reduce_and_cast
from neglog.losses._types import Backend, Reduction, WorkspaceOptions
from neglog.ops.dtypes import real_dtype


def sup_con(
    features: Tensor, labels: Tensor | Sequence[Hashable] | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean", *, normalize: bool = True,
    options: WorkspaceOptions | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Supervised contrastive loss: -log p of a row's label mates, averaged over them.

    Args:
        features: (N, D), or (N, V, D): V views of each sample, which are rows of its label.
        labels: (N,) integers; or a list, tuple or array of N hashable values, such as names, or of
            tensors () of integers. A NaN is a label of its own. None, with (N, V, D): the other
            views of its sample are a row's mates.
        temperature: a number or a tensor (), which receives a gradient.
        reduction: a row without a mate has loss 0 and no share in the "mean", which is 0 if no row
            has one, as pytorch-metric-learning's SupConLoss has it. "none" gives (N,) or (N, V).
        normalize, options, backend: as in `info_nce`.

    Source: arXiv:2004.11362, its L_out; the views are those of the authors' SupContrast.
    """
    if any_distributed(features, labels, temperature):
        return on_whole_tensors(sup_con, locals())
    views, flat = None, features
    if isinstance(features, Tensor) and features.dim() == 3:
        views, flat = features.shape[1], features.flatten(0, 1)
    check_comparison(temperature, reduction, normalize, features=flat)
    labels = _integers(labels, features)
    z = embeddings(flat, normalize)
    where = route.choose(z, backend=backend, workspace=workspace_of(options))
    scale = scale_of(temperature, z)
    rows = torch.arange(z.shape[0], device=z.device)
    mates = _Mates.of(labels if views is None else labels.repeat_interleave(views))
    # A row's only mate is a positive, whose loss may be near 0 and then needs the score that its
    # log-sum-exp was made of. With more mates than one the loss is log 2 or more.
    only = mates.number == 1
    positive = torch.where(only, mates.first, rows)
    compared = compare(where, z, z, scale, positive=positive, excluded=rows, symmetric=True)
    of_many = compared.row_lse - scale * mates.mean_score(z)
    loss = torch.where(only, compared.row_loss, torch.where(mates.number > 0, of_many, 0))
    if reduction == "mean":
        loss, reduction = mean_of(loss, mates.number > 0), "none"
    elif views is not None:
        loss = loss.unflatten(0, features.shape[:2])
    return reduce_and_cast(loss, reduction, flat)


def _integers(labels: Any, features: Tensor) -> Tensor:
    """Labels as a tensor of integers, which are equal where the labels are."""
    if labels is None:
        if features.dim() != 3:
            raise TypeError(
                "labels: expected a Tensor or a sequence; None with features of shape (N, V, D) "
                f"alone, got None with {list(features.shape)}"
            )
        return torch.arange(features.shape[0], device=features.device)
    if not isinstance(labels, Tensor):
        labels = _numbers_of(labels, features)
    check_groups("labels", labels, features)
    return labels


def _numbers_of(labels: Any, features: Tensor) -> Tensor:
    """Of an array, a list or a tuple of values that can be compared with each other."""
    shape = getattr(labels, "shape", None)
    if shape is not None and len(shape) != 1:
        raise RuntimeError(f"labels: expected shape [{features.shape[0]}], got {list(shape)}")
    values: Iterable[Any] = labels.tolist() if hasattr(labels, "tolist") else labels
    if not isinstance(values, list | tuple):
        raise TypeError(
            "labels: expected a Tensor, or a list, tuple or array of hashable values, "
            f"got {type(labels).__name__}"
        )
    if values and all(isinstance(x, Tensor) and x.dim() == 0 for x in values):
        return torch.stack(list(values)).to(features.device)
    known: dict[Any, int] = {}
    try:
        numbers = [known.setdefault(_key(value), len(known)) for value in values]
    except TypeError as error:
        raise TypeError(
            f"labels: expected hashable values, or Tensors of shape [] alone, got one of {error}"
        ) from None
    return torch.tensor(numbers, dtype=torch.int64, device=features.device)


def _key(value: Any) -> Any:
    """What is equal where the labels are."""
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    if isinstance(value, Tensor):  # whose hash is that of the object, not of its numbers
        raise TypeError(f"a Tensor of shape {list(value.shape)}")
    if isinstance(value, float) and value != value:
        return object()  # a NaN is equal to none, not even to the same object
    return value


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
        # A sum less one of its terms cancels where that is the longest: in double.
        wide = widened(z)
        of_labels = add_rows(torch.zeros_like(wide), self.of_row, wide)
        others = take_rows(of_labels, self.of_row) - wide
        score = (wide * others).sum(-1) / self.number.clamp(min=1)
        return score.to(real_dtype(z.dtype))
