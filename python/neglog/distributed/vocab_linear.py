"""linear_nll whose classes are shared out to the processes of a group: rows of a head's weight.

neglog::vocab_linear_nll            loss and statistics, and the gradients for an upstream of 1
neglog::vocab_linear_nll_backward   those gradients times the upstream, or formed anew

The logits of this process's classes are made a tile of rows at a time. What all must know of a tile
is O(rows) bytes, one collective, after which its gradient is formed where the logits lie and used
up: 3 matmuls, as on one process. A tile has as many rows in all processes: it is of the largest
shard that the workspace holds, mostly all of them. Without gradients to form, and with reduction
"none", whose upstream is not known yet, one collective serves all tiles, and the backward makes
the logits again: 4 matmuls.

The gradient of the input is this process's part, whose sum over processes is the gradient
(group_shared). Arguments as neglog::linear_nll, but: target counts all classes, weight (V,) is of
all, and divisor () is that of the mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog import availability, torch_state
from neglog.distributed import vocab_rows
from neglog.distributed.vocab_parallel import by_formula
from neglog.distributed.vocab_parallel import forward as on_logits
from neglog.distributed.vocab_rows import Merged, Shards, Targets, all_find, find, merge, targets_of
from neglog.ops.define import Op, save, saved
from neglog.ops.dtypes import divides_late, real_dtype
from neglog.ops.linear_nll import schema
from neglog.ops.linear_nll.autograd import HEAD, second_derivative_of_head
from neglog.ops.linear_nll.schedule import nothing_formed, times_upstream
from neglog.ops.linear_nll.tiles import Gradients, Head, Tile, Tiles
from neglog.ops.memory import contiguous
from neglog.ops.nll.schema import MEAN, NONE, NUMBERS, OPTIONS

TILES = "int workspace, ScalarType tile_dtype, str backend"
GROUP = "SymInt vocab, str group"
forward = Op(
    "vocab_linear_nll(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    f"Tensor? weight, Tensor divisor, {OPTIONS}, bool stats, int[3] wanted, {TILES}, {GROUP}) -> "
    "(Tensor loss, Tensor lse, Tensor lse_low, Tensor correct, Tensor entropy, "
    "Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    numbers=NUMBERS,
)
backward = Op(
    "vocab_linear_nll_backward(Tensor grad_loss, Tensor? grad_lse, Tensor input, "
    "Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor divisor, "
    "Tensor lse, Tensor lse_low, Tensor grad_input, Tensor grad_weight, Tensor grad_bias, "
    f"{OPTIONS}, bool stats, int[3] wanted, {TILES}, {GROUP}) -> "
    "(Tensor input, Tensor linear_weight, Tensor linear_bias)",
    numbers=NUMBERS,
)
KEPT = ("reduction", "ignore_index", "label_smoothing", "logit_scale", "softcap", "z_loss", "stats")
PLACE = ("workspace", "tile_dtype", "backend", "vocab", "group")


class _Rows:
    """The counted rows of a call, a tile at a time."""

    def __init__(self, op: str, a: Any) -> None:
        self.a, self.shards = a, Shards.of(a)
        self.real = real_dtype(a.input.dtype)
        head = Head(a.input, a.linear_weight, a.linear_bias).contiguous()
        largest = -(-self.shards.vocab // self.shards.world)
        compact = not (a.input.is_cuda and torch_state.capturing(a.input.device))
        self.tiles = Tiles(
            head, contiguous(a.target, "target"), None, a.ignore_index, a.workspace, a.tile_dtype,
            a.wanted[1], compact, columns=largest,
        )  # fmt: skip
        availability.ran(op, a.backend or availability.best(a.input.device.type) or "torch")

    def arguments(self, logits: Tensor | None, target: Tensor) -> Any:
        """As those of vocab_nll, for some rows."""
        options = (self.a.vocab, *(getattr(self.a, name) for name in KEPT[1:]))
        given = (logits, target, self.a.weight, *options, self.a.group, self.a.backend)
        return on_logits.Arguments(*given)

    def targets(self, target: Tensor) -> Targets:
        columns = self.a.linear_weight.shape[0]
        return targets_of(self.arguments(None, target), self.shards, columns, self.real)

    def find(self, tile: Tile, t: Targets) -> Tensor:
        return find(self.arguments(tile.logits, tile.target), tile.logits, t, self.shards)

    def merge(self, sent: Tensor, target: Tensor, t: Targets) -> Merged:
        return merge(self.arguments(None, target), sent, t, self.shards)

    def gradient(
        self, tile: Tile, t: Targets, lse: tuple[Tensor, Tensor], upstream: Tensor,
        grad_lse: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Of the tile's logits, where they lay."""
        return vocab_rows.gradient(
            self.arguments(tile.logits, tile.target), tile.logits, t, self.shards, lse, upstream,
            grad_lse, lse[0].new_empty(0), in_place=True,
        )  # fmt: skip


