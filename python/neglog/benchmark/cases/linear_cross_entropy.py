"""linear_cross_entropy: torch eager, torch.compile, torch's own chunks, and neglog's tiles."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog import reference
from neglog.benchmark.cases import Contender, Problem, Shape, Spec, Truth
from neglog.benchmark.cases.cross_entropy import CHECKED_ROWS, IGNORED, backend_of
from neglog.losses import linear_cross_entropy as linear
from neglog.tiles import gemm

MODEL = "3 matmuls of rows x features x vocab, 2 operations each"


def problem(shape: Shape, dtype: str, seed: int) -> Problem:
    """Random input, weight and target; the gradients of a slice of the rows are verified."""
    rows, features, vocab = shape["rows"], shape["features"], shape["vocab"]
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, features, generator=generator).to(kind)
    weight = torch.randn(vocab, features, generator=generator).div_(features**0.5).to(kind)
    target = torch.randint(vocab, (rows,), generator=generator)
    picked = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).round().long()
    check_target = torch.full_like(target, IGNORED)
    check_target[picked] = target[picked]
    x, w = hidden[picked].double(), weight.double()
    # The logits are rounded as every contender's are: from there on the oracle is exact.
    logits = (x @ w.t()).to(kind).double()
    oracle = reference.nll(logits.numpy(), check_target[picked].numpy())
    dz = torch.from_numpy(oracle.grad)
    some = target[picked]

    def compared(grads: tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
        return grads[0][picked].double().numpy(), grads[1][some].double().numpy()

    left, right = torch.empty_like(hidden), torch.rand(rows, min(vocab, gemm.COLUMNS))
    right = right.to(gemm.tile_dtype(hidden))
    part = weight[: right.shape[1]].clone()

    def yardstick() -> None:
        gemm.product(right, part, left)

    return Problem(
        spec=Spec(
            shape, dtype, hidden.nbytes + weight.nbytes, "matmul of a tile",
            part.shape[0] / vocab / 3, 6 * rows * features * vocab, "GFLOP/s", MODEL,
        ),
        leaves=(hidden.requires_grad_(), weight.requires_grad_()),
        fixed=(target,),
        check_fixed=(check_target,),
        truth=Truth(float(oracle.loss), ((dz @ w).numpy(), (dz.t() @ x)[some].numpy())),
        compared=compared,
        yardstick=yardstick,
        by_norm=True,
    )  # fmt: skip


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, target, options=options)


def contenders(compiled: bool, shape: Shape, dtype: str) -> list[Contender]:
    """Logits in memory first; each does the same three matmuls."""
    rows, vocab = (torch.empty(shape[n], 0, dtype=getattr(torch, dtype)) for n in ("rows", "vocab"))
    runs = backend_of(gemm.few(rows, vocab, linear.FEW))
    found = [Contender("eager", "torch eager", _eager, 1)]
    if compiled:
        compiled_loss = torch.compile(_eager, fullgraph=True, dynamic=False)
        found.append(Contender("compile", "torch.compile", compiled_loss, 1))
    if hasattr(F, "linear_cross_entropy"):  # new in torch 2.13
        found.append(Contender("chunked", "torch, chunked", _chunked, 1))
    mine = Contender("neglog", f"neglog ({runs})", neglog.linear_cross_entropy, 1, backend=runs)
    return [*found, mine]


def small_contenders() -> list[Contender]:
    """Logits in memory, by torch and by whatever neglog chooses."""
    return [
        Contender("eager", "torch eager", _eager, 1),
        Contender("neglog", "neglog", neglog.linear_cross_entropy, 1),
    ]
