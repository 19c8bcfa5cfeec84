"""Supervised contrastive loss."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from neglog import route
from neglog.checks_of_pairs import check_comparison, check_groups
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._pairs import compare, embeddings, scale_of, workspace_of
from neglog.losses._positives import OfIds, mean_of, widened
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
    mates = _Mates(labels if views is None else labels.repeat_interleave(views))
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


class _Mates:
    """The other rows with a row's label, (N,) each: number; first, a mate if there is one."""

    def __init__(self, labels: Tensor) -> None:
        self.and_itself = same = OfIds(labels, labels)
        self.number = same.number - 1
        following = same.order[(same.place + 1).clamp(max=labels.shape[0] - 1)]
        rows = torch.arange(labels.shape[0], device=labels.device)
        self.first = torch.where(same.first == rows, following, same.first)

    def mean_score(self, z: Tensor) -> Tensor:
        """Each row's mean similarity to its mates, by sums over labels."""
        # A sum less one of its terms cancels where that is the longest: in double.
        wide = widened(z)
        others = self.and_itself.sums(wide) - wide
        score = (wide * others).sum(-1) / self.number.clamp(min=1)
        return score.to(real_dtype(z.dtype))
