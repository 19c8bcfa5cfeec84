"""What a task brings: a model, batches, and its loss twice. All else is the same for every task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

# What the loss is a function of and passes a gradient to: activations, and parameters of the head.
Features = tuple[Tensor, ...]
# Of the features and the batch that they were made from.
Loss = Callable[[Features, Any], Tensor]
Say = Callable[[str], None]


class Task(ABC):
    """One objective. Its two losses are the same number; only their makers differ."""

    title: str  # the picture's
    steps: int
    rate: float
    losses: Mapping[str, Loss]  # "torch" and "neglog", in this order
    metric = "held-out perplexity"  # what `score` gives, and how it is written
    metric_format = "{:,.2f}"
    # Another formula of the same loss, with its name: timed after the runs, used by no training.
    by_hand: tuple[str, Loss] | None = None

    @abstractmethod
    def describe(self) -> str:
        """The data, in a line."""

    @abstractmethod
    def shape(self) -> str:
        """What is predicted out of how many, for the picture's second line."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A new one, by torch's global generator."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """Without end; the same for the same seed."""

    @abstractmethod
    def features(self, model: nn.Module, batch: Any) -> Features:
        """What the losses take, still attached to the model."""

    @abstractmethod
    def score(self, model: nn.Module) -> float:
        """The metric on held-out text, by torch's own functions whatever trained the model."""

    @abstractmethod
    def epilogue(self, model: nn.Module, seed: int, say: Say) -> None:
        """What the trained model is good for."""
