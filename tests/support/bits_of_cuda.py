"""The calls of `bits` that run the CUDA ops, emulated on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neglog.ops.kl import schema as kl
from neglog.ops.linear_nll import cuda as linear_cuda
from neglog.ops.linear_nll import schedule as linear_schedule
from neglog.ops.linear_nll import schema as linear_schema
from neglog.ops.linear_nll.cuda import CudaRows
from neglog.ops.pairs import schedule, schema
from neglog.ops.pairs.cuda import CudaTiles
from neglog.ops.pairs.schema import Pairs
from neglog.tiles import gemm
from tests.support import emulated
from tests.support.bits import normal

NONE, MEAN, SUM = 0, 1, 2
OPTIONS = {
    "plain": (0.0, 1.0, 0.0, 0.0),
    "smoothing": (0.1, 1.0, 0.0, 0.0),
    "all": (0.2, 0.7, 5.0, 0.1),
}
TILE = 97  # columns: several tiles across, not aligned to any vector

Call = tuple[str, list[Tensor | None]]


def calls(dtype: torch.dtype) -> Iterator[Call]:
    ops = emulated.operators()
    CudaTiles.ops = linear_cuda.ops = ops
    gemm.float32_is_faster = lambda dtype: False  # type: ignore[assignment]
    schedule.WIDTH = schedule.CUDA_WIDTH = TILE
    yield from _nll(ops, dtype)
    yield from _linear(dtype)
    yield from _pairs(dtype)
    yield from _kl(ops, dtype)


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _nll(ops: Any, dtype: torch.dtype) -> Iterator[Call]:
    real = _real(dtype)
    for rows, vocab in ((7, 257), (3, 2049), (2, 17001)):
        logits = (3 * normal(rows, vocab, seed=1)).to(dtype)
        index = (normal(rows, seed=2).abs() * 1e6).long() % vocab
        index[1] = -100
        weight = (normal(vocab, seed=3).abs() + 0.5).to(real)
        probabilities = normal(rows, vocab, seed=4).softmax(1).to(dtype)
        for name, options in OPTIONS.items():
            for kind, target in (("index", index), ("probabilities", probabilities)):
                values = (MEAN, -100, *options)
                out = ops.nll(logits, target, weight, None, None, *values, True, "")
                upstream = torch.tensor(0.7, dtype=real)
                lse, lse_low, total_weight = out[1:4]
                kept = (logits, target, weight, None, lse, lse_low, None, total_weight)
                grad = ops.nll_backward(upstream, None, None, *kept, *values, "")
                yield f"nll, {name}, {kind}, {rows} x {vocab}", [*out, grad]
            memory = logits.clone()
            out = ops.nll_(memory, index, weight, None, None, SUM, -100, *options, True, "")
            ops.nll_scale_(memory, torch.linspace(-1, 2, rows, dtype=real))
            yield f"nll in place, {name}, {rows} x {vocab}", [*out, memory]


def _linear(dtype: torch.dtype) -> Iterator[Call]:
    rows, features, vocab = 150, 6, 40
    real = _real(dtype)
    head = [normal(*s, seed=i).to(dtype) for i, s in enumerate(((rows, features), (vocab, features), (vocab,)))]  # fmt: skip # noqa: E501
    target = torch.arange(rows) % vocab
    target[::7] = -100
    weight = (normal(vocab, seed=3).abs() + 0.5).to(real)
    for reduction in (NONE, MEAN, SUM):
        tail = (reduction, -100, *OPTIONS["all"])
        wanted = [reduction != NONE] * 3
        tiles = (1, dtype, 0.0, "")
        given = (*head, target, weight, None, None, *tail, True, wanted, *tiles)
        out = linear_schedule.forward(CudaRows, linear_schema.forward.Arguments(*given))
        grad = normal(*out[0].shape, seed=5).to(real)
        for name, grad_lse in (("loss", None), ("lse", normal(rows, seed=6).to(real))):
            given = (
                grad, grad_lse, None, *head, target, weight, None, out[2], *out[6:], *tail,
                [True] * 3, *tiles,
            )  # fmt: skip
            grads = linear_schedule.backward(CudaRows, linear_schema.backward.Arguments(*given))
            yield f"linear_nll, {reduction}, through {name}", [*out, *grads]


KINDS = ("scores", "probabilities", "named")


def _kl(ops: Any, dtype: torch.dtype) -> Iterator[Call]:
    for rows, vocab in ((7, 257), (3, 2049)):
        logits = (3 * normal(rows, vocab, seed=1)).to(dtype)
        scores = 2 * normal(rows, vocab, seed=2)
        logs, ids = scores.log_softmax(1).topk(9, 1)
        target = torch.arange(rows) * 31
        target[1] = -100
        for kind, given in zip(KINDS, (scores, scores.softmax(1), logs), strict=True):
            for beta in (0.0, 0.3, 1.0):
                options = kl.Options(
                    -100, kind == KINDS[1], beta, 2.0, 0.7, 0.3, 0.7, 5.0, 0.5, 0.0
                )
                gradient = torch.empty_like(logits)
                named = ids if kind == KINDS[2] else None
                inputs = (logits, given.to(dtype), named, target, None, None, gradient)
                out = ops.kl_rows(*inputs, *options)
                yield f"kl, {kind}, {beta}, {rows} x {vocab}", [*out, gradient]


FORMS: dict[str, dict[str, Any]] = {
    "rows": {},
    "columns": {"columns": True, "positive": True},
    "scales, bias": {"columns": True, "positive": True, "scales": True, "bias": True},
    "excluded": {"columns": True, "positive": True, "excluded": True},
    "groups": {"columns": True, "positive": True, "groups": True, "scales": True},
    "symmetric": {"symmetric": True, "positive": True, "excluded": True},
}


def _problem(dtype: torch.dtype, rows: int, keys: int, form: dict[str, Any]) -> Pairs:
    real, every = _real(dtype), torch.arange(rows)
    symmetric = form.get("symmetric", False)
    query, key = (
        torch.nn.functional.normalize(normal(n, 5, seed=n + 1), dim=1).to(dtype)
        for n in (rows, keys)
    )
    scale = torch.linspace(5, 30, rows) if form.get("scales") else torch.tensor(30.0)
    return Pairs(
        query=query, key=query if symmetric else key, scale=scale.to(real),
        bias=(20 * normal(keys, seed=3)).to(real) if form.get("bias") else None,
        positive=(every.roll(rows // 2) if symmetric else (every * 3 + 1) % keys)
        if form.get("positive") else None,
        excluded=(every if symmetric else (every * 7) % keys) if form.get("excluded") else None,
        query_group=every % 5 if form.get("groups") else None,
        key_group=torch.arange(keys) % 5 if form.get("groups") else None,
        columns=form.get("columns", False), symmetric=symmetric, workspace=1, tile_dtype=dtype,
        backend="",
    )  # fmt: skip


def _pairs(dtype: torch.dtype) -> Iterator[Call]:
    for name, form in FORMS.items():
        rows, keys = (130, 130) if form.get("symmetric") else (130, 300)
        given = _problem(dtype, rows, keys, form)
        for keep in (False, True):
            # At a workspace of a byte nothing was ever kept.
            out = schedule.forward(CudaTiles, schema.forward.Arguments(*given, False))
            upstream = [normal(len(x), seed=i).to(x.dtype) for i, x in enumerate(out[:5])]
            saved = (out[2], out[3], out[5], out[6], out[7])
            wanted = [True, not given.symmetric, True]
            arguments = schema.backward.Arguments(*upstream, *given, *saved, wanted)
            grads = schedule.backward(CudaTiles, arguments)
            yield f"pairs, {name}, keep {keep}", [*out[:7], *grads]
    given = _problem(dtype, 130, 300, {"positive": True})
    bias = torch.tensor(3.0, dtype=_real(dtype))
    inputs = (given.query, given.key, given.scale, bias, given.positive)
    arguments = schema.sigmoid.Arguments(*inputs, None, None, 1, dtype, "", [True] * 4)
    yield "siglip", list(schedule.sigmoid(CudaTiles, arguments))
