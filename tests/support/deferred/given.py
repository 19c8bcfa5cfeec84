"""A head with its logits, real or deferred, and the comparison of what a user gets from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neglog.integrations.deferred import defer

VOCAB, WIDTH, BATCH, LENGTH = 7, 4, 2, 5


@dataclass
class Given:
    """What a user has in hand: a head, the logits, and tensors to use beside them."""

    head: nn.Linear
    hidden: Tensor
    base: Tensor
    """What the head answered."""
    logits: Tensor
    """The same, after an origin's operations."""
    random: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    @cached_property
    def like(self) -> Tensor:
        """Real logits of the same shape and dtype."""
        return self.normal(*self.logits.shape).to(self.logits.dtype)

    @cached_property
    def target(self) -> Tensor:
        """A class for each row."""
        return torch.randint(VOCAB, self.logits.shape[:-1], generator=self.random)

    @cached_property
    def labels(self) -> Tensor:
        """The same, with some rows ignored."""
        return torch.where(self.mask, self.target, -100)

    @cached_property
    def mask(self) -> Tensor:
        """True for some rows, one at the least."""
        mask = torch.rand(self.logits.shape[:-1], generator=self.random) < 0.6
        mask.view(-1)[:1] = True
        return mask

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, *self.head.parameters()]


Case = Callable[[Tensor, Given], Any]
Origin = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Start:
    """How the logits come about."""

    origin: Origin = lambda logits: logits
    shape: tuple[int, ...] = (BATCH, LENGTH)
    dtype: torch.dtype = torch.float32
    bias: bool = True
    trains: tuple[bool, bool] = (True, True)
    """Whether the hidden states and the head require a gradient."""

    @property
    def tolerance(self) -> dict[str, float]:
        # In 16 bits real logits are rounded, and those inside of a fused loss are not.
        if self.dtype == torch.bfloat16:
            return {"rtol": 4e-2, "atol": 6e-2}
        return {"rtol": 2e-5, "atol": 1e-5}


STARTS: dict[str, Start] = {
    "head": Start(),
    "rows": Start(lambda logits: logits.view(-1, VOCAB), bias=False),
    "shifted": Start(lambda logits: logits[..., :-1, :]),
    "scaled": Start(lambda logits: logits.double() / 2),
    "softcapped": Start(lambda logits: torch.tanh(logits / 3.0) * 3.0, bias=False),
    "one row": Start(shape=()),
    "frozen trunk": Start(trains=(False, True)),
    "frozen head": Start(trains=(True, False)),
    "frozen": Start(trains=(False, False)),
    "bfloat16": Start(lambda logits: logits.float(), dtype=torch.bfloat16),
}


def given(start: Start, deferred: bool, wrap: Callable[[nn.Linear], Any] | None = None) -> Given:
    """The same numbers at each call. `wrap` changes the head before it is asked."""
    random = torch.Generator().manual_seed(5)
    head = nn.Linear(WIDTH, VOCAB, bias=start.bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    head.to(start.dtype).requires_grad_(start.trains[1])
    hidden = torch.randn(*start.shape, WIDTH, generator=random).to(start.dtype)
    hidden.requires_grad_(start.trains[0])
    if deferred:
        defer(head)
    if wrap is not None:
        wrap(head)
    base = head(hidden)
    return Given(head, hidden, base, start.origin(base), random)


@dataclass
class Outcome:
    """What a user can see of a call: what it returned or raised, and what backward gave."""

    returned: Any = None
    raised: list[str] = field(default_factory=list)
    after: list[Any] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)


