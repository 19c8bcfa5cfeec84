"""The fastest GEMM for a tile of logits on this machine.

Three products make a linear cross-entropy: the logits x W^T, and of their gradient S the products
S W and S^T x. Two things are measured, each at its first use under one setting of torch's for
float32 products:

(a) `torch.mm` gives float32 to MKL, which is not at its best on every processor; oneDNN, which
    torch ships too, is reached by the op that torch.compile uses, and is fastest on tiles of some
    thousand columns. The private op is believed only if its result is right, and done without
    where it is missing.
(b) A CPU without instructions for 16-bit products makes them 6 to 180 times slower than float32's
    (Zen 3: 17, 0.7 and 5 GFLOP/s for the three products, 105 to 135 in float32). There a tile is
    float32, and what is multiplied is widened some rows at a time: `tile_dtype`.

Both libraries multiply float32 in fewer bits exactly where torch.mm does: where torch's switches
allow it (`float32_precision`) and the CPU has such products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from neglog.tiles import plan

COLUMNS = 4096  # of a oneDNN tile
PROBE_ROWS, PROBE_FEATURES, PROBE_VOCAB = 512, 768, 2 * COLUMNS
# The share of BLAS's time that oneDNN must stay below. On Zen 3 the two are level in the probe, and
# oneDNN a fifth slower in a tile of 32000 columns.
MARGIN = 0.9
# Of 16-bit numbers: small, as the slowest CPU seen takes 0.1 s for these three products.
PROBE_SMALL = (128, 256, 1024)
WIDENED_BYTES = 8 << 20  # of 16-bit numbers, what is widened at a time
# Multiplications below which BLAS runs unmeasured: either takes less than a millisecond, and the
# measurement half a second.
SMALL_PRODUCT = 1 << 26


def tile_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a tile of such numbers' products: theirs, or float32 where that is faster."""
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and x.is_cpu and float32_is_faster(x.dtype) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (n, V) = x (n, D) @ weight (V, D)^T + bias (V,), rounded once; `out` may be wider."""
    if out.dtype != x.dtype:
        linear_widened(x, weight, bias, out)
        return
    multiply = fastest_linear() if _may_use_onednn(x, out) else linear_by_blas
    multiply(x, weight, bias, out)


def product(s: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, D) = s (n, V) @ weight (V, D), rounded once; `s` may be wider than the others, and
    `out` than weight."""
    if s.dtype == weight.dtype == out.dtype:
        torch.mm(s, weight, out=out)
        return
    if out.dtype != weight.dtype:
        add_product(s, weight, out, True)
        return
    total = torch.empty_like(out, dtype=s.dtype)
    add_product(s, weight, total, True)
    out.copy_(total)


def add_product(s: Tensor, weight: Tensor, out: Tensor, first: bool) -> None:
    """out (n, D) += s (n, V) @ weight (V, D), or = if it is the first.

    `out` may be wider than the others, or `s` and `out` wider than weight.
    """
    if s.dtype != weight.dtype:
        for part, wide in widened(weight, s.dtype):
            add_product(s[:, part], wide, out, first and part.start == 0)
    elif out.dtype == s.dtype:
        torch.addmm(out, s, weight, beta=0 if first else 1, out=out)
    elif s.is_cuda:
        _accumulate(s, weight, out, first)
    else:
        _store_or_add(out, _multiply_wide(s, weight, out.dtype), first)


