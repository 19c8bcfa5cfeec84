"""kl on the CPU: the addresses that the kernels of kernels/cython/kl.pyx want."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog import availability, kernels
from neglog.kernels.numpy.kl import check_named
from neglog.ops.dtypes import DTYPE_CODES, number, quotient, real_dtype
from neglog.ops.kl import schema
from neglog.ops.kl.schema import Options
from neglog.ops.memory import address, adjacent_columns, aligned, contiguous
from neglog.ops.nll.cpu import new_gradient_of, threads_for
from neglog.ops.nll.schema import MEAN, NONE


class Rows(NamedTuple):
    """What the kernel wrote of each row, and the sum of the losses."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    total: float


class Taught:
    """The tensors of a call as the kernels read them, alive as long as this is."""

    def __init__(self, a: Any, numbers: Sequence[int] | Tensor | None = None) -> None:
        """a: tensors and options of the op. numbers: of the rows, for errors, if not all rows."""
        self.numbers = numbers
        self._kernel = kernels.load("kl", a.backend or None)
        self.logits = adjacent_columns(a.logits, "input")
        self.teacher = adjacent_columns(a.teacher, "teacher")
        self.ids = None if a.ids is None else contiguous(a.ids, "ids")
        self.target = contiguous(a.target, "target")
        given = a.token_weight
        self.token_weight = None if given is None else contiguous(given, "token_weight")
        self.options = Options.of(a)
        self.real = real_dtype(self.logits.dtype)

    def run(
        self, grad: Tensor | None = None, scale: float = 1.0, out: Tensor | None = None,
        threads: int | None = None, losses: bool = True,
    ) -> Rows:  # fmt: skip
        """Losses and parts of the rows, and with `out`, where it may be the logits, their gradient
        for the upstream grad (N,) or () times scale.

        Raises IndexError or ValueError where a teacher's named classes are none.
        """
        x, new = self.logits, self.logits.new_empty
        rows, vocab = x.shape
        loss, soft, hard = (new(rows if losses else 0, dtype=self.real) for _ in range(3))
        ignore_index, probabilities, *numbers = self.options
        total, invalid = self._kernel.rows(
            DTYPE_CODES[x.dtype], rows, vocab, x.data_ptr(), x.stride(0),
            DTYPE_CODES[self.teacher.dtype], self.teacher.data_ptr(), self.teacher.stride(0),
            probabilities, address(self.ids), 0 if self.ids is None else self.ids.shape[1],
            address(self.target), address(self.token_weight), ignore_index, *numbers,
            *(x.data_ptr() if losses else 0 for x in (loss, soft, hard)), address(grad),
            grad.stride(0) if grad is not None and grad.dim() else 0, scale, address(out),
            0 if out is None else out.stride(0), threads or threads_for(2 * x.numel()),
        )  # fmt: skip
        if invalid >= 0:
            self._refuse(invalid)
        return Rows(loss, soft, hard, total)

    def _refuse(self, row: int) -> None:
        assert self.ids is not None
        of_row = (self.ids[row].numpy(), self.teacher[row].double().numpy())
        numbers = range(len(self.logits)) if self.numbers is None else self.numbers
        check_named(*of_row, self.logits.shape[1], int(numbers[row]), "teacher_ids")


def reduced(rows: Rows, divisor: float, reduction: int) -> Tensor:
    """The loss () or (N,)."""
    if reduction == NONE:
        return rows.loss
    return number(
        quotient(rows.total, divisor) if reduction == MEAN else rows.total, rows.loss.dtype
    )


def total_weight_of(
    target: Tensor, token_weight: Tensor | None, ignore_index: int, vocab: int, dtype: torch.dtype,
    backend: str,
) -> Tensor:  # fmt: skip
    """The divisor () of a mean of such rows. Raises IndexError for a target out of range."""
    target = contiguous(target, "target")
    if token_weight is not None:
        token_weight = contiguous(token_weight, "token_weight")
    total = kernels.load("nll", backend or None).total_weight(
        len(target), vocab, address(target), 0, 0, address(token_weight), ignore_index,
        DTYPE_CODES[dtype],
    )  # fmt: skip
    return number(total, real_dtype(dtype))


def divisor_of(a: Any) -> float:
    given = (a.target, a.token_weight, a.ignore_index, a.logits.shape[1], a.logits.dtype, a.backend)
    total = total_weight_of(*given)  # in any case: it checks that targets are in range
    return float(total if a.num_items is None else a.num_items)


def run_rows(
    a: Any, grad: Tensor | None, gradient: Tensor | None, rows: Tensor | slice
) -> tuple[Tensor, ...]:
    """Losses, divergences and cross-entropies of these rows of a call; with `gradient`, it is
    written there."""
    numbers = range(rows.start, rows.stop) if isinstance(rows, slice) else rows
    grad = None if grad is None else aligned(grad, "grad_loss")
    return Taught(a, numbers).run(grad, 1.0, gradient)[:3]


def _forward(a: Any) -> tuple[Tensor, ...]:
    availability.ran("kl", a.backend)
    divisor, rows = divisor_of(a), Taught(a).run()
    loss = reduced(rows, divisor, a.reduction)
    return loss, number(divisor, rows.loss.dtype), rows.divergence, rows.cross_entropy


def backward(a: Any, divisor: float, out: Tensor | None = None) -> Tensor:
    """The gradient of the logits, in `out` or new memory."""
    availability.ran("kl_backward", a.backend)
    out = new_gradient_of(a.logits) if out is None else out
    scale = quotient(1.0, divisor) if a.reduction == MEAN else 1.0
    Taught(a).run(aligned(a.grad_loss, "grad_loss"), scale, out, losses=False)
    return out


schema.forward.implement("cpu", _forward)
schema.backward.implement("cpu", lambda a: backward(a, float(a.total_weight)))
