"""Losses and parts of losses of a recipe: neglog's kernels, given hidden states and weights."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import neglog
from neglog.integrations.deferred.chunks import cross_entropy_by_chunks
from neglog.integrations.deferred.recipe import Recipe

DEFAULT_TILE_MB = 64  # linear_cross_entropy's own, on a CPU
# No label has this value, so that each row counts.
NO_LABEL = -(2**62)


def fits_loss(recipe: Recipe, logits: Tensor, target: Any, weight: Any) -> bool:
    """Whether labels are given and all has the shapes that torch.nn.functional asks for."""
    if recipe.class_dim != (1 if logits.dim() > 1 else 0) or not logits.dim():
        return False
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        return False
    shape = [n for d, n in enumerate(logits.shape) if d != recipe.class_dim]
    if list(target.shape) != shape or target.device != logits.device:
        return False
    if weight is None:
        return True
    if not isinstance(weight, Tensor) or weight.requires_grad or weight.dtype != logits.dtype:
        return False
    return weight.shape == (recipe.classes,) and weight.device == logits.device


def loss_of_labels(
    recipe: Recipe, logits: Tensor, target: Tensor, *, logit_scale: Any = 1.0,
    softcap: float | None = None, loss_dtype: torch.dtype | None = None, **options: Any,
) -> Tensor | None:  # fmt: skip
    """cross_entropy of logits (torch's shape) and target; None where the kernels have no such."""
    if softcap is not None or not (isinstance(logit_scale, float) and logit_scale == 1.0):
        if recipe.cap is not None or not isinstance(logit_scale, (int, float)):  # a cap of a cap
            return None
        recipe = recipe.but(scale=recipe.scale * logit_scale, cap=softcap)
    if not _multiplied_alike(recipe):
        return None
    if options.get("label_smoothing", 0.0) < 0:  # torch takes it for none
        return None
    recipe.check()
    loss_dtype = loss_dtype or _loss_dtype(logits)
    weight = options.get("weight")
    hidden = recipe.products[0].hidden
    if weight is not None and weight.dtype.itemsize > max(hidden.dtype.itemsize, 4):
        options["weight"] = weight.to(torch.float32)
    with _autocast(recipe, weight):
        if len(recipe.products) > 1:
            return cross_entropy_by_chunks(recipe, target, loss_dtype, **options)
        return _loss(recipe, target, loss_dtype, **options)


def _loss(recipe: Recipe, target: Tensor, loss_dtype: torch.dtype, **options: Any) -> Any:
    hidden, weight, bias = recipe.head()
    return neglog.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, logit_scale=recipe.total_scale(),
        softcap=recipe.cap, loss_dtype=loss_dtype, options=tile_options(hidden, weight), **options,
    )  # fmt: skip


def tile_options(hidden: Tensor, weight: Tensor) -> Any:
    """A tile of an eighth of the logits, or the default where that is less.

    1024 positions of 32000 tokens and width 64: a step's peak was 63 MB for 123 MB, its time 92 ms
    for 87; a Llama of width 256 took 272 ms for 265.
    """
    logits = hidden.numel() // max(1, hidden.shape[-1]) * weight.shape[0] * 4 / 2**20
    eighth = max(1.0, logits / 8)
    if hidden.is_cuda or os.environ.get("NEGLOG_WORKSPACE_MB") or eighth >= DEFAULT_TILE_MB:
        return None
    return {"workspace_mb": eighth}


def _loss_dtype(logits: Tensor) -> torch.dtype:
    """torch's: the logits' own, float32 of 16 bits under autocast."""
    kind = logits.device.type
    if logits.dtype.itemsize == 2 and torch.is_autocast_enabled(kind):
        return torch.float32
    return logits.dtype


def _autocast(recipe: Recipe, weight: Tensor | None = None) -> AbstractContextManager[Any]:
    """That of the forward: the product is formed as it was to be."""
    product = recipe.products[0]
    kind, dtype = product.hidden.device.type, product.hidden.dtype
    if weight is not None and dtype.itemsize == 2 and weight.dtype != dtype:
        return torch.autocast(kind, dtype=dtype)  # which allows class weights of their own dtype
    if product.autocast is None:
        enabled = torch.is_autocast_enabled(kind)
        return torch.autocast(kind, enabled=False) if enabled else nullcontext()
    return torch.autocast(kind, dtype=product.autocast)


