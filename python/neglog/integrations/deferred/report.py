"""What became of a head's logits, counted: losses that did without them, and what made them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """Of one head, since it was deferred."""

    fused: Counter[str] = field(default_factory=Counter)  # losses without logits, by function
    made: Counter[str] = field(default_factory=Counter)  # logits made, by what read them first
    plain: Counter[str] = field(default_factory=Counter)  # calls that did not defer, by reason

    def __str__(self) -> str:
        parts = [
            f"{_counted(self.fused)} without logits",
            f"logits made by {_counted(self.made)}",
        ]
        if self.plain:
            parts.append(f"not deferred: {_counted(self.plain)}")
        return "; ".join(parts)


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} ({n}x)" for name, n in counter.most_common()) or "nothing"
