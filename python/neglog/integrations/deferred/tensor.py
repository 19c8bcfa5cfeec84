"""DeferredLogits: a tensor of logits that are made when something reads them.

Below autograd, so that views, hooks, in-place operations and graphs are torch's own. What
torch.ops.aten asks for is either understood (aten.py) and gives more such logits, or gets numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from neglog.integrations.deferred.aten import HANDLERS
from neglog.integrations.deferred.recipe import Recipe
from neglog.integrations.deferred.state import State, asked_by

aten = torch.ops.aten
# What a function called on logits is done by, if not by torch's own: see functions.py.
Override = Callable[..., Any]
OVERRIDES: dict[Any, Override] = {}
# Aside from those in HANDLERS, these take the logits as their second operand as well.
NUMBERS = (int, float, bool, str)
COMMUTATIVE = (aten.mul.Tensor, aten.add.Tensor)


class DeferredLogits(Tensor):
    """Logits that a head has not made yet. To a user they are a tensor like others."""

    __slots__ = ("_state",)
    _state: State

    def as_subclass(self, cls: Any) -> Any:
        """Of real logits: it is not among the functions that torch lets a class override."""
        return Read.apply(self).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        override = OVERRIDES.get(func)
        if override is not None:
            with torch._C.DisableTorchFunctionSubclass():
                result = override(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if any(t is not cls and t is not Tensor for t in types):
            # Another subclass of Tensor: the operation is for it to do, and it knows real tensors.
            return func(*as_read(args), **as_read(kwargs))
        with torch._C.DisableTorchFunctionSubclass(), asked_by(name_of(func)):
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            result = _understood(func, handler, args, kwargs)
            if result is not NotImplemented:
                return result
        with asked_by(str(func)):
            return _of_numbers(func, args, kwargs)


def name_of(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def wrap(state: State) -> DeferredLogits:
    meta = state.meta
    if torch.is_inference_mode_enabled():  # a view there of what is no inference tensor is none
        with torch.inference_mode(False):
            return wrap(state)
    logits = Tensor._make_wrapper_subclass(
        DeferredLogits, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(),
        dtype=meta.dtype, device=_device(state), storage_size=_storage_size(meta),
    )  # fmt: skip
    torch._C._set_throw_on_mutable_data_ptr(logits)  # an error where there was a crash
    logits._state = state
    return logits


def _device(state: State) -> torch.device:
    if state.recipe is not None:
        return state.recipe.products[0].hidden.device
    return state.numbers().device


# An operation that is understood


def _understood(func: Any, handler: Any, args: Any, kwargs: Any) -> Any:
    """More deferred logits, or NotImplemented."""
    if func in COMMUTATIVE and not isinstance(args[0], DeferredLogits):
        args = (args[1], args[0], *args[2:])
    logits, *rest = args
    if not isinstance(logits, DeferredLogits) or torch.is_inference_mode_enabled():
        return NotImplemented
    state = logits._state
    parents = [x for x in (logits, *rest) if isinstance(x, DeferredLogits)]
    if any(p._state.recipe is None or p._state.family.written for p in parents):
        return NotImplemented
    try:
        if func is aten.index.Tensor:
            rest = [_as_integers(state.meta.shape, rest[0])]
        metas = func(state.meta, *_metas(rest), **{**kwargs, **_device_of_meta(kwargs)})
    except Exception:  # torch's own error comes from the numbers
        return NotImplemented
    recipes = handler(state.recipe, state.meta, metas, *_recipes(rest), **kwargs)
    if recipes is None:
        return NotImplemented
    cut = func is aten.detach.default or not torch.is_grad_enabled()
    if isinstance(recipes, Recipe):
        replay = _replay(func, (logits, *rest), kwargs, None)
        return _child(State(recipes, metas, replay, tuple(parents), cut))
    return [
        _child(State(r, m, _replay(func, (logits, *rest), kwargs, i), tuple(parents), cut))
        for i, (r, m) in enumerate(zip(recipes, metas, strict=True))
    ]


def _as_integers(shape: torch.Size, indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as the integers that torch takes them for."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            if index.shape != shape[len(found) : len(found) + index.dim()]:
                raise IndexError("a mask whose shape is not that of the dimensions it indexes")
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _metas(values: Any) -> Any:
    if all(type(x) in NUMBERS for x in values):  # a tree_map of those takes 15 us
        return values
    return tree_map_only(Tensor, _meta, values)


def _meta(x: Tensor) -> Tensor:
    if isinstance(x, DeferredLogits):
        return x._state.meta
    return _meta_of(x)


def _meta_of(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _storage_size(meta: Tensor) -> int:
    """Of the memory that a tensor of this shape would have. None is asked for."""
    return meta.untyped_storage().nbytes()


def _device_of_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": "meta"} if kwargs.get("device") is not None else {}


def _recipes(values: list[Any]) -> list[Any]:
    return [x._state.recipe if isinstance(x, DeferredLogits) else x for x in values]


def _replay(func: Any, args: Any, kwargs: Any, output: int | None) -> Callable[[], Tensor]:
    def replay() -> Any:
        result = func(*numbers(args), **kwargs)
        return result if output is None else result[output]

    return replay


def _child(state: State) -> DeferredLogits:
    first, *others = (parent._state.family for parent in state.parents)
    for other in others:
        first.join(other)
    first.add(state)
    return wrap(state)


# One that is not


class _Aliases(NamedTuple):
    """Of an operation's schema: what it writes, and whether its results are views."""

    written: tuple[int, ...]  # positions
    written_names: tuple[str, ...]  # of arguments by keyword
    returned: tuple[str, ...]  # which argument each result is, if any
    names: tuple[str, ...]
    view: bool