def _forward(a: Any) -> tuple[Tensor, ...]:
    rows = _Rows("vocab_linear_nll", a)
    learns, count = any(a.wanted), len(a.target)
    late = divides_late(a.input.dtype)
    gradients = Gradients(rows.tiles, a.wanted, 0.0) if learns else None
    one = torch.ones((), dtype=rows.real, device=a.input.device)
    upstream = one / a.divisor if a.reduction == MEAN and not late else one
    found: list[Any] = []
    for tile in rows.tiles:
        t = rows.targets(tile.target)
        numbers = rows.find(tile, t)
        if gradients is None:
            found.append(numbers)
            continue
        merged = rows.merge(all_find(numbers, a.group), tile.target, t)
        found.append(merged)
        s = rows.gradient(tile, t, (merged.lse, merged.lse_low), upstream, None)
        gradients.add(tile, s, upstream)
    of_rows = _joined(rows, found, gradients is None)
    among = rows.tiles.among_all
    loss, lse, low = of_rows[:3]
    if a.reduction == NONE:
        loss = among(loss, count)
    else:
        loss = loss.sum(dtype=torch.float64)
        loss = (loss / a.divisor if a.reduction == MEAN else loss).to(rows.real)
    correct, entropy = (among(x, count) if a.stats else x for x in of_rows[3:5])
    formed = nothing_formed(a.input) if gradients is None else gradients.finished(late)
    return loss, among(lse, count), among(low, count), correct, entropy, *formed


def _joined(rows: _Rows, found: list[Any], to_send: bool) -> Merged:
    """Of all counted rows."""
    if to_send:
        target = rows.tiles.of_counted(rows.tiles.target)
        width = len(vocab_rows.numbers_to_send(rows.arguments(None, target)))
        nothing = rows.a.input.new_empty(0, width, dtype=rows.real)
        sent = all_find(torch.cat(found) if found else nothing, rows.a.group)
        return rows.merge(sent, target, rows.targets(target))
    if not found:
        none = rows.a.input.new_empty(0, dtype=rows.real)
        return Merged(none, none, none, none.bool(), none.clone(), none.clone())
    return Merged(*map(torch.cat, zip(*found, strict=True)))


def _backward(a: Any) -> tuple[Tensor, ...]:
    formed = times_upstream(a, a.divisor) if a.grad_lse is None else None
    if formed is not None:
        return formed
    rows = _Rows("vocab_linear_nll_backward", a)
    upstream = a.grad_loss / a.divisor if a.reduction == MEAN else a.grad_loss
    upstream = upstream.to(rows.real).expand(len(a.target))
    gradients = Gradients(rows.tiles, a.wanted, 0.0)
    for tile in rows.tiles:
        lse = (a.lse[tile.rows], a.lse_low[tile.rows])
        through_lse = None if a.grad_lse is None else a.grad_lse[tile.rows]
        given = (tile, rows.targets(tile.target), lse, upstream[tile.rows], through_lse)
        gradients.add(tile, rows.gradient(*given), 1.0)
    return gradients.finished(False)


def _set_up(ctx: Any, a: Any, results: Any) -> None:
    formed = (results.grad_input, results.grad_weight, results.grad_bias)
    ctx.mark_non_differentiable(results.lse_low, results.correct, results.entropy, *formed)
    save(
        ctx, input=a.input, linear_weight=a.linear_weight, linear_bias=a.linear_bias,
        target=a.target, weight=a.weight, divisor=a.divisor, lse=results.lse,
        lse_low=results.lse_low, grad_input=formed[0], grad_weight=formed[1], grad_bias=formed[2],
    )  # fmt: skip
    ctx.options = [getattr(a, name) for name in KEPT]
    ctx.place = [getattr(a, name) for name in PLACE]


def _derivative(ctx: Any, grad: Any) -> dict[str, Any]:
    kept, wanted = saved(ctx), ctx.wanted[:3]
    grad_loss = grad.loss
    if grad_loss is None:
        grad_loss = kept["divisor"].new_zeros(())
    made = backward(grad_loss, grad.lse, *kept.values(), *ctx.options, list(wanted), *ctx.place)
    return {name: g for name, g, want in zip(HEAD, made, wanted, strict=True) if want}


def _set_up_backward(ctx: Any, a: Any, results: Any) -> None:
    save(
        ctx, grad_loss=a.grad_loss, grad_lse=a.grad_lse, input=a.input,
        linear_weight=a.linear_weight, linear_bias=a.linear_bias, target=a.target,
        weight=a.weight, divisor=a.divisor,
    )  # fmt: skip
    ctx.a = a._replace(**dict.fromkeys((*saved_names(ctx), "lse", "lse_low")))


def saved_names(ctx: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = ctx.saved_names
    return names


def _second(ctx: Any, grad: Any) -> dict[str, Any]:
    """By the formula, with the logits in memory."""
    kept, a = saved(ctx), ctx.a
    upstream = {name: kept[name] for name in ("grad_loss", "grad_lse") if kept[name] is not None}

    def of_logits(logits: Tensor) -> tuple[Tensor, ...]:
        options = (a.vocab, *(getattr(a, name) for name in KEPT[1:]), a.group, a.backend)
        given = on_logits.Arguments(logits, kept["target"], kept["weight"], *options)
        loss, lse = by_formula(given)
        if a.reduction != NONE:
            loss = loss.sum()
        loss = loss / kept["divisor"] if a.reduction == MEAN else loss
        return (loss, lse)[: len(upstream)]

    counted = kept["target"] != a.ignore_index
    return second_derivative_of_head(of_logits, upstream, kept, counted, grad)


def _shapes(a: Any) -> tuple[Tensor, ...]:
    loss, lse, _, correct, entropy, _, *formed = schema.forward_shapes(a)
    return loss, lse, torch.empty_like(lse), correct, entropy, *formed


forward.shapes(_shapes)
backward.shapes(lambda a: schema.gradient_shapes(a, a.input.dtype))
forward.differentiable(_set_up, _derivative)
backward.differentiable(_set_up_backward, _second)
for _device in ("cpu", "cuda"):
    forward.implement(_device, _forward)
    backward.implement(_device, _backward)
