"""Rows whose classes are shared out to the processes of a group: what each finds of its own, how
that is merged, and the gradient of its logits.

A row's scores are z, p its softmax over all V classes, w the class weights, eps = label_smoothing.
A process with the classes C finds of each row, by the kernels of nll,

    lse_C = log sum_C e^z     z_t if the target t is in C     s_C = sum_C w_c (lse_C - z_c)

and sends a few numbers, O(rows) bytes. From those of all follow the row's log-sum-exp and loss,

    lse = log sum_C e^lse_C
    sum_c w_c (lse - z_c) = sum_C (s_C + W_C (lse - lse_C))    with W_C = sum_C w_c

and then each process has the gradient of its own logits: the formula of GradientWeights in
kernels/cython/row.hpp, with p = e^(z - lse).

Digits: a log-sum-exp is the sum of two numbers, and is merged in double relative to the largest, so
that a loss near 0 keeps its digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from neglog.distributed.groups import group_named
from neglog.ops.dtypes import real_dtype, softcap_in
from neglog.ops.nll import autograd as _autograd  # noqa: F401 - implements the ops
from neglog.ops.nll import cpu, formula, schema
from neglog.ops.nll.schema import NONE

IGNORED = -100  # of a target that a kernel sees


def shard_of(vocab: int, rank: int, world: int) -> slice:
    """The classes of a process: as torch.chunk and DTensor share them out."""
    size = -(-vocab // world)
    return slice(min(vocab, rank * size), min(vocab, (rank + 1) * size))


class Shards(NamedTuple):
    """The classes of this process, and what all know of those of the others."""

    vocab: int
    rank: int
    world: int

    @classmethod
    def of(cls, a: Any) -> Shards:
        """Of the arguments vocab and group of an op."""
        group = group_named(a.group)
        return cls(int(a.vocab), distributed.get_rank(group), distributed.get_world_size(group))

    @property
    def own(self) -> slice:
        return shard_of(self.vocab, self.rank, self.world)

    def owners(self, target: Tensor) -> Tensor:
        """The rank whose class a target is."""
        return target // max(1, -(-self.vocab // self.world))

    def weight_sums(self, weight: Tensor | None, like: Tensor) -> Tensor:
        """(world,) of the class weights of each process, in double."""
        sums = []
        for rank in range(self.world):
            part = shard_of(self.vocab, rank, self.world)
            size = part.stop - part.start
            one = like.new_full((), size, dtype=torch.float64)
            sums.append(one if weight is None else weight[part].sum(dtype=torch.float64))
        return torch.stack(sums)

    def own_weight(self, weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight[self.own]


class Targets(NamedTuple):
    """What a row's target is to this process."""

    counted: Tensor  # (N,) bool
    owned: Tensor  # (N,) bool: its class is one of this process
    local: Tensor  # (N,) its place among them, 0 where it is another's
    row_weight: Tensor  # (N,) the class weight of a target, 0 where ignored


def targets_of(a: Any, shards: Shards, columns: int, real: torch.dtype) -> Targets:
    target = a.target
    if target.dim() == 2:  # probabilities
        every = torch.ones(target.shape[0], dtype=torch.bool, device=target.device)
        zero = torch.zeros(target.shape[0], dtype=torch.int64, device=target.device)
        return Targets(every, ~every, zero, every.to(real))
    counted = target != a.ignore_index
    place = target - shards.own.start
    owned = counted & (place >= 0) & (place < columns)
    local = torch.where(owned, place, 0)
    row_weight = formula.row_weights(target, counted, a.weight, real)
    return Targets(counted, owned, local, row_weight)


# What a process finds, (N, NUMBERS)

HIGH, LOW, SCORE, SMOOTH, MASS, ENTROPY, MAXIMUM, CORRECT = range(8)
NUMBERS = 8


def numbers_to_send(a: Any) -> list[int]:
    """Which of them a call needs."""
    found = [HIGH, LOW, SCORE]
    if a.target.dim() == 2:
        found += [SMOOTH, MASS]
    elif a.label_smoothing:
        found.append(SMOOTH)
    return [*found, ENTROPY, MAXIMUM, CORRECT] if a.stats else found