def tensors(value: Any) -> list[Tensor]:
    """Those that can be differentiated, of nested lists and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad and value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [found for part in value for found in tensors(part)]
    return []


def loss_of(result: Tensor, as_logits: bool) -> Tensor:
    """A number of a result. Its gradient differs from element to element."""
    if as_logits and result.dim() and result.shape[-1] == VOCAB and result.numel():
        rows = result.reshape(-1, VOCAB)
        return F.cross_entropy(rows, torch.arange(len(rows)) % VOCAB).double()
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float64).reshape(result.shape)
    return (result.double() * weights).sum()


GONE = "what the backward needs is gone"


def kind_of(error: Exception) -> str:
    """Its class. A fused loss needs other tensors than real logits do, which are there yet."""
    gone = "a second time" in str(error) or "modified by an inplace operation" in str(error)
    return GONE if gone else type(error).__name__


def outcome(case: Case, have: Given, as_logits: bool) -> Outcome:
    """Runs a case, then a loss of all that it gave and of the logits, then backward.

    as_logits: a cross-entropy of each result that has the vocabulary's size, not a weighted sum.
    """
    seen = Outcome()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            seen.returned = case(have.logits, have)
        except Exception as error:
            seen.raised.append(kind_of(error))
        try:
            found = tensors([seen.returned, *([have.logits, have.base] if as_logits else [])])
            if found:
                total = torch.stack([loss_of(one, as_logits) for one in found]).sum()
                seen.after.append(total.detach())
                total.backward()
        except Exception as error:
            seen.raised.append(kind_of(error))
        seen.gradients = [leaf.grad for leaf in have.leaves]
        seen.after += [have.logits, have.base]
    return seen


def compare(got: Any, expected: Any, where: str, **tolerance: float) -> None:
    """Asserts that a user cannot tell two answers apart."""
    if isinstance(expected, Tensor):
        compare_tensors(got, expected, where, **tolerance)
    elif isinstance(expected, np.ndarray):
        assert isinstance(got, np.ndarray), f"{where}: {type(got)} for an array"
        assert got.dtype == expected.dtype, f"{where}: {got.dtype} for {expected.dtype}"
        np.testing.assert_allclose(got, expected, err_msg=where, **tolerance)
    elif isinstance(expected, dict):
        assert list(got) == list(expected), where
        for name in expected:
            compare(got[name], expected[name], f"{where}[{name!r}]", **tolerance)
    elif isinstance(expected, (list, tuple)):
        assert type(got) is type(expected), f"{where}: {type(got)} for {type(expected)}"
        assert len(got) == len(expected), f"{where}: {len(got)} for {len(expected)}"
        for number, (one, other) in enumerate(zip(got, expected, strict=True)):
            compare(one, other, f"{where}[{number}]", **tolerance)
    elif isinstance(expected, (float, complex)):
        assert type(got) is type(expected), where
        np.testing.assert_allclose(got, expected, err_msg=where, **tolerance)
    else:
        assert type(got) is type(expected), f"{where}: {got!r} for {expected!r}"
        assert got == expected, f"{where}: {got!r} for {expected!r}"


def compare_tensors(got: Any, expected: Tensor, where: str, **tolerance: float) -> None:
    assert isinstance(got, Tensor), f"{where}: {type(got)} for a tensor"
    if void(got):  # also where torch allows the write, under no_grad
        return
    assert not void(expected), where
    for name in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf"):
        one, other = getattr(got, name), getattr(expected, name)
        assert one == other, f"{where}.{name}: {one} for {other}"
    if expected.layout == torch.strided and expected.numel():
        one, other = steps(got), steps(expected)
        assert one == other, f"{where}: strides {one} for {other}"
    if not expected.is_meta:
        one, other = got.detach().to_dense(), expected.detach().to_dense()
        if not torch.equal(one, other):
            torch.testing.assert_close(
                one, other, equal_nan=True, msg=lambda text: f"{where}: {text}", **tolerance
            )


def steps(tensor: Tensor) -> list[int]:
    """The strides that make a difference."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in sizes if size > 1]


def void(tensor: Tensor) -> bool:
    """Whether it is one of several views, as of `unbind`, and its base was written to."""
    try:
        tensor.is_leaf  # noqa: B018
    except RuntimeError as error:
        return "is a view and its base or another view" in str(error)
    return False


def compare_outcomes(got: Outcome, expected: Outcome, **tolerance: float) -> None:
    if GONE in expected.raised:
        assert set(got.raised) <= set(expected.raised)
        return
    assert got.raised == expected.raised, f"raised {got.raised} for {expected.raised}"
    compare(got.returned, expected.returned, "result", **tolerance)
    compare(got.after, expected.after, "after", **tolerance)
    compare(got.gradients, expected.gradients, "gradient", **tolerance)
