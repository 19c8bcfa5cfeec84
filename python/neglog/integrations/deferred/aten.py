"""The operations on logits that are understood without their numbers, by torch's own names of them.

Each takes the recipe of the logits, the metadata of the result and the operation's arguments; it
gives the recipe of the result, or None where that is none, and the logits are made. All that torch
offers (methods, functions, operators, indexing) comes down to these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from neglog.integrations.deferred.recipe import Recipe, Rows

aten = torch.ops.aten
Handler = Callable[..., "Recipe | list[Recipe] | None"]
HANDLERS: dict[Any, Handler] = {}
F = TypeVar("F", bound=Handler)


def understands(*functions: Any) -> Callable[[F], F]:
    def register(handler: F) -> F:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _axis(dim: int, dims: int) -> int:
    return dim + dims if dim < 0 else dim


# Views and copies: the same is done to the hidden states.


@understands(aten.alias.default, aten.detach.default, aten.clone.default)
def _same(recipe: Recipe, old: Tensor, new: Tensor, **more: Any) -> Recipe:
    return recipe


@understands(aten._to_copy.default)
def _cast(recipe: Recipe, old: Tensor, new: Tensor, *, device: Any = None, **more: Any) -> Any:
    """To a wider dtype, or the same. A narrower one rounds the logits."""
    exact = new.dtype.is_floating_point
    exact = exact and torch.finfo(new.dtype).eps <= torch.finfo(old.dtype).eps
    here = device is None or torch.device(device) == recipe.products[0].hidden.device
    return recipe if exact and here else None


@understands(aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default)
def _view(recipe: Recipe, old: Tensor, new: Tensor, *shape: Any) -> Recipe | None:
    """Whose shape holds the classes as a dimension of their own, at the same place."""
    c = recipe.class_dim
    before, after = math.prod(old.shape[:c]), math.prod(old.shape[c + 1 :])
    for axis, size in enumerate(new.shape):
        if size != old.shape[c] or math.prod(new.shape[:axis]) != before:
            continue
        if math.prod(new.shape[axis + 1 :]) == after:
            return recipe.viewed(axis, _reshape(new.shape[:axis], c, new.shape[axis + 1 :]))
    return None


def _reshape(first: Any, class_dim: int, last: Any) -> Rows:
    return lambda x: x.reshape(*first, x.shape[class_dim], *last)


@understands(aten.expand.default)
def _expand(recipe: Recipe, old: Tensor, new: Tensor, size: Any, **more: Any) -> Recipe:
    there = recipe.class_dim + new.dim() - old.dim()
    first, last = new.shape[:there], new.shape[there + 1 :]
    return recipe.viewed(there, lambda x: x.expand(*first, x.shape[recipe.class_dim], *last))


@understands(aten.permute.default)
def _permute(recipe: Recipe, old: Tensor, new: Tensor, dims: Any) -> Recipe:
    dims = [_axis(d, old.dim()) for d in dims]
    return recipe.viewed(dims.index(recipe.class_dim), lambda x: x.permute(dims))


@understands(aten.transpose.int)
def _transpose(recipe: Recipe, old: Tensor, new: Tensor, first: int, second: int) -> Recipe:
    dims = list(range(old.dim()))
    a, b = _axis(first, old.dim()), _axis(second, old.dim())
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(recipe, old, new, dims)


@understands(aten.t.default)
def _t(recipe: Recipe, old: Tensor, new: Tensor) -> Recipe:
    return _permute(recipe, old, new, list(range(old.dim()))[::-1])


@understands(aten.unsqueeze.default)
def _unsqueeze(recipe: Recipe, old: Tensor, new: Tensor, dim: int) -> Recipe:
    dim = _axis(dim, new.dim())
    return recipe.viewed(recipe.class_dim + (dim <= recipe.class_dim), lambda x: x.unsqueeze(dim))


@understands(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(recipe: Recipe, old: Tensor, new: Tensor, dims: Any = None) -> Recipe | None:
    if dims is None:
        dims = range(old.dim())
    elif isinstance(dims, int):
        dims = [dims]
    gone = [d for d in (_axis(d, old.dim()) for d in dims) if old.shape[d] == 1]
    if recipe.class_dim in gone:
        return None
    there = recipe.class_dim - sum(d < recipe.class_dim for d in gone)
    return recipe.viewed(there, lambda x: x.squeeze(gone))


@understands(aten.slice.Tensor)
def _slice(
    recipe: Recipe, old: Tensor, new: Tensor, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> Recipe | None:  # fmt: skip
    dim = _axis(dim, old.dim())
    if dim == recipe.class_dim:
        return recipe if new.shape == old.shape else None
    return recipe.viewed(recipe.class_dim, lambda x: aten.slice.Tensor(x, dim, start, end, step))


@understands(aten.select.int)
def _select(recipe: Recipe, old: Tensor, new: Tensor, dim: int, index: int) -> Recipe | None:
    dim = _axis(dim, old.dim())
    if dim == recipe.class_dim:
        return None
    there = recipe.class_dim - (dim < recipe.class_dim)
    return recipe.viewed(there, _selected(dim, index))


def _selected(dim: int, index: int) -> Rows:
    return lambda x: x.select(dim, index)


@understands(aten.index_select.default)
def _index_select(recipe: Recipe, old: Tensor, new: Tensor, dim: int, index: Tensor) -> Any:
    dim = _axis(dim, old.dim())
    if dim == recipe.class_dim or not _within(recipe, old, lambda x: x.index_select(dim, index)):
        return None
    return recipe.viewed(recipe.class_dim, lambda x: x.index_select(dim, index))


@understands(aten.index.Tensor)
def _index(recipe: Recipe, old: Tensor, new: Tensor, indices: list[Tensor | None]) -> Any:
    """By tensors of integers, none of them for the classes."""
    given = [d for d, index in enumerate(indices) if index is not None]
    if recipe.class_dim in given:
        return None
    # Where the indexed dimensions are no neighbours, theirs come first in the result.
    first = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    broadcast = new.dim() - (old.dim() - len(given))
    kept = [d for d in range(old.dim()) if d not in given]
    place = kept.index(recipe.class_dim)
    ahead = sum(d < first for d in kept) if first else 0
    there = place if place < ahead else place + broadcast
    if not _within(recipe, old, lambda x: aten.index.Tensor(x, indices)):
        return None
    return recipe.viewed(there, lambda x: aten.index.Tensor(x, indices))


def _within(recipe: Recipe, old: Tensor, rows: Rows) -> bool:
    """Whether no index is out of bounds: of that torch complains now, not at the loss."""
    shape = [1 if d == recipe.class_dim else n for d, n in enumerate(old.shape)]
    if recipe.products[0].hidden.is_cuda:  # there it complains when it comes to it
        return True
    try:
        rows(torch.empty((), dtype=torch.bool).expand(shape))
    except (IndexError, RuntimeError):
        return False
    return True


def _taken(dim: int, start: int, end: int) -> Rows:
    return lambda x: aten.slice.Tensor(x, dim, start, end)


@understands(aten.unbind.int)
def _unbind(recipe: Recipe, old: Tensor, new: Any, dim: int = 0) -> Any:
    dim = _axis(dim, old.dim())
    if dim == recipe.class_dim:
        return None
    there = recipe.class_dim - (dim < recipe.class_dim)
    return [recipe.viewed(there, _selected(dim, i)) for i in range(len(new))]


@understands(aten.split.Tensor, aten.split_with_sizes.default)
def _split(recipe: Recipe, old: Tensor, new: Any, sizes: Any, dim: int = 0) -> Any:
    dim = _axis(dim, old.dim())
    if dim == recipe.class_dim:
        return None
    starts = [0]
    for part in new:
        starts.append(starts[-1] + part.shape[dim])
    return [
        recipe.viewed(recipe.class_dim, _taken(dim, *ends)) for ends in itertools.pairwise(starts)
    ]


# Arithmetic


def _number(x: Any) -> float | Tensor | None:
    """A factor: a float, or a tensor of one element that has a gradient or lies on a device."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if not isinstance(x, Tensor) or x.numel() != 1 or x.dim() > 1 or not x.is_floating_point():
        return None
    if type(x) not in (Tensor, torch.nn.Parameter):
        return None
    if x.is_cpu and not x.requires_grad:
        return float(x)
    return x


