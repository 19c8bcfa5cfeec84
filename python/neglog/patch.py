"""Putting neglog's functions where torch's are, and back."""

from __future__ import annotations

import torch.nn.functional

from neglog.losses._rows import torch_cross_entropy
from neglog.losses.cross_entropy import cross_entropy


class patch_torch:
    """Make torch.nn.functional.cross_entropy neglog's, and with it nn.CrossEntropyLoss.

    As a plain call it lasts until `undo()`; as a context manager, until the end of the block:

        neglog.patch_torch()

        with neglog.patch_torch():
            loss = model(batch)

    Code that took the function by `from torch.nn.functional import cross_entropy` before keeps
    torch's. Raises RuntimeError if something else has replaced torch's function already.
    """

    _active = 0  # patches not undone; torch's function comes back with the last of them

    def __init__(self) -> None:
        self._apply()

    def _apply(self) -> None:
        current = torch.nn.functional.cross_entropy
        if current not in (torch_cross_entropy, cross_entropy):
            raise RuntimeError(
                "patch_torch: expected torch.nn.functional.cross_entropy to be torch's own, "
                f"got {current.__module__}.{current.__qualname__}"
            )
        torch.nn.functional.cross_entropy = cross_entropy  # type: ignore[assignment]
        patch_torch._active += 1
        self._undone = False

    def undo(self) -> None:
        """End this patch; with the last of them torch's function is back. Once is enough."""
        if self._undone:
            return
        self._undone = True
        patch_torch._active -= 1
        # What somebody else put there since is theirs.
        ours = torch.nn.functional.cross_entropy is cross_entropy
        if patch_torch._active == 0 and ours:
            torch.nn.functional.cross_entropy = torch_cross_entropy

    def __enter__(self) -> patch_torch:
        if self._undone:
            self._apply()
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()
