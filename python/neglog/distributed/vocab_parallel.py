"""nll of logits whose classes are shared out to the processes of a group.

neglog::vocab_nll            loss and log-sum-exp of rows, by one collective of O(rows) bytes
neglog::vocab_nll_backward   gradient of this process's logits, without any
neglog::group_total          the sum over processes of a number that each has a part of
neglog::group_shared         a tensor that all have alike, whose gradient each has a part of

Every process has the same rows and finds the same losses: one loss, not one of each. So what flows
in is the same in all, and counts once. group_total and group_shared are each other's derivative.

Shapes: logits (N, V_C), target (N,) int64 over all V classes or probabilities (N, V_C), weight (V,)
in the accumulation dtype. Returned: loss, lse, lse_low (N,), correct and entropy (N,) or (0,), and
what the backward needs of probabilities. Rows are not reduced here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd import Function

from neglog import torch_state
from neglog.distributed import vocab_rows
from neglog.distributed.groups import group_named
from neglog.distributed.vocab_rows import Shards, all_find, find, merge, targets_of
from neglog.ops.define import Op, save, saved, second_derivative
from neglog.ops.dtypes import real_dtype
from neglog.ops.nll import formula
from neglog.ops.nll.autograd import gradient_in_place, refuse_create_graph, scale_in_place
from neglog.ops.nll.schema import NUMBERS

SHARD = f"SymInt vocab, SymInt ignore_index, {NUMBERS}"
forward = Op(
    f"vocab_nll(Tensor logits, Tensor target, Tensor? weight, {SHARD}, bool stats, str group, "
    "str backend) -> (Tensor loss, Tensor lse, Tensor lse_low, Tensor correct, Tensor entropy, "
    "Tensor mass_elsewhere)",
    numbers=NUMBERS,
)
backward = Op(
    "vocab_nll_backward(Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, "
    f"Tensor? weight, Tensor lse, Tensor lse_low, Tensor mass_elsewhere, {SHARD}, bool stats, "
    "str group, str backend) -> Tensor",
    numbers=NUMBERS,
)
total = Op("group_total(Tensor x, str group) -> Tensor")
shared = Op("group_shared(Tensor x, str group) -> Tensor")
OPTIONS = (
    "vocab", "ignore_index", "label_smoothing", "logit_scale", "softcap", "z_loss", "stats",
    "group", "backend",
)  # fmt: skip


# The same number in all, and parts of it


def _total(a: Any) -> Tensor:
    found = a.x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(found, group=group_named(a.group))
    return found


def _keep_group(ctx: Any, a: Any, results: Any) -> None:
    ctx.group = a.group


# Forward and backward


def _forward(a: Any) -> tuple[Tensor, ...]:
    shards = Shards.of(a)
    t = targets_of(a, shards, a.logits.shape[1], real_dtype(a.logits.dtype))
    return tuple(merge(a, all_find(find(a, a.logits, t, shards), a.group), t, shards))


def _backward(a: Any) -> Tensor:
    shards = Shards.of(a)
    t = targets_of(a, shards, a.logits.shape[1], a.lse.dtype)
    return vocab_rows.gradient(
        a, a.logits, t, shards, (a.lse, a.lse_low), a.grad_loss, a.grad_lse, a.mass_elsewhere
    )


def _set_up(ctx: Any, a: Any, results: Any) -> None:
    ctx.mark_non_differentiable(
        results.lse_low, results.correct, results.entropy, results.mass_elsewhere
    )
    save(
        ctx, logits=a.logits, target=a.target, weight=a.weight, lse=results.lse,
        lse_low=results.lse_low, mass_elsewhere=results.mass_elsewhere,
    )  # fmt: skip
    ctx.options = [getattr(a, name) for name in OPTIONS]


def _derivative(ctx: Any, grad: Any) -> dict[str, Any]:
    kept = saved(ctx)
    grad_loss = kept["lse"].new_zeros(()) if grad.loss is None else grad.loss
    found = {}
    if ctx.wanted.logits:
        found["logits"] = backward(grad_loss, grad.lse, *kept.values(), *ctx.options)
    if ctx.wanted.target:
        a = forward.Arguments(kept["logits"], kept["target"], kept["weight"], *ctx.options)
        lse = (kept["lse"], kept["lse_low"])
        found["target"] = vocab_rows.target_gradient(
            a, kept["logits"], Shards.of(a), lse, grad_loss
        )
    return found


def _set_up_backward(ctx: Any, a: Any, results: Any) -> None:
    save(
        ctx, grad_loss=a.grad_loss, grad_lse=a.grad_lse, logits=a.logits, target=a.target,
        weight=a.weight,
    )  # fmt: skip
    ctx.options = [getattr(a, name) for name in OPTIONS]


def _second(ctx: Any, grad: Any) -> dict[str, Any]:
    kept = saved(ctx)
    a = forward.Arguments(kept["logits"], kept["target"], kept["weight"], *ctx.options)
    inputs = {"logits": kept["logits"]}
    if kept["target"].dim() == 2:
        inputs["target"] = kept["target"]
    upstream = {"grad_loss": kept["grad_loss"]}
    if kept["grad_lse"] is not None:
        upstream["grad_lse"] = kept["grad_lse"]

    def run(*learned: Tensor) -> tuple[Tensor, ...]:
        loss, lse = by_formula(a._replace(**dict(zip(inputs, learned, strict=True))))
        return (loss, lse)[: len(upstream)]

    return second_derivative(run, upstream, inputs, {"logits": grad.result})


class InPlace(Function):
    """Loss, lse, correct and entropy of rows; the logits become their gradient for one upstream."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, a: Any, upstream: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        shards = Shards.of(a)
        t = targets_of(a, shards, logits.shape[1], real_dtype(logits.dtype))
        merged = merge(a, all_find(find(a, logits, t, shards), a.group), t, shards)
        lse = (merged.lse, merged.lse_low)
        adjacent = logits.stride(1) == 1 or logits.shape[1] == 0
        made = vocab_rows.gradient(
            a, logits.detach(), t, shards, lse, upstream, None, merged.mass_elsewhere,
            in_place=adjacent,
        )  # fmt: skip
        if made.data_ptr() != logits.data_ptr():
            logits.detach().copy_(made)
        torch.autograd.graph.increment_version(logits)
        ctx.mark_non_differentiable(merged.lse, merged.correct, merged.entropy)
        # Saved after the write, so that any later one is caught.
        ctx.save_for_backward(logits.detach(), t.counted)
        ctx.upstream = upstream
        return merged.loss, merged.lse, merged.correct, merged.entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Any, *undefined: Any) -> Any:
        refuse_create_graph()
        if grad_loss is None:
            return None, None, None
        grad, counted = gradient_in_place(ctx)
        # Of an ignored row the upstream may be anything, and its gradient stays 0.
        factor = torch.where(counted, grad_loss / ctx.upstream, 1)
        one = torch_state.readable(factor) and bool((factor == factor[:1]).all())
        scale_in_place(grad, factor[0] if one and len(factor) else factor)
        return grad, None, None


