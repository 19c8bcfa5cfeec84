"""Each loss on the GPU at hand, beside torch's functions in float64: right before fast.

python -m neglog.bench.smoke [--device cpu] [--small]

Each is called five times, with the upstream gradients 1, 1, 0.5, 0.5 and 3: a gradient that was
formed in the forward is handed over, or formed again. What the allocator gives was filled with NaN
before. A line a case, and status 1 where one is wrong: the losses, or a gradient by its largest
number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import neglog
from neglog import dispatch

UPSTREAMS = (1.0, 1.0, 0.5, 0.5, 3.0)
# Of a gradient, rounded once or, in the losses with matmuls, some times more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 4e-3}
POISON = 1 << 28
OF_ROWS: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "in place": {"inplace_backward": True},
    "statistics": {"return_stats": True},
    "smoothing, z_loss": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "softcap, sum": {"softcap": 30.0, "reduction": "sum"},
}

Loss = Callable[..., Tensor]


class Case(NamedTuple):
    """A loss of tensors that learn."""

    name: str
    loss: Loss
    tensors: list[Tensor]


def cases(device: str, small: bool) -> Iterator[Case]:
    """Rows in a cache, in one block's shared memory, in clusters', and too long for them; columns
    of a padded vocabulary, which lie at other places of a vector than their gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    widths = (100, 1001, 17001) if small else (1000, 30522, 50257, 131072, 1000001)
    for width in widths:
        rows = 5 if small or width > 200000 else 77
        logits, target = draw(rows, width), torch.arange(rows, device=device) * 7919 % width
        target[1::5] = -100
        for name, options in OF_ROWS.items():
            yield Case(f"{name}, {rows} x {width}", _of_rows(target, options), [logits])
        yield Case(f"padded, {rows} x {width - 3}", _of_padded(target), [logits])
        yield Case(f"token_logprobs, {rows} x {width}", _of_tokens(target), [logits])
        teacher = draw(rows, width)
        for beta in (0.0, 0.5, 1.0):
            loss = _of_teacher(teacher, target, {"beta": beta, "temperature": 2.0})
            yield Case(f"kl_div_loss, beta {beta}, {rows} x {width}", loss, [logits])
        named, ids = teacher.log_softmax(1).topk(64)
        loss = _of_teacher(named - 0.01, target, {"teacher_ids": ids, "hard_weight": 0.5})
        yield Case(f"kl_div_loss, top 64, {rows} x {width}", loss, [logits])
    yield from _with_matmuls(draw, device, 40 if small else 1500)


def _of_rows(target: Tensor, options: dict[str, Any]) -> Loss:
    def loss(x: Tensor, backend: Any) -> Any:
        made: Any = neglog.cross_entropy(x * 1, target, backend=backend, **options)
        return made.loss if "return_stats" in options else made

    return loss


def _of_padded(target: Tensor) -> Loss:
    def loss(x: Tensor, backend: Any) -> Tensor:
        return neglog.cross_entropy(x[:, :-3], target.clamp(max=x.shape[1] - 4), backend=backend)

    return loss


def _of_tokens(target: Tensor) -> Loss:
    def loss(x: Tensor, backend: Any) -> Tensor:
        found = neglog.token_logprobs(x, target, backend=backend)
        return (found.logprob - 0.1 * found.entropy).mean()

    return loss


def _of_teacher(teacher: Tensor, target: Tensor, options: dict[str, Any]) -> Loss:
    def loss(x: Tensor, backend: Any) -> Tensor:
        # Else its gradients are among the smallest numbers of float16.
        return 64 * neglog.kl_div_loss(
            x, teacher, target, backend=backend, reduction="sum", **options
        )

    return loss


def _with_matmuls(draw: Callable[..., Tensor], device: str, rows: int) -> Iterator[Case]:
    x, w = draw(rows, 64), draw(2 * rows, 64)
    target = torch.arange(rows, device=device) * 3 % rows
    yield Case(
        "linear_cross_entropy",
        lambda x, w, backend: neglog.linear_cross_entropy(x, w, target, backend=backend),
        [x / 8, w],  # of larger logits 16 bits would keep too little
    )
    similar = {
        "clip_loss": lambda x, w, backend: neglog.clip_loss(x, w[: len(x)], 20.0, backend=backend),
        "siglip_loss": lambda x, w, backend: neglog.siglip_loss(
            x, w[: len(x)], 10.0, -5.0, backend=backend
        ),
        "info_nce": lambda x, w, backend: neglog.info_nce(
            x, w[: len(x)], w[len(x) :], 0.2, backend=backend
        ),
    }
    for name, loss in similar.items():
        yield Case(name, loss, [F.normalize(x), F.normalize(w)])


def run(case: Case, tensors: list[Tensor], upstream: float, backend: str | None) -> list[Tensor]:
    """The loss and the gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = case.loss(*leaves, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, leaves)]


def wrong(case: Case, dtype: torch.dtype, amount: int) -> str:
    """What is, or an empty string."""
    tensors = [tensor.to(dtype) for tensor in case.tensors]
    wide = [tensor.double() for tensor in tensors]
    limit, ones = TOLERANCE[dtype], run(case, wide, 1.0, "torch")
    for upstream in UPSTREAMS:
        torch.full((amount,), torch.nan, device=tensors[0].device)  # freed for the call's use
        found = run(case, tensors, upstream, None)
        factors = [1.0, *[upstream] * len(tensors)]
        for i, (one, other, factor) in enumerate(zip(found, ones, factors, strict=True)):
            expected = other * factor
            off = float((one.double() - expected).abs().max() / expected.abs().max())
            if not off <= limit:  # NaN too
                what = f"gradient {i}" if i else "loss"
                return (
                    f"{what} off by {off:.2g}, more than {limit:g}, for an upstream of {upstream}"
                )
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("neglog.bench.smoke", description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    state = dispatch.state("cuda")
    if options.device == "cuda" and not (state.usable and torch.cuda.is_available()):
        why = "torch finds no CUDA device" if state.usable else state.why
        print(f"neglog.bench.smoke: nothing to check: {why}", file=sys.stderr)
        return 2
    failed = 0
    for case in cases(options.device, options.small):
        for dtype in TOLERANCE:
            try:
                problem = wrong(case, dtype, 1000 if options.small else POISON)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
            failed += bool(problem)
            if problem:
                print(f"{case.name}, {dtype}: {problem}", flush=True)
            if "CUDA error" in problem:  # every later call would have the same
                return 1
        print(f"{case.name}: checked", flush=True)
    print(f"{failed} wrong" if failed else "all right")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
