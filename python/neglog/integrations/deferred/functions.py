"""What torch's functions of logits become where the logits are not made.

Each override has the arguments of the function it stands for, and returns NotImplemented where that
has to be asked after all, of real logits. It is called where functions of logits do not come here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog import torch_state
from neglog.integrations.deferred.head import linked
from neglog.integrations.deferred.losses import (
    chosen,
    fits_loss,
    log_normalizer,
    loss_of_labels,
    sum_of_log_probabilities,
)
from neglog.integrations.deferred.recipe import Recipe
from neglog.integrations.deferred.state import asked_by
from neglog.integrations.deferred.tensor import OVERRIDES, DeferredLogits, Override, as_read


def overrides(*functions: Any) -> Callable[[Override], Override]:
    def register(override: Override) -> Override:
        OVERRIDES.update(dict.fromkeys(functions, override))
        return override

    return register


def recipe_of(logits: Any) -> Recipe | None:
    """That of logits which are not made, for a result with the graph of the logits."""
    if not isinstance(logits, DeferredLogits):
        return None
    state = logits._state
    if state.recipe is None or state.family.written or state.roots_made():
        return None
    if torch_state.transforming() or torch.is_inference_mode_enabled():
        return None
    if not logits.requires_grad:
        return state.recipe.detached()
    return None if _severed(logits) else state.recipe


def _severed(logits: Any) -> bool:
    """Whether the graph of the logits does not lead to what the recipe leads to."""
    if logits.requires_grad and logits.is_leaf:  # made one: the gradient is to end there
        return True
    if logits._state.cut and not _of_ddp(logits):
        return True
    return any(_severed(parent) for parent in logits._state.parents)


def _of_ddp(logits: Tensor) -> bool:
    """Whether DistributedDataParallel cloned it, in a node that passes gradients on."""
    node = logits.grad_fn
    return node is not None and type(node).__name__ == "_DDPSinkBackward"


def _count(recipe: Recipe, name: str) -> None:
    for report in {id(p.report): p.report for p in recipe.products}.values():
        report.fused[name] += 1


# Losses


@overrides(F.cross_entropy)
def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    recipe = recipe_of(input)
    if recipe is None or size_average is not None or reduce is not None:
        return NotImplemented
    if recipe.log_factor is not None or not fits_loss(recipe, input, target, weight):
        return NotImplemented
    options: dict[str, Any] = {
        "weight": weight, "ignore_index": ignore_index, "reduction": reduction,
        "label_smoothing": label_smoothing,
    }  # fmt: skip
    loss = loss_of_labels(recipe, input, target, **options)
    if loss is None:
        return NotImplemented
    _count(recipe, "cross_entropy")
    return linked(loss, input, lambda x: F.cross_entropy(x, target, **options))


@overrides(neglog.cross_entropy)
def _own_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
    label_smoothing: float = 0.0, *, return_stats: bool = False, inplace_backward: bool = False,
    **more: Any,
) -> Any:  # fmt: skip
    given: tuple[Any, ...] = (size_average, ignore_index, reduce, reduction, label_smoothing)

    def plain(logits: Tensor) -> Any:
        return neglog.cross_entropy(logits, target, weight, *given, **more)

    def real() -> Any:
        read = as_read((input, target, weight))
        return neglog.cross_entropy(*read, *given, return_stats=return_stats, **more)

    recipe = recipe_of(input)
    if recipe is None or size_average is not None or reduce is not None or return_stats:
        return real()
    if recipe.log_factor is not None or not fits_loss(recipe, input, target, weight):
        return real()
    loss = loss_of_labels(
        recipe, input, target, weight=weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, **more,
    )  # fmt: skip
    if loss is None:
        return real()
    _count(recipe, "cross_entropy")
    return linked(loss, input, plain)


@overrides(F.nll_loss)
def _nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
) -> Any:  # fmt: skip
    recipe = recipe_of(input)
    if recipe is None or size_average is not None or reduce is not None:
        return NotImplemented
    if recipe.log_factor is None or not fits_loss(recipe, input, target, weight):
        return NotImplemented
    options: dict[str, Any] = {
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    loss = loss_of_labels(recipe, input, target, **options)
    if loss is None:
        return NotImplemented
    _count(recipe, "nll_loss")
    loss = loss if recipe.log_factor == 1.0 else loss * recipe.log_factor
    return linked(loss, input, lambda x: F.nll_loss(x, target, **options))


# Parts of a loss


@overrides(torch.gather, Tensor.gather)
def _gather(
    input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False, out: Tensor | None = None
) -> Any:  # fmt: skip
    recipe = recipe_of(input)
    if recipe is None or out is not None or not _one_of_each(recipe, input, dim, index):
        return NotImplemented
    result = chosen(recipe, input, index)
    if result is None:
        return NotImplemented
    _count(recipe, "gather")
    return linked(result, input, lambda x: torch.gather(x, dim, index))


def _one_of_each(recipe: Recipe, input: Tensor, dim: Any, index: Any) -> bool:
    """Whether one class of each row is asked for."""
    if not isinstance(dim, int) or not -input.dim() <= dim < input.dim():
        return False
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.device != input.device:
        return False
    expected = list(input.shape)
    expected[dim] = 1
    return dim % input.dim() == recipe.class_dim and list(index.shape) == expected


@overrides(torch.logsumexp, Tensor.logsumexp)
def _logsumexp(input: Tensor, dim: Any, keepdim: bool = False, *, out: Any = None) -> Any:
    recipe = recipe_of(input)
    if recipe is None or out is not None or not _of_classes(recipe, input, dim):
        return NotImplemented
    if recipe.log_factor is not None or not input.numel():
        return NotImplemented
    result = log_normalizer(recipe, input)
    if result is None:
        return NotImplemented
    _count(recipe, "logsumexp")
    result = result.unsqueeze(recipe.class_dim) if keepdim else result
    return linked(result, input, lambda x: torch.logsumexp(x, dim, keepdim))


def _of_classes(recipe: Recipe, input: Tensor, dim: Any) -> bool:
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
    if isinstance(dim, bool) or not isinstance(dim, int):
        return False
    return -input.dim() <= dim < input.dim() and dim % input.dim() == recipe.class_dim


@overrides(torch.sum, Tensor.sum)
def _sum(
    input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
) -> Any:  # fmt: skip
    """Over the classes, of log-probabilities: as label smoothing asks for."""
    recipe = recipe_of(input)
    if recipe is None or out is not None or not _of_classes(recipe, input, dim):
        return NotImplemented
    result = sum_of_log_probabilities(recipe, input) if recipe.log_factor is not None else None
    if result is None or (dtype is not None and not dtype.is_floating_point):
        return NotImplemented
    _count(recipe, "sum of log-probabilities")
    result = result.to(dtype or input.dtype)
    result = result.unsqueeze(recipe.class_dim) if keepdim else result
    return linked(result, input, lambda x: torch.sum(x, dim, keepdim, dtype=dtype))


# What is below dispatch, or asks what class it is


@overrides(torch.autograd.grad)
def _grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    with _captured(inputs):
        return torch.autograd.grad(outputs, inputs, *args, **kwargs)


@contextmanager
def _captured(inputs: Any) -> Iterator[None]:
    """A fused loss then leaves its gradient at these logits."""
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    states = [x._state for x in inputs if isinstance(x, DeferredLogits)]
    before = [state.captured for state in states]
    for state in states:
        state.captured = True
    try:
        yield
    finally:
        for state, value in zip(states, before, strict=True):
            state.captured = value


@overrides(torch.detach, Tensor.detach)
def _detach(input: Tensor) -> Any:
    """Who detaches logits means to read them, perhaps after the weight has changed."""
    with asked_by("detach"):
        detached = torch.detach(input)
        if isinstance(detached, DeferredLogits):
            detached._state.numbers()
        return detached


DATA: Any = Tensor.data


@overrides(DATA.__set__)
def _set_data(input: Any, value: Tensor) -> Any:
    if not isinstance(input, DeferredLogits):
        return NotImplemented
    state = input._state
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (input.shape, input.dtype):
        raise RuntimeError(
            f"logits.data: expected a tensor {list(input.shape)} of {input.dtype}, as the logits "
            "of a deferred head are"
        )
    state.family.before_write()
    state.made = as_read(value).detach()
    return None


READS = (
    "__repr__", "__format__", "__deepcopy__", "__reduce_ex__", "as_subclass", "tolist", "type",
    "is_set_to", "to_sparse", "to_sparse_coo", "is_pinned", "is_shared", "pin_memory",
)  # fmt: skip
# These give away the memory: who has it may write to it.
MEMORY = (
    "numpy", "__array__", "data_ptr", "untyped_storage", "storage", "storage_type",
    "_typed_storage", "__dlpack__", "__dlpack_device__", "share_memory_", "apply_", "map_", "map2_",
)  # fmt: skip


def _read(function: Any, memory: bool) -> Override:
    def read(*args: Any, **kwargs: Any) -> Any:
        if memory and isinstance(args[0], DeferredLogits):
            args[0]._state.family.before_write()
        return function(*as_read(args), **as_read(kwargs))

    return read


OVERRIDES.update(
    {
        getattr(Tensor, name): _read(getattr(Tensor, name), memory)
        for names, memory in ((READS, False), (MEMORY, True))
        for name in names
    }
)