def by_formula(a: Any) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of rows in torch's functions, with this process's scores in memory."""
    shards = Shards.of(a)
    t = targets_of(a, shards, a.logits.shape[1], real_dtype(a.logits.dtype))
    kept = t.counted[:, None] | a.logits.detach().isfinite().all(1, keepdim=True)
    z = formula.scores(torch.where(kept, a.logits, 0), a.logit_scale, a.softcap)
    lse = _lse_of_all(z, a.group, shards)
    local = None if a.weight is None else shared(a.weight, a.group)[shards.own]
    if a.target.dim() == 2:
        q = a.target.to(z.dtype) * (1 - a.label_smoothing) + a.label_smoothing / shards.vocab
        mass = q if local is None else q * local
        loss = total(_product_sum(mass, shared(lse, a.group)[:, None] - z), a.group)
    else:
        score = torch.zeros_like(lse)
        if z.shape[1]:
            score = torch.where(t.owned, z.gather(1, t.local[:, None]).squeeze(1), 0)
        loss = (1 - a.label_smoothing) * t.row_weight * (lse - total(score, a.group))
        if a.label_smoothing:
            weights = torch.ones_like(z) if local is None else local.expand_as(z)
            terms = _product_sum(weights, shared(lse, a.group)[:, None] - z)
            loss = loss + a.label_smoothing / shards.vocab * total(terms, a.group)
    if a.z_loss:
        loss = loss + a.z_loss * t.row_weight * lse**2
    return torch.where(t.counted, loss, 0), lse


def _product_sum(weight: Tensor, terms: Tensor) -> Tensor:
    """Of rows; a weight of 0 leaves even an infinite term out."""
    return torch.where(weight == 0, 0, weight * terms).sum(1)


def _lse_of_all(z: Tensor, group: str, shards: Shards) -> Tensor:
    """Each process puts its own beside those of the others, which are 0 to it."""
    own = formula.log_sum_exp(z) if z.shape[1] else z.new_full((z.shape[0],), -torch.inf)
    mine = torch.arange(shards.world, device=z.device)[:, None] == shards.rank
    # -inf times 0 is NaN: what is added up is finite.
    empty = own == -torch.inf
    of_all = total(torch.where(mine, torch.where(empty, 0, own), 0), group)
    lost = total((mine & empty).to(z.dtype), group)
    return formula.log_sum_exp(torch.where(lost > 0, -torch.inf, of_all).t())


def _shapes(a: Any) -> tuple[Tensor, ...]:
    rows, real = a.logits.shape[0], real_dtype(a.logits.dtype)
    new, of_stats = a.logits.new_empty, rows if a.stats else 0
    of_mass = rows if a.target.dim() == 2 else 0
    return (
        new(rows, dtype=real), new(rows, dtype=real), new(rows, dtype=real),
        new(of_stats, dtype=torch.bool), new(of_stats, dtype=real), new(of_mass, dtype=real),
    )  # fmt: skip


forward.shapes(_shapes)
backward.shapes(lambda a: torch.empty_like(a.logits))
total.shapes(lambda a: torch.empty_like(a.x))
shared.shapes(lambda a: torch.empty_like(a.x))
forward.differentiable(_set_up, _derivative)
backward.differentiable(_set_up_backward, _second)
total.differentiable(_keep_group, lambda ctx, grad: {"x": shared(grad.result, ctx.group)})
shared.differentiable(_keep_group, lambda ctx, grad: {"x": total(grad.result, ctx.group)})
for _device in ("cpu", "cuda"):
    forward.implement(_device, _forward)
    backward.implement(_device, _backward)
    total.implement(_device, _total)
    shared.implement(_device, lambda a: a.x.clone())
