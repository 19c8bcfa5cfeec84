"""What a tensor of logits knows of itself: its recipe, and how its numbers come about."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neglog.integrations.deferred.recipe import Recipe

_asking = threading.local()


@contextmanager
def asked_by(name: str) -> Iterator[None]:
    """What is to blame for logits made inside."""
    before = getattr(_asking, "name", None)
    _asking.name = before or name
    try:
        yield
    finally:
        _asking.name = before


def asking() -> str:
    return getattr(_asking, "name", None) or "backward"


class Family:
    """Logits that share memory or are computed from one another: a write to one concerns all."""

    def __init__(self) -> None:
        self.members: list[weakref.ref[State]] = []
        self.written = False  # from then on they are tensors like others

    def add(self, state: State) -> None:
        state.family = self
        self.members.append(weakref.ref(state))

    def join(self, other: Family) -> None:
        """The other's members become members of this one."""
        if other is not self:
            for member in other.members:
                if (state := member()) is not None:
                    self.add(state)

    def before_write(self) -> None:
        """Makes all that is not made, while the memory holds what the forward gave."""
        if not self.written:
            for member in self.members:
                if (state := member()) is not None:
                    state.numbers()
            self.written = True


class State:
    """Of one tensor.

    recipe: None where an operation is not understood; then the numbers are made.
    meta: a tensor without memory, of the logits' shape, strides and dtype.
    parents: the tensors of logits that this one is computed from; none for a head's output.
    replay: computes the numbers, of its parents' or of the head.
    cut: whether autograd saw the operation. If not, the recipe has a graph that the tensor has not.
    """

    __slots__ = (
        "__weakref__", "captured", "cut", "family", "made", "meta", "parents", "recipe", "replay",
        "strided",
    )  # fmt: skip
    family: Family

    def __init__(
        self, recipe: Recipe | None, meta: Tensor, replay: Callable[[], Tensor],
        parents: tuple[Any, ...] = (), cut: bool = False,
    ) -> None:  # fmt: skip
        self.recipe, self.meta, self.replay, self.parents = recipe, meta, replay, parents
        self.cut = cut
        self.made: Tensor | None = None
        self.captured = False  # by torch.autograd.grad
        self.strided = False  # a view by as_strided

    def numbers(self) -> Tensor:
        """The logits, computed at the first call."""
        if self.made is None:
            with torch.no_grad():
                self.made = self.replay()
        return self.made

    def ancestors(self) -> Iterator[Tensor]:
        for parent in self.parents:
            yield parent
            yield from parent._state.ancestors()

    def roots_made(self) -> bool:
        """Whether the head's output is in memory, so that there is nothing left to save."""
        if not self.parents:
            return self.made is not None
        return any(parent._state.roots_made() for parent in self.parents)