def _times(recipe: Recipe, factor: float | Tensor | None, divided: bool = False) -> Recipe | None:
    if factor is None:
        return None
    if isinstance(factor, Tensor):
        return _times_tensor(recipe, factor, divided)
    if factor == 0 or not math.isfinite(factor):
        return None
    factor = 1 / factor if divided else factor
    if recipe.log_factor is not None:
        return recipe.but(log_factor=recipe.log_factor * factor, memo=recipe.memo)
    if recipe.cap is None:
        return recipe.but(scale=recipe.scale * factor)
    if factor < 0:
        return None
    # factor * cap * tanh(scale / cap * x)
    return recipe.but(cap=recipe.cap * factor, scale=recipe.scale * factor)


def _times_tensor(recipe: Recipe, factor: Tensor, divided: bool) -> Recipe | None:
    """By a number that is not known here, or that is to get a gradient."""
    if recipe.log_factor is not None or recipe.cap is not None or recipe.scales:
        return None
    given = recipe.given_also("a factor", factor)
    return recipe.but(scales=((factor, divided),), given=given)


@understands(aten.mul.Tensor, aten.mul.Scalar)
def _mul(recipe: Recipe, old: Tensor, new: Tensor, other: Any) -> Recipe | None:
    return _times(recipe, _number(other)) if new.shape == old.shape else None