def find(a: Any, logits: Tensor, t: Targets, shards: Shards) -> Tensor:
    """(N, k) in the accumulation dtype: the numbers to send, of the logits (N, V_C)."""
    real, rows, columns = real_dtype(logits.dtype), logits.shape[0], logits.shape[1]
    wanted = numbers_to_send(a)
    if not columns:
        found = logits.new_zeros(rows, NUMBERS, dtype=real)
        found[:, [HIGH, MAXIMUM]] = -torch.inf
        return found[:, wanted]
    probabilities = a.target.dim() == 2
    smoothing, weight = 0.0, None
    if probabilities:
        target, weight = distribution(a, shards), shards.own_weight(a.weight)
    else:
        # Of a target elsewhere any class will do: it is the log-sum-exp that is asked for.
        target = t.local if a.stats else torch.where(t.counted, t.local, IGNORED)
        if a.label_smoothing:
            smoothing, weight = 1.0, shards.own_weight(a.weight)
    options = (NONE, IGNORED, smoothing, a.logit_scale, a.softcap, 0.0)
    made = schema.forward(logits, target, weight, None, None, *options, a.stats, a.backend)
    low = torch.where(made.lse == -torch.inf, 0, made.lse_low)  # where it is no number
    parts: dict[int, Tensor] = {HIGH: made.lse, LOW: low}
    score = formula.scores(logits.gather(1, t.local[:, None]), a.logit_scale, a.softcap)
    parts[SCORE] = torch.where(t.owned, score.squeeze(1), 0)
    if SMOOTH in wanted:  # the kernel's own is divided by its classes
        parts[SMOOTH] = made.loss if probabilities else made.loss * columns
    if MASS in wanted:
        parts[MASS] = _mass(target, weight, real)
    if a.stats:
        plain = a.logit_scale == 1 and a.softcap == 0
        z = logits if plain else formula.scores(logits, a.logit_scale, a.softcap)
        parts |= {ENTROPY: made.entropy, MAXIMUM: z.amax(1), CORRECT: made.correct & t.owned}
    return torch.stack([parts[place].to(real) for place in wanted], 1)


def distribution(a: Any, shards: Shards) -> Tensor:
    """The smoothed probabilities of this process's classes."""
    if not a.label_smoothing:
        return a.target
    real = a.target.to(real_dtype(a.target.dtype))
    smoothed = real * (1 - a.label_smoothing) + a.label_smoothing / shards.vocab
    return smoothed.to(a.target.dtype)


def _mass(probabilities: Tensor, weight: Tensor | None, real: torch.dtype) -> Tensor:
    """sum_c w_c q'_c of each row."""
    if weight is None:
        return probabilities.sum(1, dtype=real)
    return probabilities.to(real) @ weight


class Merged(NamedTuple):
    """Of each row, (N,): its loss, log-sum-exp, and the mass of other processes' probabilities."""

    loss: Tensor
    lse: Tensor
    lse_low: Tensor
    correct: Tensor
    entropy: Tensor
    mass_elsewhere: Tensor


def merge(a: Any, sent: Tensor, t: Targets, shards: Shards) -> Merged:
    """Of what all processes sent, (world, N, k)."""
    real, wanted = sent.dtype, numbers_to_send(a)
    of = {name: sent[:, :, at].double() for at, name in enumerate(wanted)}
    top, which = of[HIGH].max(0)
    base = torch.where(top == -torch.inf, 0, top)
    top_low = of[LOW].gather(0, which[None]).squeeze(0)
    distance = (of[HIGH] - base) + (of[LOW] - top_low)  # of each process's from the largest
    others = torch.where(_is(which, shards.world), 0, distance.exp()).sum(0)
    beyond = torch.where(top == -torch.inf, 0, top_low + torch.log1p(others))
    high = (top + beyond).to(real)
    low = _rest(top, beyond, high.double()).to(real)
    lse = high.double() + low.double()
    share = torch.exp(distance - (beyond - top_low))  # of the softmax, of each process's classes
    mass_elsewhere = sent.new_empty(0)
    if MASS in of:
        loss = _of_parts(of[SMOOTH], of[MASS], beyond - top_low - distance)
        mass_elsewhere = (of[MASS].sum(0) - of[MASS][shards.rank]).to(real)
    else:
        loss = (1 - a.label_smoothing) * t.row_weight * ((top - of[SCORE].sum(0)) + beyond)
        if a.label_smoothing:
            sums = shards.weight_sums(a.weight, sent)[:, None].expand_as(of[SMOOTH])
            smooth = _of_parts(of[SMOOTH], sums, beyond - top_low - distance)
            loss = loss + a.label_smoothing / shards.vocab * smooth
    if a.z_loss:
        loss = loss + a.z_loss * t.row_weight * lse**2
    loss = torch.where(t.counted, loss, 0).to(real)
    correct, entropy = sent.new_empty(0, dtype=torch.bool), sent.new_empty(0)
    if a.stats:
        correct = _correct(a, of, t, shards)
        term = torch.where(share == 0, 0, share * (of[ENTROPY] - share.log()))
        entropy = term.sum(0).to(real)
    return Merged(loss, high, low, correct, entropy, mass_elsewhere)


def _is(which: Tensor, world: int) -> Tensor:
    """(world, N) bool: whether a process is that of `which`."""
    return torch.arange(world, device=which.device)[:, None] == which


def _rest(x: Tensor, y: Tensor, total: Tensor) -> Tensor:
    """x + y - total, what rounding left out; 0 where the sum is no number."""
    grown = total - x
    return ((x - (total - grown)) + (y - grown)).nan_to_num(0.0, 0.0, 0.0)


def _of_parts(smooth: Tensor, weights: Tensor, distance: Tensor) -> Tensor:
    """sum_C (s_C + W_C (lse - lse_C)): inf where all scores of classes with a weight are -inf."""
    part = smooth + weights * distance
    part = torch.where(distance == torch.inf, torch.inf, part)
    return torch.where(weights == 0, 0, part).sum(0)


