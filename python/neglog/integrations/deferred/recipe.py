"""What logits that are not made would be: products of hidden states and weights, and what follows.

    z = log_softmax?( cap * tanh( scale * (sum_k hidden_k @ weight_k.T + bias) / cap ) )

Hidden states have the logits' own dimensions, with their features where the logits have classes. So
a view of the logits is the same view of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from neglog.integrations.deferred.report import Report

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Unchanged:
    """That a tensor still holds what it held: its version, and the memory it lies in."""

    tensor: Tensor
    version: int
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> Unchanged:
        return cls(tensor, tensor._version, tensor.data_ptr())

    def check(self, name: str) -> None:
        """Raises RuntimeError if the logits would not be those of the forward."""
        if self.tensor.numel() and self.tensor.untyped_storage().size() == 0:
            raise RuntimeError(
                f"logits: the memory of {name} was freed after the forward, as fully_shard and "
                "FullyShardedDataParallel free it; read the logits or compute the loss before, or "
                "keep the head in the root module's unit"
            )
        if (self.tensor._version, self.tensor.data_ptr()) != (self.version, self.address):
            raise RuntimeError(
                f"logits: {name} was changed in place after the forward (by an optimizer's step?), "
                "and the logits had not been made; read them before"
            )


@dataclass(frozen=True)
class Product:
    """hidden @ weight.T + bias. `rows` are the views of the logits since, in order."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    autocast: torch.dtype | None  # in which the product is formed
    report: Report
    unchanged: tuple[tuple[str, Unchanged], ...]
    rows: tuple[Rows, ...] = ()
    factor: float = 1.0

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, report: Report) -> Product:
        device = hidden.device.type
        autocast = None
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            autocast = torch.get_autocast_dtype(device)
            autocast = None if hidden.dtype == torch.float64 else autocast
        parts = {"the hidden states": hidden, "the head's weight": weight, "the head's bias": bias}
        unchanged = tuple((n, Unchanged.of(x)) for n, x in parts.items() if x is not None)
        return cls(hidden, weight, bias, autocast, report, unchanged)

    def check(self) -> None:
        for name, part in self.unchanged:
            part.check(name)

    def cast(self, tensor: Tensor) -> Tensor:
        """As it is multiplied."""
        return tensor if self.autocast is None else tensor.to(self.autocast)

    def logits(self) -> Tensor:
        """Before any view: the bits that torch's own head would have given."""
        bias = None if self.bias is None else self.cast(self.bias)
        return torch.nn.functional.linear(self.cast(self.hidden), self.cast(self.weight), bias)

    def rows_of_hidden(self) -> Tensor:
        hidden = self.hidden
        for change in self.rows:
            hidden = change(hidden)
        return hidden if self.factor == 1.0 else hidden * self.factor


@dataclass(frozen=True)
class Recipe:
    """The formula above. `class_dim` is where the classes lie."""

    products: tuple[Product, ...]
    class_dim: int
    bias: tuple[Tensor, ...] = ()  # (V,) each
    scale: float = 1.0
    # A factor that is a tensor of one element, and whether it divides; at most one.
    scales: tuple[tuple[Tensor, bool], ...] = ()
    cap: float | None = None
    log_factor: float | None = None  # of the log-softmax, where it was taken
    given: tuple[tuple[str, Unchanged], ...] = ()  # what was added or multiplied
    # Log-sum-exp of the rows, once computed: with and without a graph.
    memo: dict[bool, Tensor] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        return self.products[0].weight.shape[0]

    @property
    def plain(self) -> bool:
        """Whether it is linear, and nothing but products and biases."""
        return self.scale == 1.0 and not self.scales and self.cap is None

    def but(self, **changes: Any) -> Recipe:
        """With another value of a field."""
        return replace(self, **{"memo": {}, **changes})

    def viewed(self, class_dim: int, rows: Rows) -> Recipe:
        """Seen otherwise: `rows` does to hidden states what was done to the logits."""
        products = tuple(replace(p, rows=(*p.rows, rows)) for p in self.products)
        return self.but(products=products, class_dim=class_dim)

    def check(self) -> None:
        for product in self.products:
            product.check()
        for name, tensor in self.given:
            tensor.check(name)

    def given_also(self, name: str, tensor: Tensor) -> tuple[tuple[str, Unchanged], ...]:
        return (*self.given, (name, Unchanged.of(tensor)))

    def total_scale(self) -> float | Tensor:
        """A float, or a tensor ()."""
        if not self.scales:
            return self.scale
        ((factor, divides),) = self.scales
        factor = factor.reshape(())
        return self.scale / factor if divides else self.scale * factor

    def detached(self) -> Recipe:
        """Of the same numbers, without their graph."""
        products = tuple(
            replace(
                p, hidden=p.hidden.detach(), weight=p.weight.detach(),
                bias=None if p.bias is None else p.bias.detach(),
            )
            for p in self.products
        )  # fmt: skip
        scales = tuple((factor.detach(), divides) for factor, divides in self.scales)
        bias = tuple(b.detach() for b in self.bias)
        return self.but(products=products, bias=bias, scales=scales)

    def head(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (..., D), weight and bias, where there is one product."""
        (product,) = self.products
        hidden = product.rows_of_hidden().movedim(self.class_dim, -1)
        return hidden, product.weight, self.total_bias()

    def total_bias(self) -> Tensor | None:
        """(V,), in the widest of their dtypes."""
        parts: list[Tensor] = [p.bias * p.factor for p in self.products if p.bias is not None]
        parts += [b.reshape(-1) for b in self.bias]
        total = None
        for part in parts:
            total = part if total is None else total + part
        return total