def add_outer(s: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
    """out (V, D) += s (n, V)^T @ x (n, D), or = if it is the first.

    `out` may be wider than the others, or `s` and `out` wider than x.
    """
    x = x.to(s.dtype)
    multiply = fastest_add_outer() if _may_use_onednn(x, s) else add_outer_by_blas
    multiply(s, x, out, first)


def describe() -> str:
    """What multiplies what, for `info`."""
    names: dict[Any, str] = {linear_by_blas: "torch.mm", linear_by_onednn: "oneDNN"}
    names |= {add_outer_by_blas: "torch.mm", add_outer_by_onednn: "oneDNN"}
    short = [
        f"{str(dtype)[6:]} {'in float32' if float32_is_faster(dtype) else 'torch.mm'}"
        for dtype in (torch.bfloat16, torch.float16)
    ]
    long = f"float32 logits {names[fastest_linear()]}, gradient {names[fastest_add_outer()]}"
    return ", ".join([long, *short])


def _may_use_onednn(x: Tensor, logits: Tensor) -> bool:
    """Whether oneDNN may make a product of x (n, D) that makes or takes logits (n, V)."""
    if x.dtype != torch.float32 or not x.is_cpu or logits.numel() * x.shape[1] < SMALL_PRODUCT:
        return False
    # Without oneDNN torch.mm has no bfloat16 product, whatever the switches say.
    if not torch.backends.mkldnn.enabled:
        return False
    # A choice by measurement may differ in the next process, and with it the last bits.
    return _fixed_matmul() is None and not torch.are_deterministic_algorithms_enabled()


def _fixed_matmul() -> str | None:
    """What NEGLOG_MATMUL in the environment asks for."""
    fixed = os.environ.get("NEGLOG_MATMUL")
    if fixed not in (None, "blas"):
        raise ValueError(f"NEGLOG_MATMUL: expected blas, got {fixed!r}")
    return fixed


# By BLAS, by oneDNN, and in a wider dtype


def linear_widened(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    x = x.to(out.dtype)
    for part, wide in widened(weight, out.dtype):
        linear(x, wide, None if bias is None else bias[part].to(out.dtype), out[:, part])


def widened(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """x (V, D) in a wider dtype, some rows at a time, each over the last."""
    height = plan.rows_per_tile(len(x), x.shape[1] * x.itemsize, WIDENED_BYTES)
    room = x.new_empty(height, x.shape[1], dtype=dtype)
    for part in plan.row_tiles(len(x), height):
        yield part, room[: part.stop - part.start].copy_(x[part])


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
    if s.is_cuda:
        _accumulate(s.t(), x, out, first)
        return
    for start in range(0, s.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        _store_or_add(out[part], _multiply_wide(s[:, part].t(), x, out.dtype), first)


def add_outer_by_onednn(s: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
    for start in range(0, s.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        _store_or_add(out[part], _onednn(s[:, part].t(), x.t(), None), first)


def _accumulate(a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
    """out (float32) += a @ b of 16 bits, by the product itself: a wide result beside `out`, and its
    addition, would be three more passes over as many numbers. On CUDA alone."""
    torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=0 if first else 1, out=out)


def _multiply_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b on the CPU, which rounds it to the dtype of a and b; a sum over rows may be beyond
    float16's 65504. Into memory of its own: autocast would round the float32 product too."""
    wide = a.dtype
    if wide == torch.float16:  # whose digits a float32 product in bfloat16 would lose
        wide = torch.float64 if float32_precision() == "bf16" else dtype
    return torch.mm(a.to(wide), b.to(wide), out=a.new_empty(a.shape[0], b.shape[1], dtype=wide))


def _store_or_add(out: Tensor, tile: Tensor, first: bool) -> None:
    if first:
        out.copy_(tile)
    else:
        out.add_(tile)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a @ b^T + bias"""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


# The choice between them


def float32_precision() -> str:
    """In what torch.mm may multiply float32 on the CPU: "bf16" or "tf32" where a switch allows it,
    as set_float32_matmul_precision("medium") does; else "ieee" or "none".

    torch.backends.mkldnn.matmul.fp32_precision, in a tenth of its 2 microseconds.
    """
    return torch._C._get_fp32_precision_getter("mkldnn", "matmul")


@cache
def _measured(probe: Callable[..., Any], precision: str, *arguments: Any) -> Any:
    """What a probe finds under one setting of the switches: under another it may be slower, or have
    fewer digits than torch.mm."""
    return probe(*arguments)


def fastest_linear() -> Callable[..., None]:
    """What makes logits fastest here, by a measurement."""
    return _measured(_probe_linear, float32_precision())


def _probe_linear() -> Callable[..., None]:
    x, weight = _random(PROBE_ROWS, PROBE_FEATURES), _random(PROBE_VOCAB, PROBE_FEATURES)
    out = x.new_empty(PROBE_ROWS, PROBE_VOCAB)
    return _faster((linear_by_blas, linear_by_onednn), (x, weight, None, out), out)


def fastest_add_outer() -> Callable[..., None]:
    """What adds to a weight's gradient fastest here, by a measurement."""
    return _measured(_probe_add_outer, float32_precision())


def _probe_add_outer() -> Callable[..., None]:
    s, x = _random(PROBE_ROWS, PROBE_VOCAB), _random(PROBE_ROWS, PROBE_FEATURES)
    out = x.new_zeros(PROBE_VOCAB, PROBE_FEATURES)
    return _faster((add_outer_by_blas, add_outer_by_onednn), (s, x, out, True), out)


def float32_is_faster(dtype: torch.dtype) -> bool:
    """Whether three 16-bit products took less time through float32 when they were tried."""
    precision = float32_precision()
    if dtype == torch.float16 and precision == "bf16":  # as in _multiply_wide
        return False
    return _measured(_probe_float32, precision, dtype)


# As torch.compiler.assume_constant_result does it, which imports torch's compiler: the answer is a
# constant of a graph, which cannot hold the measurement.
float32_is_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _probe_float32(dtype: torch.dtype) -> bool:
    # The first use may come while torch traces or transforms a function. The modes that do so
    # belong to a thread, and a new one has none.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_float32_wins, dtype).result()


def _float32_wins(dtype: torch.dtype) -> bool:
    rows, features, vocab = PROBE_SMALL
    x, weight, s = (
        _random(*shape).to(dtype) for shape in ((rows, features), (vocab, features), (rows, vocab))
    )
    grad_x = torch.empty_like(x)
    grad_weight = x.new_empty(vocab, features, dtype=torch.float32)

    def products(s: Tensor) -> None:
        linear(x, weight, None, torch.empty_like(s))
        product(s, weight, grad_x)
        add_outer(s, x, grad_weight, True)

    narrow, wide = (partial(products, tile) for tile in (s, s.float()))
    with torch.no_grad():
        narrow(), wide()
        times = _times((narrow, wide), 2)
    return times[wide] < times[narrow]


def _random(*shape: int) -> Tensor:
    """float32 on the CPU, whatever torch's defaults are."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _faster(candidates: tuple[Any, Any], arguments: tuple, out: Tensor) -> Any:
    """The second if it is right and clearly faster; the first is known to be right."""
    certain, other = candidates
    with torch.no_grad():
        certain(*arguments)
        expected = out.clone()
        try:
            other(*arguments)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return certain
        if not torch.allclose(out, expected, rtol=1e-4, atol=1e-3):
            return certain
        times = _times(tuple(partial(run, *arguments) for run in candidates), 3)
    of_certain, of_other = times.values()
    return other if of_other < MARGIN * of_certain else certain


def _times(runs: tuple[Any, ...], rounds: int) -> dict[Any, float]:
    """The shortest time of each, taken in turn."""
    times = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for run in runs:
            start = perf_counter()
            run()
            times[run] = min(times[run], perf_counter() - start)
    return times