def _multiplied_alike(recipe: Recipe) -> bool:
    """Whether all is of one dtype, or becomes so."""
    dtypes = {p.hidden.dtype for p in recipe.products} | {b.dtype for b in recipe.bias}
    return len(dtypes) == 1 or recipe.products[0].autocast is not None


# Parts of a loss. They share the log-sum-exp of the rows, which costs a pass over the weights.


def _stats(recipe: Recipe, logits: Tensor, target: Tensor) -> Any:
    recipe.check()
    with _autocast(recipe):
        return _loss(
            recipe, target, _part_dtype(logits), reduction="none", ignore_index=NO_LABEL,
            return_stats=True,
        )  # fmt: skip


def _part_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _serves_parts(recipe: Recipe, logits: Tensor) -> bool:
    return len(recipe.products) == 1 and _multiplied_alike(recipe) and logits.numel() > 0


def log_normalizer(recipe: Recipe, logits: Tensor) -> Tensor | None:
    """logsumexp over the classes: the logits' shape without them."""
    if not _serves_parts(recipe, logits):
        return None
    graph = torch.is_grad_enabled()
    found = recipe.memo.get(graph)
    if found is None:
        shape = [n for d, n in enumerate(logits.shape) if d != recipe.class_dim]
        zeros = torch.zeros(shape, dtype=torch.int64, device=logits.device)
        found = _stats(recipe, logits, zeros).logsumexp
        recipe.memo[graph] = found
    return found.to(logits.dtype)


def chosen(recipe: Recipe, logits: Tensor, index: Tensor) -> Tensor | None:
    """logits.gather(class_dim, index) for one class of each row. (..., 1, ...) as the index."""
    if not _serves_parts(recipe, logits):
        return None
    target = index.squeeze(recipe.class_dim)
    if recipe.log_factor is None:
        result = _logits_of(recipe, target)
    else:
        try:
            stats = _stats(recipe, logits, target)
        except IndexError:  # torch's gather has an error of its own
            return None
        recipe.memo[torch.is_grad_enabled()] = stats.logsumexp
        result = stats.loss * -recipe.log_factor
    return None if result is None else result.to(logits.dtype).unsqueeze(recipe.class_dim)


def _logits_of(recipe: Recipe, target: Tensor) -> Tensor | None:
    """One logit of each row: a product with rows of the weight."""
    if not target.is_cuda and not bool(((target >= 0) & (target < recipe.classes)).all()):
        return None
    recipe.check()
    hidden, weight, bias = recipe.head()
    product = recipe.products[0]
    rows = product.cast(weight)[target]
    logits = torch.linalg.vecdot(
        product.cast(hidden).to(torch.promote_types(rows.dtype, torch.float32)),
        rows.float() if rows.dtype.itemsize == 2 else rows,
    )
    if bias is not None:
        logits = logits + bias[target]
    logits = logits * recipe.total_scale()
    return logits if recipe.cap is None else torch.tanh(logits / recipe.cap) * recipe.cap


def sum_of_log_probabilities(recipe: Recipe, logits: Tensor) -> Tensor | None:
    """Over the classes. Logits that nothing caps add up to a product with the summed weight."""
    assert recipe.log_factor is not None
    if recipe.cap is not None or not _serves_parts(recipe, logits):
        return None
    normalizer = log_normalizer(recipe.but(log_factor=None, memo=recipe.memo), logits)
    if normalizer is None:
        return None
    hidden, weight, bias = recipe.head()
    product = recipe.products[0]
    dtype = _part_dtype(logits)
    total = product.cast(hidden).to(dtype) @ product.cast(weight).sum(0, dtype=dtype)
    if bias is not None:
        total = total + bias.sum(dtype=dtype)
    return (
        total * recipe.total_scale() - normalizer.to(dtype) * recipe.classes
    ) * recipe.log_factor
