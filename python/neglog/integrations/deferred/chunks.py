"""Cross-entropy of logits that are a sum of products, such as a head with a low-rank adapter.

W x + s B (A x): to add the products of the weights would take memory (V, D), which the adapter is
there to avoid. So logits are made for some rows at a time, and made again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import neglog
from neglog.integrations.deferred.recipe import Recipe

CHUNK_BYTES = 64 * 2**20  # of logits at a time, as the tiles of linear_cross_entropy


def cross_entropy_by_chunks(
    recipe: Recipe, target: Tensor, loss_dtype: torch.dtype, *, reduction: str = "mean",
    weight: Tensor | None = None, ignore_index: int = -100, num_items: Any = None, **options: Any,
) -> Tensor:  # fmt: skip
    """The loss that neglog.cross_entropy gives of the logits."""
    hiddens = [_rows(p.rows_of_hidden(), recipe.class_dim) for p in recipe.products]
    weights = [p.weight for p in recipe.products]
    bias = recipe.total_bias()
    more = {"weight": weight, "ignore_index": ignore_index, "reduction": "none", **options}

    def losses(labels: Tensor, *rows: Tensor) -> Tensor:
        logits = _sum_of_products(recipe, rows, weights, bias)
        return neglog.cross_entropy(
            logits, labels, logit_scale=recipe.total_scale(), softcap=recipe.cap,
            inplace_backward=False, loss_dtype=loss_dtype, **more,
        )  # fmt: skip

    labels = target.reshape(-1)
    size = max(1, CHUNK_BYTES // (4 * recipe.classes))
    parts = [
        checkpoint(losses, *(x[i : i + size] for x in (labels, *hiddens)), use_reentrant=False)
        for i in range(0, max(1, len(labels)), size)
    ]
    each = torch.cat(parts)
    return _reduced(each, labels, target.shape, reduction, weight, ignore_index, num_items)


def _rows(hidden: Tensor, class_dim: int) -> Tensor:
    hidden = hidden.movedim(class_dim, -1)
    return hidden.reshape(-1, hidden.shape[-1])


def _sum_of_products(
    recipe: Recipe, rows: Any, weights: list[Tensor], bias: Tensor | None
) -> Tensor:
    total: Tensor | None = None
    for hidden, weight in zip(rows, weights, strict=True):
        product = torch.nn.functional.linear(hidden, weight)
        total = product if total is None else total + product
    assert total is not None
    return total if bias is None else total + bias


def _reduced(
    losses: Tensor, labels: Tensor, shape: torch.Size, reduction: str, weight: Tensor | None,
    ignore_index: int, num_items: Any,
) -> Tensor:  # fmt: skip
    if reduction == "none":
        return losses.view(shape)
    total = losses.sum()
    if num_items is not None:
        return total / num_items
    if reduction == "sum":
        return total
    counted = labels != ignore_index
    if weight is None:
        return total / counted.sum()
    return total / (weight[labels.clamp(min=0)] * counted).sum()