def _correct(a: Any, of: dict[int, Tensor], t: Targets, shards: Shards) -> Tensor:
    """Whether the target is what argmax returns: the first of the largest, and none is NaN."""
    if a.target.dim() == 2:
        return torch.zeros_like(t.counted)
    owner = shards.owners(torch.where(t.counted, a.target, 0))
    ranks = torch.arange(shards.world, device=owner.device)[:, None]
    score, maximum = of[SCORE].sum(0), of[MAXIMUM]
    beaten = torch.where(ranks < owner, maximum >= score, maximum > score)
    own = (of[CORRECT] != 0).any(0)
    return t.counted & own & ~(beaten & (ranks != owner)).any(0) & ~maximum.isnan().any(0)


def all_find(found: Tensor, group: str) -> Tensor:
    """(world, N, k) of what each process found: the one collective of a forward."""
    to = group_named(group)
    parts = list(found.new_empty(distributed.get_world_size(to), *found.shape).unbind())
    distributed.all_gather(parts, found.contiguous(), to)
    return torch.stack(parts)


# Gradient


def gradient(
    a: Any, logits: Tensor, t: Targets, shards: Shards, lse: tuple[Tensor, Tensor],
    upstream: Tensor, grad_lse: Tensor | None, mass_elsewhere: Tensor, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """Of the logits (N, V_C), for upstream (N,) or () of the rows' losses, and grad_lse (N,) of
    their log-sum-exps. In place: where the logits lie, on the CPU."""
    high, low = lse
    real, columns = high.dtype, logits.shape[1]
    if not columns:
        return torch.empty_like(logits)
    g = torch.where(t.counted, upstream.to(real), 0)
    softmax = 2 * a.z_loss * g * t.row_weight * high if a.z_loss else torch.zeros_like(g)
    if grad_lse is not None:
        softmax = softmax + grad_lse
    smoothing, weight, fixed = 0.0, None, None
    if a.target.dim() == 2:
        target, weight = distribution(a, shards), shards.own_weight(a.weight)
        grad_loss, through_lse = g, softmax + g * mass_elsewhere
    elif a.label_smoothing:
        uniform = g * (a.label_smoothing / shards.vocab)
        sums = shards.weight_sums(a.weight, logits)
        smoothing, weight = 1.0, shards.own_weight(a.weight)
        of_target = g * (1 - a.label_smoothing) * t.row_weight
        softmax = softmax + uniform * sums.sum().to(real)
        # The kernel adds its own classes' part of what smoothing adds to the softmax's weight.
        grad_loss = uniform * columns
        through_lse = softmax + of_target - uniform * sums[shards.rank].to(real)
        target = torch.where(t.counted, t.local, IGNORED)
        fixed = _at_target(a, logits, t, (high, low), softmax, of_target, uniform)
    else:
        of_target = g * t.row_weight
        grad_loss = torch.where(t.owned, of_target, 0)
        through_lse = torch.where(t.owned, softmax, softmax + of_target)
        target = torch.where(t.counted, t.local, IGNORED)
    one = high.new_ones(())
    options = (NONE, IGNORED, smoothing, a.logit_scale, a.softcap, 0.0, a.backend)
    of_rows = (logits, target, weight, None, high, low, None, one)
    given = (grad_loss, through_lse, None, *of_rows, *options)
    if in_place and logits.is_cpu:
        made = cpu.backward(schema.backward.Arguments(*given), 1.0, logits)
    else:
        made = schema.backward(*given)
    if fixed is not None:
        place = t.local[:, None]
        value = torch.where(t.owned, fixed.to(made.dtype), made.gather(1, place).squeeze(1))
        made.scatter_(1, place, value[:, None])
    return made


def _at_target(
    a: Any, logits: Tensor, t: Targets, lse: tuple[Tensor, Tensor], softmax: Tensor,
    of_target: Tensor, uniform: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient at each target, (N,), in double: p - 1 would lose its digits as p nears 1."""
    x = logits.gather(1, t.local[:, None]).to(lse[0].dtype)
    z = formula.scores(x, a.logit_scale, a.softcap).double().squeeze(1)
    log_p = (z - lse[0].double()) - lse[1].double()
    class_weight = 1.0 if a.weight is None else t.row_weight
    value = softmax * log_p.exp() + of_target * torch.expm1(log_p) - uniform * class_weight
    cap = softcap_in(x.dtype, a.softcap)
    if cap:
        decay = torch.exp(-2 * (x.double().squeeze(1) * a.logit_scale / cap).abs())
        value = value * 4 * decay / (1 + decay) ** 2
    return value * a.logit_scale


def target_gradient(
    a: Any, logits: Tensor, shards: Shards, lse: tuple[Tensor, Tensor], upstream: Tensor
) -> Tensor:
    """Of probabilities: -w (1 - label_smoothing) log p, times the upstream."""
    z = formula.scores(logits, a.logit_scale, a.softcap)
    log_p = (z - lse[0][:, None]) - lse[1][:, None]
    weight = shards.own_weight(a.weight)
    if weight is not None:
        log_p = log_p * weight
    return (upstream.expand(len(z))[:, None] * (a.label_smoothing - 1) * log_p).to(a.target.dtype)