@understands(aten.div.Tensor, aten.div.Scalar)
def _div(recipe: Recipe, old: Tensor, new: Tensor, other: Any) -> Recipe | None:
    divisor = _number(other)
    return _times(recipe, divisor, divided=True) if new.shape == old.shape else None


@understands(aten.neg.default)
def _neg(recipe: Recipe, old: Tensor, new: Tensor) -> Recipe | None:
    return _times(recipe, -1.0)


@understands(aten.tanh.default)
def _tanh(recipe: Recipe, old: Tensor, new: Tensor) -> Recipe | None:
    if recipe.cap is not None or recipe.log_factor is not None:
        return None
    return recipe.but(cap=1.0)


@understands(aten.add.Tensor)
def _add(recipe: Recipe, old: Tensor, new: Tensor, other: Any, alpha: Any = 1) -> Recipe | None:
    """A bias, or the other product of a low-rank adapter."""
    if alpha != 1 or not recipe.plain or recipe.log_factor is not None:
        return None
    if isinstance(other, Recipe):
        return _sum(recipe, other) if new.shape == old.shape else None
    if not isinstance(other, Tensor) or not other.is_floating_point():
        return None
    classes = old.shape[recipe.class_dim]
    of_classes = other.dim() - (old.dim() - recipe.class_dim)  # where `other` has the classes
    fits = of_classes >= 0 and other.dim() <= old.dim() and other.shape[of_classes] == classes
    if not fits or other.numel() != classes:
        return None
    return recipe.but(bias=(*recipe.bias, other), given=recipe.given_also("a bias", other))


def _sum(recipe: Recipe, other: Recipe) -> Recipe | None:
    alike = other.class_dim == recipe.class_dim and other.classes == recipe.classes
    linear = isinstance(other.scale, float) and other.cap is None and other.log_factor is None
    if not alike or not linear or (other.bias and other.scale != 1.0):
        return None
    scale = float(other.scale)
    products = tuple(replace(p, factor=p.factor * scale) for p in other.products)
    return recipe.but(products=(*recipe.products, *products), bias=(*recipe.bias, *other.bias))


@understands(aten._log_softmax.default)
def _log_softmax(recipe: Recipe, old: Tensor, new: Tensor, dim: int, to_float: bool) -> Any:
    if _axis(dim, old.dim()) != recipe.class_dim or recipe.log_factor is not None:
        return None
    return recipe.but(log_factor=1.0)
