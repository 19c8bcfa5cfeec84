"""nll on the CPU: the addresses that the kernels of kernels/cython/nll.pyx want."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog import availability, kernels
from neglog.kernels.memory import LARGE
from neglog.kernels.threads import allowed
from neglog.ops.dtypes import DTYPE_CODES, divides_late, number, quotient, real_dtype, rounded
from neglog.ops.memory import (
    LOW_ADDRESS,
    address,
    adjacent_columns,
    aligned,
    contiguous,
    new_gradient,
    new_memory,
)
from neglog.ops.nll import schema
from neglog.ops.nll.schema import MEAN, NONE, Options, as_rows, count_rows, empty_stats

# Numbers a thread must have before another is worth waking: 9 microseconds of work.
GRAIN = 32768
_NOTHING = torch.empty(0, device="cpu")
NO_STATS = (_NOTHING, _NOTHING, _NOTHING)
# By code, the size of the dtype that is computed in, and a number of it: torch.empty_like takes 0.3
# microseconds less than torch.empty.
_OF_DTYPE = {
    code: (real.itemsize, torch.empty((), dtype=real, device="cpu"))
    for code, real in ((code, real_dtype(dtype)) for dtype, code in DTYPE_CODES.items())
}


class Outputs(NamedTuple):
    """What a forward writes: memory, and the two sums that the mean divides."""

    row_loss: Tensor
    lses: Tensor
    correct: Tensor
    entropy: Tensor
    argmax: Tensor
    total: float
    divisor: float

    def loss(self, reduction: int) -> Tensor:
        if reduction == NONE:
            return self.row_loss
        value = quotient(self.total, self.divisor) if reduction == MEAN else self.total
        return number(value, self.row_loss.dtype)

    def total_weight(self) -> Tensor:
        return number(self.divisor, self.row_loss.dtype)


def lse_and_low(lses: Tensor | bytearray, rows: int, real: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each (rows,), of the memory that begins with both."""
    if isinstance(lses, bytearray):
        lses = torch.frombuffer(lses, dtype=real) if lses else torch.empty(0, dtype=real)
    return lses[:rows], lses[rows : 2 * rows]


def load_kernel(op: str, backend: str) -> Any:
    """The kernels of a backend, "" for the best; the call is noted for `dispatch.record()`."""
    availability.ran(op, backend)
    return kernels.load("nll", backend or None)


def threads_for(numbers: int) -> int:
    grains = numbers // GRAIN
    return 1 if grains < 2 else allowed(min(torch.get_num_threads(), grains))


def problem(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    options: Any,
) -> tuple:  # fmt: skip
    """The arguments that every kernel begins with. The tensors must outlive the call: rows of
    logits with adjacent columns or logits (B, V, P), the others contiguous, all aligned."""
    if target.dim() == 1:
        index, probabilities, probabilities_stride = address(target), 0, 0
    else:
        index, probabilities, probabilities_stride = 0, address(target), target.stride()[0]
    return (
        DTYPE_CODES[logits.dtype], count_rows(logits), logits.shape[1], logits.data_ptr(),
        logits.stride()[0], index, probabilities, probabilities_stride, address(weight),
        address(token_weight), options.ignore_index, options.label_smoothing, options.logit_scale,
        options.softcap, options.z_loss,
    )  # fmt: skip


