"""SimCLR's loss of two views, and its decoupled form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from neglog import route
from neglog.checks_of_pairs import check_comparison, check_groups
from neglog.distributed.groups import Ranks
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._pairs import Columns, compare, dots, embeddings, scale_of, workspace_of
from neglog.losses._together import (
    arguments_of,
    check_exchange,
    meet,
    of_all,
    on_constants,
    own_columns,
    reduced,
)
from neglog.losses._types import Backend, Exchange, Reduction, WorkspaceOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def nt_xent(
    z_i: Tensor, z_j: Tensor, temperature: float | Tensor = 0.5, reduction: Reduction = "mean", *,
    normalize: bool = True, exclude: Tensor | None = None, group: ProcessGroup | None = None,
    exchange: Exchange = "gather", options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """SimCLR's loss: each of the 2N views against its other view, among all but itself.

    Args:
        z_i, z_j: (N, D), two views of the same N things.
        temperature: a number or a tensor (), which receives a gradient.
        reduction: "none" gives (2N,), those of z_i first.
        exclude: (N,) integers: views of things with the same one are no negatives of each other.
        group, exchange: a torch.distributed process group: among the views of all processes. As in
            `clip_loss`.
        normalize, options, backend: as in `info_nce`.

    The matrix of similarities is symmetric: half of it is computed, without `group`.

    Source: arXiv:2002.05709; NTXentLoss of pytorch-metric-learning and of lightly.
    """
    if any_distributed(z_i, z_j, temperature, exclude):
        return on_whole_tensors(nt_xent, locals())
    given = (z_i, z_j, temperature, reduction, normalize, exclude)
    _check(*given, group, exchange)
    if group is not None and exchange == "detached":
        return _on_constants(nt_xent, group, arguments_of(nt_xent, locals()))
    views = _two_views("nt_xent", *given, group, exchange, options, backend)
    z, ranks = views.z, views.ranks
    rows = own_columns(z, ranks)
    own = None if exclude is None else exclude.long().repeat(2)
    compared = compare(
        views.where, z, z, scale_of(temperature, z), positive=rows.roll(z_i.shape[0]),
        excluded=rows, query_group=own, key_group=of_all(own, ranks), symmetric=True,
        over=views.over,
    )  # fmt: skip
    return reduced(compared.row_loss, reduction, z_i, ranks)


def dcl(
    z_i: Tensor, z_j: Tensor, temperature: float | Tensor = 0.1, reduction: Reduction = "mean", *,
    normalize: bool = True, exclude: Tensor | None = None, group: ProcessGroup | None = None,
    exchange: Exchange = "gather", options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """`nt_xent` decoupled: the positive is not among what it is held against.

    Arguments as `nt_xent`. The loss may be below 0.

    Source: arXiv:2110.06848.
    """
    if any_distributed(z_i, z_j, temperature, exclude):
        return on_whole_tensors(dcl, locals())
    given = (z_i, z_j, temperature, reduction, normalize, exclude)
    _check(*given, group, exchange)
    if group is not None and exchange == "detached":
        return _on_constants(dcl, group, arguments_of(dcl, locals()))
    views = _two_views("dcl", *given, group, exchange, options, backend)
    z, ranks = views.z, views.ranks
    scale = scale_of(temperature, z)
    score = dots(z, z.roll(z_i.shape[0], 0)) * scale
    things = exclude
    if things is None:
        first = 0 if ranks is None else ranks.first // 2
        things = torch.arange(z_i.shape[0], device=z.device) + first
    own = things.long().repeat(2)
    compared = compare(
        views.where, z, z, scale, query_group=own, key_group=of_all(own, ranks), symmetric=True,
        over=views.over,
    )  # fmt: skip
    return reduced(compared.row_lse - score, reduction, z_i, ranks)


def _check(
    z_i: Tensor, z_j: Tensor, temperature: float | Tensor, reduction: str, normalize: bool,
    exclude: Tensor | None, group: Any, exchange: str,
) -> None:  # fmt: skip
    check_comparison(temperature, reduction, normalize, z_i=z_i, z_j=z_j)
    if exclude is not None:
        check_groups("exclude", exclude, z_i)
    check_exchange(group, exchange)


class _Views(NamedTuple):
    """Both views as one (2N, D), where they are compared, and with whose."""

    where: route.Route
    z: Tensor
    over: Columns | None

    @property
    def ranks(self) -> Ranks | None:
        return None if self.over is None else self.over.ranks


def _two_views(
    call: str, z_i: Tensor, z_j: Tensor, temperature: float | Tensor, reduction: str,
    normalize: bool, exclude: Tensor | None, group: Any, exchange: str,
    options: WorkspaceOptions | None, backend: str | None,
) -> _Views:  # fmt: skip
    z = embeddings(torch.cat([z_i, z_j]), normalize)
    where = route.choose(z, backend=backend, workspace=workspace_of(options))
    together = meet(
        call, group, exchange, where, z, learned=(temperature,), temperature=temperature,
        reduction=reduction, normalize=normalize, exclude=exclude is not None,
    )  # fmt: skip
    return _Views(where, z, None if together is None else Columns(together.keys, exchange))


def _on_constants(function: Callable[..., Tensor], group: Any, arguments: Any) -> Tensor:
    """Of losses that are not reduced, this process's: those of its z_i, and then of its z_j."""
    found: Tensor = on_constants(
        partial(_by_thing, function), group, arguments, ("z_i", "z_j", "exclude"), "z_i"
    )
    return found.t().flatten() if found.dim() else found


def _by_thing(function: Callable[..., Tensor], **arguments: Any) -> Tensor:
    """Losses that are not reduced as (N, 2)."""
    loss = function(**arguments)
    return loss.view(2, -1).t() if loss.dim() else loss
