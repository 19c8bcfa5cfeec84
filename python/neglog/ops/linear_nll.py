"""linear_nll: the negative log-likelihood of linear(input), whose logits never lie in memory whole.

neglog::linear_nll            forward, and the gradients for upstream 1 where they are wanted
neglog::linear_nll_backward   those gradients times the upstream; formed anew where the upstream is
                              not one number (reduction "none", a gradient of the lse)

(a) A tile of rows against the whole vocabulary: its logits are made in a workspace, turned into
    their gradient where they lie by the fused nll kernel, and used for both gradients: 3 GEMMs.
(b) Ignored rows leave before the first of them. On CUDA their number is asked of the device; while
    a graph is captured nothing can be, and they stay, as zeros.
(c) The gradient of the weight is accumulated over tiles in float32 or wider. One tile is one
    product, which needs no memory for that.
(d) With filter_eps, the columns of a tile whose gradients are all below filter_eps times the
    largest upstream leave before the last two of them.

Shapes: input (N, D), linear_weight (V, D), linear_bias (V,), target (N,) int64; weight (V,) and
num_items () in the accumulation dtype. Returned: loss () or (N,), lse (N,), total_weight ();
correct and entropy (N,), or (0,) without stats; and gradients of input, linear_weight and
linear_bias, or (0,) where not wanted. Rows that are ignored have lse, entropy and gradient 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog import dispatch, kernels
from neglog.kernels.threads import allowed
from neglog.ops.nll import (
    DTYPE_CODES,
    MEAN,
    NONE,
    OPTIONS,
    Options,
    divides_late,
    library,
    new_memory,
    new_rows,
    quotient,
    real_dtype,
    scale_in_place,
)
from neglog.tiles import gemm, plan

library.define(
    "linear_nll(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    f"Tensor? weight, Tensor? num_items, {OPTIONS}, bool stats, bool[3] wanted, int workspace, "
    "float filter_eps, str backend) -> (Tensor loss, Tensor lse, Tensor total_weight, "
    "Tensor correct, Tensor entropy, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "linear_nll_backward(Tensor grad_loss, Tensor? grad_lse, Tensor input, Tensor linear_weight, "
    "Tensor? linear_bias, Tensor target, Tensor? weight, Tensor total_weight, Tensor grad_input, "
    f"Tensor grad_weight, Tensor grad_bias, {OPTIONS}, bool[3] wanted, int workspace, "
    "float filter_eps, str backend) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


NARROW = (False, False, False)
# The share of columns below which copying them out costs less than multiplying the others.
WORTH_A_COPY = 0.8


class Head(NamedTuple):
    """The projection to the vocabulary, and what is projected."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]


class Rows(NamedTuple):
    """Numbers by row: of those that count while tiles are at work, of all in the end."""

    loss: Tensor
    lse: Tensor
    lse_low: Tensor
    correct: Tensor | None
    entropy: Tensor | None


class Upstream(NamedTuple):
    """Gradients of loss and lse, (N,) each."""

    loss: Tensor
    lse: Tensor | None

    @property
    def largest(self) -> float:
        return float(self.loss.abs().amax()) if len(self.loss) else 0.0


