"""Supervised contrastive loss."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neglog import route
from neglog.checks_of_pairs import check_comparison, check_groups
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._pairs import Columns, compare, embeddings, scale_of, workspace_of
from neglog.losses._positives import OfIds, widened
from neglog.losses._result import reduce_and_cast
from neglog.losses._together import (
    arguments_of,
    check_exchange,
    mean_of,
    meet,
    of_all,
    on_constants,
    own_columns,
    reduced,
)
from neglog.losses._types import Backend, Exchange, Reduction, WorkspaceOptions
from neglog.ops.dtypes import real_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sup_con(
    features: Tensor, labels: Tensor | Sequence[Hashable] | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean", *, normalize: bool = True,
    group: ProcessGroup | None = None, exchange: Exchange = "gather",
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
        group, exchange: a torch.distributed process group: among the features of all processes, as
            in `clip_loss`. Labels are then integers, of one meaning in all of them.
        normalize, options, backend: as in `info_nce`.

    Source: arXiv:2004.11362, its L_out; the views are those of the authors' SupContrast.
    """
    if any_distributed(features, labels, temperature):
        return on_whole_tensors(sup_con, locals())
    views, flat, numbered = None, features, labels is None
    if isinstance(features, Tensor) and features.dim() == 3:
        views, flat = features.shape[1], features.flatten(0, 1)
    check_comparison(temperature, reduction, normalize, features=flat)
    check_exchange(group, exchange)
    if group is not None:
        _check_labels_of_all(labels)
    labels = _integers(labels, features)
    if group is not None and exchange == "detached":
        return _on_constants(group, features, labels, locals())
    z = embeddings(flat, normalize)
    where = route.choose(z, backend=backend, workspace=workspace_of(options))
    scale = scale_of(temperature, z)
    together = meet(
        "sup_con", group, exchange, where, z, learned=(temperature,), temperature=temperature,
        reduction=reduction, normalize=normalize, views=views or 1,
    )  # fmt: skip
    over = None if together is None else Columns(together.keys, exchange)
    ranks = None if over is None else over.ranks
    ids = labels if views is None else labels.repeat_interleave(views)
    if numbered and ranks is not None:  # the samples of all processes
        ids = ids + ranks.first // (views or 1)
    rows = own_columns(z, ranks)
    mates = _Mates(ids, rows, over)
    # A row's only mate is a positive, whose loss may be near 0 and then needs the score that its
    # log-sum-exp was made of. With more mates than one the loss is log 2 or more.
    only = mates.number == 1
    positive = torch.where(only, mates.first, rows)
    compared = compare(
        where, z, z, scale, positive=positive, excluded=rows, symmetric=True, over=over
    )
    of_many = compared.row_lse - scale * mates.mean_score(z)
    loss = torch.where(only, compared.row_loss, torch.where(mates.number > 0, of_many, 0))
    if reduction == "mean":
        loss, reduction = mean_of(loss, mates.number > 0, together), "none"
    elif reduction == "sum":
        return reduced(loss, reduction, flat, ranks)
    elif views is not None:
        loss = loss.unflatten(0, features.shape[:2])
    return reduce_and_cast(loss, reduction, flat)


def _check_labels_of_all(labels: Any) -> None:
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(
            "labels: expected a Tensor of integers with group, of one meaning in all processes, "
            f"got {type(labels).__name__}"
        )


def _on_constants(
    group: Any, features: Tensor, labels: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """labels of samples that have no other are their numbers, which begin anew in each process."""
    given = arguments_of(sup_con, arguments)
    given["labels"] = None if arguments["numbered"] else labels
    found: Tensor = on_constants(sup_con, group, given, ("features", "labels"), "features")
    return found


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
    """The other rows with a row's label, (N,) each: number; first, the column of a mate if there is
    one. rows: the columns of this process's among those of all."""

    def __init__(self, labels: Tensor, rows: Tensor, over: Columns | None) -> None:
        ranks = None if over is None else over.ranks
        of_all_rows = of_all(labels, ranks)
        assert of_all_rows is not None
        self.and_itself = same = OfIds(labels, of_all_rows, over)
        self.number = same.number - 1
        following = same.order[(same.place + 1).clamp(max=of_all_rows.shape[0] - 1)]
        self.first = torch.where(same.first == rows, following, same.first)

    def mean_score(self, z: Tensor) -> Tensor:
        """Each row's mean similarity to its mates, by sums over labels."""
        # A sum less one of its terms cancels where that is the longest: in double.
        wide = widened(z)
        others = self.and_itself.sums(z) - wide
        score = (wide * others).sum(-1) / self.number.clamp(min=1)
        return score.to(real_dtype(z.dtype))
