"""cross_entropy of index targets: torch eager, torch.compile, and neglog three ways."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog import dispatch, reference
from neglog.benchmark.cases import Contender, Problem, Shape, Spec, Truth

IGNORED = -100
# Rows the oracle sees: enough to hit every thread, few enough for float64 at any vocabulary.
CHECKED_ROWS = 64
MODEL = (
    "forward reads the logits, backward reads them and writes the gradient: 3 passes; "
    "in place 1 read, 1 write."
)


def problem(shape: Shape, dtype: str, seed: int) -> Problem:
    """Random logits and targets; a slice of rows, a quarter of them ignored, is verified."""
    rows, vocab = shape["rows"], shape["vocab"]
    generator = torch.Generator().manual_seed(seed)
    # Formed in float32, then rounded: torch.randn has no generator path for every 16-bit dtype.
    logits = torch.randn(rows, vocab, generator=generator).mul_(2).to(getattr(torch, dtype))
    target = torch.randint(vocab, (rows,), generator=generator)
    picked = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).round().long()
    check_target = torch.full_like(target, IGNORED)
    check_target[picked] = target[picked]
    check_target[picked[3::4]] = IGNORED
    oracle = reference.nll(logits[picked].double().numpy(), check_target[picked].numpy())
    buffer = torch.empty_like(logits)

    def compared(grads: tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
        return (grads[0][picked].double().numpy(),)

    return Problem(
        spec=Spec(
            shape, dtype, logits.nbytes, "copy of the logits", 2, logits.nbytes, "GB/s", MODEL
        ),
        leaves=(logits.requires_grad_(),),
        fixed=(target,),
        check_fixed=(check_target,),
        truth=Truth(float(oracle.loss), (oracle.grad,)),
        compared=compared,
        yardstick=lambda: buffer.copy_(logits.detach()),
    )


def _in_place(logits: Tensor, target: Tensor) -> Tensor:
    return neglog.cross_entropy(logits, target, inplace_backward=True)


def _numba(logits: Tensor, target: Tensor) -> Tensor:
    return neglog.cross_entropy(logits, target, backend="numba")


def _eager(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def backend_of(small: bool) -> str:
    """What runs a loss that is handed to torch where it is small."""
    return dispatch.forced() or (None if small else dispatch.kernel_backend()) or "torch"


def default_backend(shape: Shape) -> str:
    """What runs neglog.cross_entropy of such logits."""
    return backend_of(shape["rows"] * shape["vocab"] < dispatch.CROSSOVER)


def contenders(compiled: bool, shape: Shape, dtype: str) -> list[Contender]:
    """Everything that can run here, torch eager first."""
    runs = default_backend(shape)
    found = [Contender("eager", "torch eager", _eager, 3)]
    if compiled:
        compiled_loss = torch.compile(_eager, fullgraph=True, dynamic=False)
        found.append(Contender("compile", "torch.compile", compiled_loss, 3))
    own = neglog.cross_entropy
    found.append(Contender("neglog", f"neglog ({runs})", own, 3, backend=runs))
    if runs != "torch":
        found += [
            Contender("new_memory", "  in new memory", own, 3, new_memory=True, backend=runs),
            Contender("inplace", "  in place", _in_place, 2, in_place=True, backend=runs),
        ]
    numba = next(state for state in dispatch.describe() if state.name == "numba")
    if numba.usable and runs != "numba":
        found.append(Contender("numba", "  by numba", _numba, 3, backend="numba"))
    return found


def small_contenders() -> list[Contender]:
    """torch's function and neglog's, which chooses by size which of the two really runs."""
    return [
        Contender("eager", "torch eager", F.cross_entropy, 3),
        Contender("neglog", "neglog", neglog.cross_entropy, 3),
    ]
