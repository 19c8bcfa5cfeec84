"""SimCLR's loss of two views, and its decoupled form."""

from __future__ import annotations

import torch
from torch import Tensor

from neglog import route
from neglog.checks_of_pairs import check_comparison, check_groups
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._pairs import compare, dots, embeddings, scale_of, workspace_of
from neglog.losses._result import reduce_and_cast
from neglog.losses._types import Backend, Reduction, WorkspaceOptions


def nt_xent(
    z_i: Tensor, z_j: Tensor, temperature: float | Tensor = 0.5, reduction: Reduction = "mean", *,
    normalize: bool = True, exclude: Tensor | None = None,
    options: WorkspaceOptions | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """SimCLR's loss: each of the 2N views against its other view, among all but itself.

    Args:
        z_i, z_j: (N, D), two views of the same N things.
        temperature: a number or a tensor (), which receives a gradient.
        reduction: "none" gives (2N,), those of z_i first.
        exclude: (N,) integers: views of things with the same one are no negatives of each other.
        normalize, options, backend: as in `info_nce`.

    The matrix of similarities is symmetric: half of it is computed.

    Source: arXiv:2002.05709; NTXentLoss of pytorch-metric-learning and of lightly.
    """
    if any_distributed(z_i, z_j, temperature, exclude):
        return on_whole_tensors(nt_xent, locals())
    where, z = _two_views(z_i, z_j, temperature, reduction, normalize, exclude, options, backend)
    rows = torch.arange(z.shape[0], device=z.device)
    positive = rows.roll(z_i.shape[0])
    group = None if exclude is None else exclude.long().repeat(2)
    compared = compare(
        where, z, z, scale_of(temperature, z), positive=positive, excluded=rows, query_group=group,
        key_group=group, symmetric=True,
    )  # fmt: skip
    return reduce_and_cast(compared.row_loss, reduction, z_i)


def dcl(
    z_i: Tensor, z_j: Tensor, temperature: float | Tensor = 0.1, reduction: Reduction = "mean", *,
    normalize: bool = True, exclude: Tensor | None = None,
    options: WorkspaceOptions | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """`nt_xent` decoupled: the positive is not among what it is held against.

    Arguments as `nt_xent`. The loss may be below 0.

    Source: arXiv:2110.06848.
    """
    if any_distributed(z_i, z_j, temperature, exclude):
        return on_whole_tensors(dcl, locals())
    where, z = _two_views(z_i, z_j, temperature, reduction, normalize, exclude, options, backend)
    scale = scale_of(temperature, z)
    score = dots(z, z.roll(z_i.shape[0], 0)) * scale
    things = torch.arange(z_i.shape[0], device=z.device) if exclude is None else exclude.long()
    group = things.repeat(2)
    compared = compare(where, z, z, scale, query_group=group, key_group=group, symmetric=True)
    return reduce_and_cast(compared.row_lse - score, reduction, z_i)


def _two_views(
    z_i: Tensor, z_j: Tensor, temperature: float | Tensor, reduction: str, normalize: bool,
    exclude: Tensor | None, options: WorkspaceOptions | None, backend: str | None,
) -> tuple[route.Route, Tensor]:  # fmt: skip
    """Where to compare, and both views as one (2N, D)."""
    check_comparison(temperature, reduction, normalize, z_i=z_i, z_j=z_j)
    if exclude is not None:
        check_groups("exclude", exclude, z_i)
    z = embeddings(torch.cat([z_i, z_j]), normalize)
    return route.choose(z, backend=backend, workspace=workspace_of(options)), z