def _ready(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As a kernel reads them: logits as rows, or as they are where the classes come not last."""
    if logits.dim() == 3:
        logits, target = _positions(aligned(logits, "input"), target)
    else:
        logits = adjacent_columns(logits, "input")
    target = _READY[target.dim()](target, "target")
    if weight is not None:
        weight = contiguous(weight, "weight")
    if token_weight is not None:
        token_weight = contiguous(token_weight, "token_weight")
    return logits, target, weight, token_weight


_READY = {1: contiguous, 2: adjacent_columns, 3: aligned}


def _positions(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, V, P) and their target; as rows where they lie as rows in memory, which a kernel
    of rows reads faster if they are long."""
    rows = _rows_in_memory(logits)
    if rows is None:
        return logits, target
    return rows, target if target.dim() == 1 else as_rows(target)


def _rows_in_memory(x: Tensor) -> Tensor | None:
    """(B, V, P) as rows (B * P, V) if they are these in memory, as where classes come last. Not
    where positions share memory, as expanded ones do: their gradient is not laid out as rows."""
    (batches, vocab, positions), (batch, of_class, position) = x.shape, x.stride()
    shared = positions > 1 and position < vocab
    apart = batches > 1 and positions > 1 and batch != positions * position
    if of_class != 1 or shared or apart:
        return None
    return x.as_strided((batches * positions, vocab), (batch if positions == 1 else position, 1))


def _layout(alive: Any, gradient: Tensor | None) -> tuple[int, ...] | None:
    """The last argument of a kernel: where the numbers of logits (B, V, P) lie."""
    if alive is None or alive[0].dim() == 2:
        return None
    logits, target = alive[:2]
    of_target = (1, 0) if target.dim() == 1 else target.stride()[1:]
    of_gradient = (1, 0) if gradient is None else gradient.stride()[1:]
    return (logits.shape[2], *logits.stride()[1:], *of_target, *of_gradient)


def _row_stride(gradient: Tensor, alive: Any) -> int:
    """Of rows, or of batches if the logits are not rows in memory."""
    if gradient.dim() == 3 and alive[0].dim() == 2 and gradient.shape[2] > 1:
        return gradient.stride(2)
    return gradient.stride()[0]


def _arguments(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    options: Options,
) -> tuple[tuple, Any]:  # fmt: skip
    """What every kernel begins with, of any tensors; and those that must outlive the call, or None
    where these are the given ones."""
    first, index = logits.data_ptr(), target.data_ptr()
    # As nearly always; to see it saves 0.8 of 26 microseconds that a small call takes.
    if (
        weight is None and token_weight is None and target.dim() == 1 and logits.dim() == 2
        and logits.is_contiguous() and target.is_contiguous() and first >= LOW_ADDRESS <= index
        and not first % logits.itemsize and not index % 8
        and not (logits.is_neg() or target.is_neg())
    ):  # fmt: skip
        rows, columns = logits.shape
        begin = (DTYPE_CODES[logits.dtype], rows, columns, first, columns, index, 0, 0, 0, 0)
        return (*begin, *options[1:]), None
    ready = _ready(logits, target, weight, token_weight)
    return problem(*ready, options), ready


def _divisor(kernel: Any, given: tuple, num_items: Tensor | None, real: torch.dtype) -> float:
    code, rows, vocab, _, _, target, probabilities, _, *weights, ignore_index = given[:11]
    # Formed in any case: it checks that targets are in range.
    total = kernel.total_weight(rows, vocab, target, probabilities, *weights, ignore_index, code)
    return rounded(total, real) if num_items is None else float(num_items)


def _begin(op: str, a: Any) -> tuple[Any, tuple, Any]:
    """The kernels, their first arguments, and the tensors that must outlive the call."""
    given, alive = _arguments(a.logits, a.target, a.weight, a.token_weight, Options.of(a))
    return load_kernel(op, a.backend), given, alive


def forward(a: Any) -> Outputs:
    """Loss and statistics of rows."""
    kernel, given, alive = _begin("nll", a)
    rows, real = given[1], real_dtype(a.logits.dtype)
    divisor = _divisor(kernel, given, a.num_items, real)
    row_loss, lses = (a.logits.new_empty(size, dtype=real) for size in (rows, 2 * rows))
    stats = empty_stats(a.logits, True) if a.stats else NO_STATS
    total = kernel.forward(
        *given, row_loss.data_ptr(), lses.data_ptr(), address(lses, rows), *_addresses(stats),
        threads_for(a.logits.numel()), _layout(alive, None),
    )  # fmt: skip
    return Outputs(row_loss, lses, *stats, total, divisor)


def _addresses(stats: tuple[Tensor, ...]) -> tuple[int, ...]:
    return (0, 0, 0) if stats is NO_STATS else tuple(x.data_ptr() for x in stats)


def forward_with_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, options: Options, stats: bool, backend: str, upstream: float,
) -> tuple[Tensor, Tensor, bytearray, float, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The reduced loss, and in the same pass the gradient of the logits for an upstream of it;
    lses, divisor and statistics as in Outputs.

    Of a small input the fixed cost of calls is all that is felt: hence one kernel, and no names for
    what it returns.
    """
    given, alive = _arguments(logits, target, weight, token_weight, options)
    itemsize, one_number = _OF_DTYPE[given[0]]
    loss, gradient = torch.empty_like(one_number), new_gradient_of(logits)
    of_rows = bytearray(3 * given[1] * itemsize)
    of_stats = empty_stats(logits, True) if stats else NO_STATS
    divisor = load_kernel("nll", backend).loss_and_gradient(
        *given, of_rows, *_addresses(of_stats), options.reduction == MEAN, num_items, upstream,
        loss.data_ptr(), gradient.data_ptr(), _row_stride(gradient, alive),
        threads_for(given[1] * given[2]), _layout(alive, gradient),
    )  # fmt: skip
    return loss, gradient, of_rows, divisor, of_stats


def new_gradient_of(logits: Tensor) -> Tensor:
    """Memory for it. Activations have no storage that anyone resizes, and kept memory takes half
    the time."""
    if logits.nbytes < LARGE and logits.is_contiguous():
        return torch.empty_like(logits)  # a microsecond less
    new = new_gradient if isinstance(logits, torch.nn.Parameter) else new_memory
    if logits.dim() == 2 or logits.is_contiguous():
        return new(logits.shape, logits)
    strides = torch.empty_like(logits, device="meta").stride()
    return new((logits.numel(),), logits).as_strided(logits.shape, strides)


def backward(a: Any, divisor: float, out: Tensor | None = None) -> Tensor:
    """The gradient of the logits, in `out` or new memory."""
    kernel, given, alive = _begin("nll_backward", a)
    grad_lse = None if a.grad_lse is None else contiguous(a.grad_lse, "grad_lse")
    grad_entropy = entropy = None
    if a.grad_entropy is not None:
        grad_entropy = contiguous(a.grad_entropy, "grad_entropy")
        entropy = contiguous(a.entropy, "entropy")
    lse, lse_low = contiguous(a.lse, "lse"), contiguous(a.lse_low, "lse_low")
    grad_loss = aligned(a.grad_loss, "grad_loss")
    out = new_gradient_of(a.logits) if out is None else out
    kernel.backward(
        *given, lse.data_ptr(), lse_low.data_ptr(),
        grad_loss.data_ptr(), grad_loss.stride(0) if grad_loss.dim() else 0,
        quotient(1.0, divisor) if a.reduction == MEAN else 1.0,
        address(grad_lse), address(grad_entropy), address(entropy), out.data_ptr(),
        _row_stride(out, alive), threads_for(out.numel()), _layout(alive, out),
    )  # fmt: skip
    return out


def forward_in_place(a: Any) -> Outputs:
    """Loss and statistics of rows, and their gradient in place of the logits."""
    ready = adjacent_columns if a.logits.dim() == 2 else aligned
    logits = ready(a.logits, "input")
    kernel, given, alive = _begin("nll_", a._replace(logits=logits))
    rows, real = given[1], real_dtype(logits.dtype)
    divisor = _divisor(kernel, given, a.num_items, real)
    row_loss, lse = (logits.new_empty(rows, dtype=real) for _ in range(2))
    stats = empty_stats(logits, True) if a.stats else NO_STATS
    divides = a.reduction == MEAN and not (divides_late(logits.dtype) and divisor)
    total = kernel.forward_backward(
        *given, row_loss.data_ptr(), lse.data_ptr(), 0, *_addresses(stats),
        quotient(1.0, divisor) if divides else 1.0, logits.data_ptr(),
        _row_stride(logits, alive), threads_for(logits.numel()), _layout(alive, logits),
    )  # fmt: skip
    if logits is not a.logits:
        a.logits.copy_(logits)
    return Outputs(row_loss, lse, *stats, total, divisor)


def _forward(a: Any) -> tuple[Tensor, ...]:
    out = forward(a)
    stats = out[2:5] if a.stats else empty_stats(a.logits, False)
    # Results of an op share no memory.
    lses = (x.clone() for x in lse_and_low(out.lses, len(out.row_loss), out.lses.dtype))
    return out.loss(a.reduction), *lses, out.total_weight(), *stats


def _in_place(a: Any) -> tuple[Tensor, ...]:
    out = forward_in_place(a)
    stats = out[2:5] if a.stats else empty_stats(a.logits, False)
    return out.loss(a.reduction), out.lses, out.total_weight(), *stats


schema.forward.implement("cpu", _forward)
schema.backward.implement("cpu", lambda a: backward(a, float(a.total_weight)))
schema.in_place.implement("cpu", _in_place)
