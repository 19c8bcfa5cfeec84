"""The fastest GEMM for a tile of logits on this machine.

Three products make a linear cross-entropy: the logits x W^T, and of their gradient S the products
S W and S^T x. `torch.mm` gives float32 to MKL, which is not at its best on every processor; oneDNN,
which torch ships too, is reached by the op that torch.compile uses, and is fastest on tiles of some
thousand columns. Which of the two wins is measured for each product at its first use. The private
op is believed only if its result is right, and done without where it is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

COLUMNS = 4096  # of a oneDNN tile
PROBE_ROWS, PROBE_FEATURES, PROBE_VOCAB = 256, 768, 2 * COLUMNS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (n, V) = x (n, D) @ weight (V, D)^T + bias (V,), rounded once."""
    way = fastest_linear() if _has_choice(x) else linear_by_blas
    way(x, weight, bias, out)


def product(s: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, D) = s (n, V) @ weight (V, D)."""
    torch.mm(s, weight, out=out)


def add_product(s: Tensor, weight: Tensor, out: Tensor, first: bool) -> None:
    """out (n, D) += s (n, V) @ weight (V, D), or = if it is the first; `out` may be wider."""
    if out.dtype == s.dtype:
        torch.addmm(out, s, weight, beta=0 if first else 1, out=out)
    else:
        _put(out, _wide(s, weight, out.dtype), first)


def add_outer(s: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
    """out (V, D) += s (n, V)^T @ x (n, D), or = if it is the first; `out` may be wider."""
    way = fastest_add_outer() if _has_choice(x) else add_outer_by_blas
    way(s, x, out, first)


def describe() -> str:
    """What multiplies float32, for `info`."""
    names: dict[Any, str] = {linear_by_blas: "torch.mm", linear_by_onednn: "oneDNN"}
    names |= {add_outer_by_blas: "torch.mm", add_outer_by_onednn: "oneDNN"}
    return f"logits {names[fastest_linear()]}, gradient {names[fastest_add_outer()]}"


def _has_choice(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


# The two ways


def linear_by_blas(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    # The op makes its result in memory of its own, which is kept to that of 512 full rows.
    columns = max(COLUMNS // 4, COLUMNS * 512 // max(1, len(x)))
    for start in range(0, len(weight), columns):
        part = slice(start, start + columns)
        out[:, part] = _onednn(x, weight[part], None if bias is None else bias[part])


def add_outer_by_blas(s: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
    if out.dtype == s.dtype:
        out.addmm_(s.t(), x, beta=0 if first else 1)
        return
    for start in range(0, s.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        _put(out[part], _wide(s[:, part].t(), x, out.dtype), first)


def add_outer_by_onednn(s: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
    for start in range(0, s.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        _put(out[part], _onednn(s[:, part].t(), x.t(), None), first)


def _wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, in `dtype` where torch can: on CUDA. The CPU rounds it to that of a and b."""
    return torch.mm(a, b, dtype) if a.is_cuda else torch.mm(a, b)


def _put(out: Tensor, tile: Tensor, first: bool) -> None:
    if first:
        out.copy_(tile)
    else:
        out.add_(tile)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a @ b^T + bias"""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


# The choice between them


@cache
def fastest_linear() -> Callable[..., None]:
    """The way to make logits that ran fastest when it was tried."""
    x, weight = _random(PROBE_ROWS, PROBE_FEATURES), _random(PROBE_VOCAB, PROBE_FEATURES)
    out = torch.empty(PROBE_ROWS, PROBE_VOCAB)
    return _faster((linear_by_blas, linear_by_onednn), (x, weight, None, out), out)


@cache
def fastest_add_outer() -> Callable[..., None]:
    """The way to add to a weight's gradient that ran fastest when it was tried."""
    s, x = _random(PROBE_ROWS, PROBE_VOCAB), _random(PROBE_ROWS, PROBE_FEATURES)
    out = torch.zeros(PROBE_VOCAB, PROBE_FEATURES)
    return _faster((add_outer_by_blas, add_outer_by_onednn), (s, x, out, True), out)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _faster(ways: tuple[Any, Any], arguments: tuple, out: Tensor) -> Any:
    """The second way if it is right and faster; the first is known to be right."""
    certain, other = ways
    with torch.no_grad():
        certain(*arguments)
        expected = out.clone()
        try:
            other(*arguments)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return certain
        if not torch.allclose(out, expected, rtol=1e-4, atol=1e-3):
            return certain
        times: dict[Any, list[float]] = {certain: [], other: []}
        for _ in range(3):
            for way, seconds in times.items():
                start = perf_counter()
                way(*arguments)
                seconds.append(perf_counter() - start)
    return min(ways, key=lambda way: min(times[way]))
