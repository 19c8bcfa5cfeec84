"""The losses of other libraries on a GPU, of those that can be imported; none is needed.

The calls are those of liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5, inf-cl
1.2.1 and memeff 0.3.1. All get contiguous tensors that torch allocated, so aligned to 512 bytes.
"""

from __future__ import annotations

import importlib
import os
import site
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from .budget import time_limit
from .cases.cross_entropy import ONE_PASS, TWO_PASSES
from .contender import Contender, Problem

LIGER, CCE, QUACK, INF_CL, MEMEFF = (
    "liger-kernel", "cut-cross-entropy", "quack-kernels", "inf-cl", "memeff",
)  # fmt: skip
FUNCTIONS = {
    (LIGER, "cross_entropy"): "liger_kernel.transformers.functional:liger_cross_entropy",
    (LIGER, "linear_cross_entropy"):
        "liger_kernel.transformers.functional:liger_fused_linear_cross_entropy",
    (CCE, "linear_cross_entropy"): "cut_cross_entropy:linear_cross_entropy",
    (QUACK, "cross_entropy"): "quack.cross_entropy:cross_entropy",
    (QUACK, "linear_cross_entropy"): "quack.linear_cross_entropy:chunked_linear_cross_entropy",
    (INF_CL, "clip_loss"): "inf_cl:cal_flash_loss",
    (MEMEFF, "clip_loss"): "memeff:MemoryEfficientCLIPLoss",
}  # fmt: skip
Function = Callable[..., Any]
IMPORT_SECONDS = 60.0

# Each function, or why there is none. Filled at first use: an import can take seconds, or bring
# the process down.
_imported: dict[str, Function | str] = {}


def _read_path_files() -> None:
    """Python reads no .pth in a folder of PYTHONPATH; what quack-kernels needs is behind one."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if folder:
            site.addsitedir(folder)


def find(where: str) -> Function | str:
    """The function at `module:name`, or why there is none."""
    if not _imported:
        _read_path_files()
    if where not in _imported:
        module, name = where.split(":")
        try:
            with time_limit(IMPORT_SECONDS):
                _imported[where] = getattr(importlib.import_module(module), name)
        except (Exception, SystemExit) as error:  # a library may stumble over anything
            _imported[where] = f"{type(error).__name__}: {error}"[:200]
    return _imported[where]


def functions(op: str) -> dict[str, Function]:
    """The libraries that have this loss, with their function."""
    found = {name: find(where) for (name, of), where in FUNCTIONS.items() if of == op}
    return {name: function for name, function in found.items() if not isinstance(function, str)}


def absent() -> dict[str, str]:
    """Why, of the functions that were looked for."""
    found = {key: _imported.get(where) for key, where in FUNCTIONS.items()}
    return {f"{name} {op}": why for (name, op), why in found.items() if isinstance(why, str)}


def versions() -> dict[str, str | None]:
    """Of the libraries in use, by the names of their packages; None for a folder on the path."""
    found: dict[str, str | None] = {}
    for (name, _), where in FUNCTIONS.items():
        if where in _imported and not isinstance(_imported[where], str):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
    return found


def contenders(problem: Problem) -> list[Contender]:
    """Those that the problem's loss can be compared with here."""
    make = {
        "cross_entropy": _cross_entropy,
        "linear_cross_entropy": _linear_cross_entropy,
        "clip_loss": _clip_loss,
    }
    op = problem.spec.op
    return make[op](functions(op), problem) if op in make else []


def _rival(name: str, loss: Function, work: float = 1, **fields: Any) -> Contender:
    return Contender(name, name, loss, work, library=name, baseline=True, **fields)


def _cross_entropy(found: dict[str, Function], problem: Problem) -> list[Contender]:
    made = []
    if LIGER in found:  # it always writes the gradient over its input
        made.append(_rival(LIGER, found[LIGER], ONE_PASS, overwrites=True))
    if QUACK in found:
        quack = found[QUACK]

        def in_place(logits: Tensor, target: Tensor) -> Tensor:
            return quack(logits, target, inplace_backward=True)

        made += [
            _rival(QUACK, quack, TWO_PASSES),
            _rival(QUACK, in_place, ONE_PASS, overwrites=True),
        ]
    return made


def _linear_cross_entropy(found: dict[str, Function], problem: Problem) -> list[Contender]:
    made = []
    if QUACK in found:  # on sm_90 one pipeline; elsewhere tuning would compile for minutes
        quack = found[QUACK]
        made.append(_rival(QUACK, lambda x, w, t: quack(x, w, t, tuned=False)))
    if LIGER in found:
        made.append(_rival(LIGER, found[LIGER]))
    if CCE in found:
        cce = found[CCE]
        # By default it leaves out gradients below 2^-12, which of random logits over 128256 classes
        # are all but the targets' own.
        made += [
            _rival(CCE, lambda x, w, t: cce(x, w, t, filter_eps=None)),
            _rival(f"{CCE}, filtered", cce, check="loss"),
        ]
    return made


def _clip_loss(found: dict[str, Function], problem: Problem) -> list[Contender]:
    made = []
    features, temperature = problem.leaves[0].shape[1], 1 / float(problem.leaves[2].detach())
    if MEMEFF in found:  # its temperature gets no gradient; "stable" scales the gradient otherwise
        memeff = found[MEMEFF](temperature=temperature, normalized_inputs=True, stable=False)
        made.append(_rival(MEMEFF, lambda image, text, _: memeff(image, text), leaves=2))
    if INF_CL in found:  # a loss a row, of one direction, by float32 heads of a power of two
        one_direction, head = found[INF_CL], min(256, features & -features)

        def both_directions(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            sides = ((image, text), (text, image))
            losses = [one_direction(q, k, scale=scale, head_dim=head).mean() for q, k in sides]
            return (losses[0] + losses[1]) / 2

        made.append(_rival(INF_CL, both_directions))
    return made