@cache
def _aliases(func: Any) -> _Aliases:
    schema = func._schema
    is_written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    names = tuple(a.name for a in schema.arguments)
    written = tuple(i for i, w in enumerate(is_written) if w)
    returned = []
    for result in schema.returns:
        info = result.alias_info
        same = [
            a.name for a in schema.arguments
            if info is not None and info.is_write and a.alias_info is not None
            and a.alias_info.before_set == info.before_set
        ]  # fmt: skip
        returned.append(same[0] if same else "")
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return _Aliases(written, tuple(names[i] for i in written), tuple(returned), names, view)


def _of_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    if torch.Tag.inplace_view in func.tags:
        # Autograd would repeat the views of other logits on what has another shape by then.
        raise RuntimeError(
            f"logits: {func} changes their shape in place, which logits of a deferred head do not "
            "support; assign the result of the operation without the underscore"
        )
    aliases = _aliases(func)
    written = [args[i] for i in aliases.written if i < len(args)]
    written += [kwargs[name] for name in aliases.written_names if name in kwargs]
    tree_map_only(DeferredLogits, lambda x: _before_write(x._state), written)
    result = func(*numbers(args), **numbers(kwargs))
    if written and "_foreach" in str(func):  # where the kernel counts the versions
        torch.autograd.graph.increment_version(
            [x for x in tree_leaves(written) if isinstance(x, DeferredLogits)]
        )
    if written:
        return _written(aliases, args, kwargs, result)
    if aliases.view and tree_any(lambda x: isinstance(x, DeferredLogits), args[:1]):
        return tree_map_only(
            Tensor, lambda x: _view_of(args[0], x, func is aten.as_strided.default), result
        )
    return result


def numbers(values: Any) -> Any:
    """With logits that are made in place of deferred ones."""
    return tree_map_only(DeferredLogits, lambda x: x._state.numbers(), values)


def _before_write(state: State) -> None:
    if state.strided:
        raise RuntimeError(
            "logits: written through as_strided, which autograd cannot follow in logits of a "
            "deferred head; write to a view by index, or to a clone"
        )
    state.family.before_write()


def _written(aliases: _Aliases, args: Any, kwargs: Any, result: Any) -> Any:
    """The arguments that an operation wrote to and returns are to be the caller's own."""
    given = {**dict(zip(aliases.names, args, strict=False)), **kwargs}
    if len(aliases.returned) == 1:
        return given.get(aliases.returned[0], result)
    return tuple(given.get(n, r) for n, r in zip(aliases.returned, result or (), strict=False)) \
        if aliases.returned else result  # fmt: skip


def _view_of(base: DeferredLogits, view: Tensor, strided: bool) -> DeferredLogits:
    """Made, but still known: who writes to it writes to the logits."""
    state = State(None, _meta(view), lambda: view, (base,), cut=True)
    state.made, state.strided = view, base._state.strided or strided
    return _child(state)


def as_read(values: Any) -> Any:
    """With real tensors in place of deferred ones, of the same graph."""
    return tree_map_only(DeferredLogits, lambda x: Read.apply(x), values)


class Read(torch.autograd.Function):
    """Deferred logits as a tensor of torch's own class."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits) -> Tensor:
        with asked_by("a read"):
            return logits._state.numbers().view_as(logits._state.numbers())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