class Gradients:
    """What the tiles add up to. Those not wanted stay empty.

    wide: which are wanted in the accumulation dtype, as parameters are that autocast rounded.
    """

    def __init__(
        self, tiles: Tiles, wanted: list[bool], filter_eps: float, wide: Sequence[bool] = NARROW
    ) -> None:
        head = tiles.head
        real = real_dtype(head.input.dtype)
        new = head.input.new_zeros
        self.dtypes = [real if it else head.input.dtype for it in wide]
        self.input = new(head.input.shape if wanted[0] else 0, dtype=self.dtypes[0])
        self.weight = new_memory(
            head.weight.shape if wanted[1] else (0,), head.weight, None if tiles.once else real
        )
        self.bias = new(head.vocab if wanted[2] else 0, dtype=real)
        self.wanted = wanted
        self.filter_eps = filter_eps
        self._first = True

    def add(
        self, s: Tensor, x: Tensor, weight: Tensor, rows: Tensor | slice, upstream: float | Tensor
    ) -> None:
        """A tile: s is the gradient of its logits, x the input that made them."""
        if self.wanted[2]:
            self.bias += s.sum(0, dtype=self.bias.dtype)
        columns = self._columns_that_count(s, upstream)
        if columns is not None:
            s, weight = s[:, columns], weight[columns]
        if self.wanted[0] and isinstance(rows, slice):
            gemm.product(s, weight, self.input[rows])
        elif self.wanted[0]:
            part = torch.empty_like(x, dtype=self.dtypes[0])
            gemm.product(s, weight, part)
            self.input[rows] = part
        if self.wanted[1] and columns is None:
            gemm.add_outer(s, x, self.weight, self._first)
        elif self.wanted[1]:
            self._add_to_columns(columns, s, x)
        self._first = False

    def _add_to_columns(self, columns: Tensor | None, s: Tensor, x: Tensor) -> None:
        assert columns is not None
        if self._first:
            self.weight.zero_()
        part = self.weight.new_empty(len(columns), x.shape[1])
        gemm.add_outer(s, x, part, True)
        self.weight.index_add_(0, columns, part)

    def _columns_that_count(self, s: Tensor, upstream: float | Tensor) -> Tensor | None:
        """Those with a gradient of at least filter_eps times the upstream; None for all."""
        if not self.filter_eps:
            return None
        largest = torch.maximum(s.amax(0), -s.amin(0))  # twice as fast as abs().amax(0)
        columns = (~(largest < self.filter_eps * upstream)).nonzero().squeeze(1)  # NaN counts
        return columns if len(columns) < WORTH_A_COPY * len(largest) else None

    def finished(self, late: bool) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtype of the parameters, but for float16, whose division comes later."""
        if self._first:  # no tile: nothing was written over what the memory held
            self.weight.zero_()
        if late:
            return self.input, self.weight, self.bias
        return self.input, self.weight.to(self.dtypes[1]), self.bias.to(self.dtypes[2])


class Tiles:
    """The rows that count, tile by tile: their input, and a workspace that holds their logits."""

    def __init__(
        self, head: Head, target: Tensor, ignore_index: int, workspace: int, learns: bool,
        compact: bool = True, wide: bool = False,
    ) -> None:  # fmt: skip
        """learns: the weight's gradient is wanted; wide: in the accumulation dtype. Not compact:
        rows that do not count stay, as 0.

        once: one tile, whose product is rounded to the weight's gradient, with no wider sum beside.
        """
        self.head = head
        counted = target != ignore_index
        self.kept = None if compact else counted[:, None]
        self.rows = counted.nonzero().squeeze(1) if compact else None
        if self.rows is not None and len(self.rows) == len(target):
            self.rows = None
        self.target = (target if self.rows is None else target[self.rows]).contiguous()
        dtype = gemm.tile_dtype(head.input)
        row = plan.row_stride(head.vocab, dtype.itemsize) * dtype.itemsize
        rows = len(self.target)
        self.height = plan.rows_per_tile(rows, row, workspace)
        self.once = dtype == head.weight.dtype and not divides_late(head.input) and not wide
        # A single tile may have the memory of the sum that it makes needless.
        spared = head.weight.numel() * real_dtype(dtype).itemsize if dtype.itemsize == 2 else 0
        if self.once and learns and rows * row <= workspace + spared:
            self.height = rows
        self.once = self.once and rows <= self.height
        self.logits = new_rows(self.height, head.vocab, head.input, dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor | slice, Tensor, Tensor]]:
        """Which of the counted rows, which of all, their input, their logits."""
        for part in plan.row_tiles(len(self.target), self.height):
            everywhere = part if self.rows is None else self.rows[part]
            x = self.head.input[everywhere]
            if self.kept is not None:  # what does not count may be NaN
                x = torch.where(self.kept[part], x, 0)
            logits = self.logits[: len(x)]
            gemm.linear(x, self.head.weight, self.head.bias, logits)
            yield part, everywhere, x, logits

    def spread(self, of_counted: Tensor, rows: int) -> Tensor:
        """Numbers of the counted rows among all rows; 0 for the others."""
        if self.kept is not None:
            return of_counted.masked_fill(~self.kept.squeeze(1), 0)
        if self.rows is None:
            return of_counted
        return of_counted.new_zeros(rows).index_copy_(0, self.rows, of_counted)


def _pointer(tensor: Tensor | None, start: int = 0) -> int:
    return 0 if tensor is None else tensor.data_ptr() + start * tensor.itemsize


def _problem(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> tuple:
    return (
        DTYPE_CODES[logits.dtype], *logits.shape, logits.data_ptr(), logits.stride(0),
        target.data_ptr() or 1, 0, 0, _pointer(weight), *options[1:],
    )  # fmt: skip


def _kernel(op: str, backend: str) -> Any:
    dispatch.ran(op, backend or dispatch.kernel_backend() or "none")
    return kernels.load("nll", backend or None)


def _empty_rows(head: Head, count: int, stats: bool) -> Rows:
    real = real_dtype(head.input.dtype)
    loss, lse, low = (head.input.new_empty(count, dtype=real) for _ in range(3))
    if not stats:
        return Rows(loss, lse, low, None, None)
    return Rows(loss, lse, low, loss.new_empty(count, dtype=torch.bool), torch.empty_like(loss))


def _outputs(rows: Rows, start: int) -> tuple[int, ...]:
    return tuple(_pointer(tensor, start) for tensor in rows)


def contiguous(head: Head, weight: Tensor | None) -> tuple[Head, Tensor | None]:
    bias = None if head.bias is None else head.bias.contiguous()
    ready = Head(head.input.contiguous(), head.weight.contiguous(), bias)
    return ready, None if weight is None else weight.contiguous()


def _sweep(
    kernel: Any, tiles: Tiles, weight: Tensor | None, options: Options, rows: Rows,
    gradients: Gradients | None, scale: float, upstream: Upstream | None,
) -> None:  # fmt: skip
    """All tiles once: their rows' numbers and, if asked for, what they add to the gradients.

    Without upstream the gradient is that of `scale` times the sum of the losses.
    """
    threads = allowed(torch.get_num_threads())
    largest = scale if upstream is None else upstream.largest
    for part, everywhere, x, logits in tiles:
        target = tiles.target[part]
        problem = _problem(logits, target, weight, options)
        written = _outputs(rows, part.start)
        in_place = (logits.data_ptr(), logits.stride(0), threads)
        if gradients is not None and upstream is None:
            kernel.forward_backward(*problem, *written[:2], *written[3:], scale, *in_place)
        else:
            kernel.forward(*problem, *written, threads)
        if gradients is not None and upstream is not None:
            grad = upstream.loss[everywhere].contiguous()
            grad_lse = None if upstream.lse is None else upstream.lse[everywhere].contiguous()
            kernel.backward(
                *problem, *written[1:3], _pointer(grad), 1, 1.0, _pointer(grad_lse), *in_place
            )
        if gradients is not None:
            gradients.add(logits, x, tiles.head.weight, everywhere, largest)


def _total_weight(kernel: Any, head: Head, target: Tensor, weight: Tensor | None, ignored: int):
    target = target.contiguous()
    code = DTYPE_CODES[head.input.dtype]
    return kernel.total_weight(
        len(target), head.vocab, target.data_ptr() or 1, 0, _pointer(weight), ignored, code
    )


def forward(
    input, linear_weight, linear_bias, target, weight, num_items, *rest,
    wide: Sequence[bool] = NARROW,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the op on the CPU. wide: which gradients are wanted in the accumulation dtype."""
    *values, stats, wanted, workspace, filter_eps, backend = rest
    options = Options(*values)
    kernel = _kernel("linear_nll", backend)
    head, weight = contiguous(Head(input, linear_weight, linear_bias), weight)
    divisor = _total_weight(kernel, head, target, weight, options.ignore_index)
    divisor = divisor if num_items is None else float(num_items)
    tiles = Tiles(head, target, options.ignore_index, workspace, wanted[1], wide=wide[1])
    rows = _empty_rows(head, len(tiles.target), stats)
    gradients = Gradients(tiles, wanted, filter_eps, wide) if any(wanted) else None
    late = divides_late(input)
    now = options.reduction == MEAN and not (late and divisor)
    scale = quotient(1.0, divisor) if now else 1.0
    _sweep(kernel, tiles, weight, options, rows, gradients, scale, None)
    total = float(rows.loss.sum(dtype=torch.float64))
    loss = tiles.spread(rows.loss, len(target))
    if options.reduction != NONE:
        value = quotient(total, divisor) if options.reduction == MEAN else total
        loss = torch.scalar_tensor(value, dtype=loss.dtype)
    nothing = loss.new_empty(0)
    correct, entropy = (
        default if made is None else tiles.spread(made, len(target))
        for made, default in ((rows.correct, nothing.bool()), (rows.entropy, nothing))
    )
    formed = gradients.finished(late) if gradients else nothing_formed(input)
    return (
        loss, tiles.spread(rows.lse, len(target)), torch.scalar_tensor(divisor, dtype=loss.dtype),
        correct, entropy, *formed,
    )  # fmt: skip


