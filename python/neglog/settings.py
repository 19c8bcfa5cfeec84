"""Public as neglog.options: what is set for the whole process."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

Gradient: TypeAlias = Literal["remembered", "forward", "backward"]

# When the gradient of the logits is formed.
gradient: Gradient = "remembered"
# After how many forwards that had no backward of the upstream expected no more are formed; the 2
# is that of csrc/nll/kernels.cuh. Read at each forward.
PATIENCE = {"remembered": 2, "forward": math.inf, "backward": 0}
patience: float = PATIENCE[gradient]


class options:
    """Set options, at once; in a `with`, until its end.

        neglog.options(gradient="backward")
        with neglog.options(gradient="forward"):
            loss = neglog.cross_entropy(logits, target)

    They hold for all threads of the process, as a training loop may run its parts in several. No
    result depends on them, bit for bit, unless logits are changed where autograd does not see it.

    Args:
        gradient: when `cross_entropy` and `masked_cross_entropy` form the gradient of logits, where
            their loss is one number.
            "remembered": in the forward, in one pass with the loss, for the upstream gradient that
            the last backward had; one with another forms it again. Not while forwards have no
            backward, as in an evaluation with grad mode on.
            "forward": in every forward that may have a backward.
            "backward": never before the backward. The gradient's memory is then not held beside
            what the model's backward has not freed yet.
            None leaves it as it is.

    Raises:
        ValueError: gradient is none of the three.
        TypeError: gradient is no string.
    """

    def __init__(self, *, gradient: Gradient | None = None) -> None:
        self._before = globals()["gradient"]
        if gradient is not None:
            _set(gradient)

    def __enter__(self) -> options:
        return self

    def __exit__(self, *raised: Any) -> None:
        _set(self._before)


def _set(value: Any) -> None:
    global gradient, patience
    if not isinstance(value, str):
        raise TypeError(f"gradient: expected a str, got {type(value).__name__}")
    if value not in PATIENCE:
        expected = ", ".join(map(repr, PATIENCE))
        raise ValueError(f"gradient: expected one of {expected}, got {value!r}")
    gradient, patience = value, PATIENCE[value]  # type: ignore[assignment]