def _linear_nll_backward_cpu(
    grad_loss, grad_lse, input, linear_weight, linear_bias, target, weight, total_weight,
    grad_input, grad_weight, grad_bias, *rest,
) -> tuple[Tensor, ...]:  # fmt: skip
    *values, wanted, workspace, filter_eps, backend = rest
    options = Options(*values)
    ready = formed_times_upstream(
        grad_loss, grad_lse, (input, linear_weight, input), total_weight,
        (grad_input, grad_weight, grad_bias), options, wanted,
    )  # fmt: skip
    if ready is not None:
        return ready
    kernel = _kernel("linear_nll_backward", backend)
    head, weight = contiguous(Head(input, linear_weight, linear_bias), weight)
    tiles = Tiles(head, target, options.ignore_index, workspace, wanted[1])
    rows = _empty_rows(head, len(tiles.target), False)
    upstream = grad_loss / total_weight if options.reduction == MEAN else grad_loss
    upstream = Upstream(upstream.expand(len(target)), grad_lse)
    gradients = Gradients(tiles, wanted, filter_eps)
    _sweep(kernel, tiles, weight, options, rows, gradients, 1.0, upstream)
    return gradients.finished(False)


def formed_times_upstream(
    grad_loss: Tensor, grad_lse: Tensor | None, likes: tuple[Tensor, Tensor, Tensor],
    total_weight: Tensor, formed: tuple[Tensor, ...], options: Options, wanted: list[bool],
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """The gradients formed in the forward, times the upstream; None if that is not one number."""
    if grad_lse is not None or not _ready(formed, options, wanted):
        return None
    factor = _late_factor(grad_loss, total_weight, options, divides_late(likes[0]))
    return tuple(
        _times(kept, factor, like.dtype) if want else like.new_empty(0)
        for want, kept, like in zip(wanted, formed, likes, strict=True)
    )


def formed_once(
    grad_loss: Tensor, formed: Sequence[Tensor], total_weight: Tensor, options: Options,
    wanted: Sequence[bool], dtypes: Sequence[torch.dtype | None], late: bool,
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    """As formed_times_upstream, but in these dtypes and, if that was formed so, in the memory of
    what was formed, which is left to the caller."""
    if not _ready(formed, options, wanted):
        return None
    factor = _late_factor(grad_loss, total_weight, options, late)
    for kept, want in zip(formed, wanted, strict=True):
        if want:
            scale_in_place(kept if kept.dim() == 2 else kept[None], factor)
    return tuple(
        kept.to(dtype) if want else None
        for kept, want, dtype in zip(formed, wanted, dtypes, strict=True)
    )


def _ready(formed: Sequence[Tensor], options: Options, wanted: Sequence[bool]) -> bool:
    made = all(not want or kept.numel() for want, kept in zip(wanted, formed, strict=True))
    return made and options.reduction != NONE


def nothing_formed(input: Tensor) -> tuple[Tensor, ...]:
    return tuple(input.new_empty(0) for _ in range(3))


def _times(kept: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In new memory: the graph may be walked again."""
    if kept.dtype != dtype:
        return (kept * factor).to(dtype)
    # In 16 bits the factor itself would be rounded, a third by 0.2%. The CPU takes a number as it
    # is; on CUDA a vector of one makes the product's type that of the wider.
    factor = factor if kept.is_cpu else factor.reshape(1)
    return torch.mul(kept, factor, out=new_memory(kept.shape, kept, dtype))


def _late_factor(grad_loss: Tensor, total_weight: Tensor, options: Options, late: bool) -> Tensor:
    if options.reduction == MEAN and late:
        return grad_loss / torch.where(total_weight == 0, 1, total_weight)
    return grad_loss


library.impl("linear_nll", forward, "CPU")
library.impl("linear_nll_backward", _linear_nll_backward_cpu, "CPU")


# Shapes alone


def _formed_shapes(input: Tensor, linear_weight: Tensor, wanted: list[bool], dtype: Any):
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    dtypes = (input.dtype, dtype, dtype)
    return tuple(
        input.new_empty(shape if want else 0, dtype=kept if want else input.dtype)
        for shape, want, kept in zip(shapes, wanted, dtypes, strict=True)
    )


@torch.library.register_fake("neglog::linear_nll", lib=library)
def _linear_nll_fake(
    input, linear_weight, linear_bias, target, weight, num_items, reduction, *rest
):
    *_, stats, wanted, _, _, _ = rest
    real = real_dtype(input.dtype)
    rows = input.shape[0]
    loss = input.new_empty((rows,) if reduction == NONE else (), dtype=real)
    correct = input.new_empty(rows if stats else 0, dtype=torch.bool)
    entropy = input.new_empty(rows if stats else 0, dtype=real)
    kept = real if any(wanted) and divides_late(input) else input.dtype
    return (
        loss, input.new_empty(rows, dtype=real), input.new_empty((), dtype=real), correct, entropy,
        *_formed_shapes(input, linear_weight, wanted, kept),
    )  # fmt: skip


@torch.library.register_fake("neglog::linear_nll_backward", lib=library)
def _linear_nll_backward_fake(grad_loss, grad_lse, input, linear_weight, *others):
    wanted = others[-4]
    return _formed_shapes(input, linear_weight, wanted, input.dtype)
