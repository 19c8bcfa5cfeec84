"""The CUDA ops timed on the GPU at hand, against torch and other libraries; goals come last.

python bench/device.py [--json FILE] [--seconds N] [--small]

--seconds: no case starts after so many; of 180 or more, 60 are kept for the last, a million pairs.
--small: sizes at which a run says only that everything runs. What is right is the tests' affair:
python -m pytest tests/test_cuda.py
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import goals
import report
import rivals
import torch
from measure import Clock, Row, Way, Ways, clear, failure, gradients, measured
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog import dispatch

DEVICE = "cuda"
NLL_SHAPES = (goals.LARGE, goals.IMAGES, goals.ODD, (8192, 32000))
LINEAR_SHAPES = ((goals.LINEAR, 1.0), (goals.LINEAR, 0.15))  # and the share that counts
SMALL_NLL, SMALL_LINEAR, SMALL_CLIP = ((64, 5000),), (((64, 32, 5000), 0.5),), (1024, 64)
SMALL_MILLION, SMALL_MATMUL = (4096, 64), 256
MEAN = 1
MILLION_SECONDS = 60.0
Rows = Iterator[Row]


def logits_and_target(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(shape, device=DEVICE, dtype=dtype)
    return logits, torch.randint(shape[1], shape[:1], device=DEVICE)


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def nll(shape: tuple[int, int], dtype: torch.dtype, clock: Clock) -> Rows:
    """One read forward; forward and gradient 2 reads and 1 write, in place 1 and 1."""
    logits, target = logits_and_target(shape, dtype)
    leaf, other = logits.clone().requires_grad_(), logits.clone()
    values = (MEAN, -100, 0.0, 1.0, 0.0, 0.0)
    cross_entropy, ops = neglog.cross_entropy, torch.ops.neglog  # the first registers the second
    case = partial(goals.nll_case, shape, dtype=str(dtype)[6:])

    def in_place() -> Tensor:  # of its own gradients after the first round: the same work
        return ops.nll_(other, target, None, None, *values, False, "")[0]

    forward = {
        "neglog": Way(lambda: ops.nll(logits, target, None, None, *values, False, "")),
        "torch eager": Way(lambda: F.cross_entropy(logits, target)),
    }
    both = {
        "neglog": gradients(lambda: cross_entropy(leaf, target), leaf),
        "torch eager": gradients(lambda: F.cross_entropy(leaf, target), leaf),
    }
    if dtype == torch.bfloat16:  # a compilation takes seconds
        quick = compiled(F.cross_entropy)
        forward["torch.compile"] = Way(lambda: quick(logits, target))
        both["torch.compile"] = gradients(lambda: quick(leaf, target), leaf)
    gigabytes = logits.nbytes / 1e9
    rates = ("GB/s", clock)
    copy = {"copy": Way(lambda: logits.clone())}
    yield from measured(case(), copy, 2 * gigabytes, *rates)
    yield from measured(case(goals.FORWARD), forward, gigabytes, *rates)
    yield from measured(case(goals.BOTH), both, 3 * gigabytes, *rates)
    own = {"neglog": Way(in_place, in_place)}
    yield from measured(case(goals.IN_PLACE), own, 2 * gigabytes, *rates)


def nll_rivals(shape: tuple[int, int], clock: Clock) -> Rows:
    logits, target = logits_and_target(shape, torch.bfloat16)
    leaf, gigabytes = logits.clone().requires_grad_(), logits.nbytes / 1e9
    for part, ways, passes in (
        (goals.BOTH, rivals.nll(leaf, target), 3),
        (goals.IN_PLACE, rivals.nll_in_place(logits, target), 2),
    ):
        yield from measured(goals.nll_case(shape, part), ways, passes * gigabytes, "GB/s", clock)


def linear_formula(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.t(), target)


def linear_ways(*leaves_and_target: Tensor) -> Ways:
    losses: dict[str, Callable[..., Tensor]] = {
        "neglog": neglog.linear_cross_entropy,
        "torch eager": linear_formula,
        "torch.compile": compiled(linear_formula),
    }
    if hasattr(F, "linear_cross_entropy"):  # new in torch 2.13
        losses["torch linear_cross_entropy"] = F.linear_cross_entropy
    return {
        name: gradients(partial(loss, *leaves_and_target), *leaves_and_target[:2])
        for name, loss in losses.items()
    }


def linear(shape: tuple[int, int, int], share: float, others: bool, clock: Clock) -> Rows:
    """3 matmuls of the rows that count."""
    rows, features, vocab = shape
    torch.manual_seed(0)
    x = torch.randn(rows, features, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, features, device=DEVICE) / features**0.5).bfloat16()
    weight.requires_grad_()
    target = torch.randint(vocab, (rows,), device=DEVICE)
    target[int(rows * share) :] = -100
    counted = int((target != -100).sum())
    ways = (rivals.linear if others else linear_ways)(x, weight, target)
    amount = 6 * counted * features * vocab / 1e12
    yield from measured(goals.linear_case(shape, share), ways, amount, "TFLOP/s", clock)


def clip_formula(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    z, target = scale * image @ text.t(), torch.arange(image.shape[0], device=image.device)
    return (F.cross_entropy(z, target) + F.cross_entropy(z.t(), target)) / 2


def clip_ways(image: Tensor, text: Tensor, scale: Tensor) -> Ways:
    losses: dict[str, Callable[..., Tensor]] = {
        "neglog": neglog.clip_loss,
        "torch eager": clip_formula,
        "torch.compile": compiled(clip_formula),
    }
    leaves = image, text, scale
    return {name: gradients(partial(loss, *leaves), *leaves) for name, loss in losses.items()}


def clip(shape: tuple[int, int], which: str, clock: Clock) -> Rows:
    """4 matmuls where the similarities are not kept. `which`: "torch", "others" or "once"."""
    torch.manual_seed(0)
    made = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    image, text = (F.normalize(x, dim=1).requires_grad_() for x in made)
    scale = torch.tensor(100.0, device=DEVICE, requires_grad=True)
    ways = (rivals.clip if which == "others" else clip_ways)(image, text, scale)
    if once := which == "once":
        ways = {"neglog": ways["neglog"]}
    amount = 8 * shape[0] ** 2 * shape[1] / 1e12
    yield from measured(goals.clip_case(shape), ways, amount, "TFLOP/s", clock, once)


def matmul(size: int, clock: Clock) -> Rows:
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ways = {"torch": Way(lambda: a @ b)}
    yield from measured(f"matmul {size} bfloat16", ways, 2 * size**3 / 1e12, "TFLOP/s", clock)


class Case(NamedTuple):
    name: str
    run: Callable[[Clock], Rows]
    needs: float = 5.0  # seconds, without which it does not start
    way: str = "neglog"


def cases(small: bool) -> list[Case]:
    """Ours, then other libraries, which may take the GPU down with them; a million pairs last."""
    nlls, linears = (SMALL_NLL, SMALL_LINEAR) if small else (NLL_SHAPES, LINEAR_SHAPES)
    pairs, million = (SMALL_CLIP, SMALL_MILLION) if small else (goals.CLIP, goals.MILLION)
    size = SMALL_MATMUL if small else 8192

    def of_nll(dtype: torch.dtype) -> list[Case]:
        name = str(dtype)[6:]
        return [Case(goals.nll_case(s, dtype=name), partial(nll, s, dtype)) for s in nlls]

    def of_linear(others: bool) -> list[Case]:
        return [Case(goals.linear_case(*s), partial(linear, *s, others)) for s in linears]

    def of_clip(which: str) -> Case:
        return Case(goals.clip_case(pairs), partial(clip, pairs, which))

    theirs = [
        *(Case(goals.nll_case(s), partial(nll_rivals, s)) for s in nlls),
        *of_linear(True),
        of_clip("others"),
    ]
    return [
        *of_nll(torch.bfloat16),
        *of_linear(False),
        of_clip("torch"),
        Case(f"matmul {size} bfloat16", partial(matmul, size), way="torch"),
        *of_nll(torch.float32),
        *(case._replace(way="others") for case in theirs),
        Case(goals.clip_case(million), partial(clip, million, "once"), MILLION_SECONDS),
    ]


def run(case: Case, clock: Clock) -> Rows:
    if (left := clock.left()) < case.needs:
        why = f"{max(left, 0):.0f} s left, {case.needs:.0f} needed"
        row = {"case": case.name, "way": case.way, "skipped": why}
        print(row, flush=True)
        yield row
        return
    torch.compiler.reset()  # each shape compiles anew, and eight of a function are the most
    try:
        yield from case.run(clock)
    except Exception as error:  # in what the case prepares: no memory, say
        row = {"case": case.name, "way": case.way, "failed": failure(error)}
        print(row, flush=True)
        yield row
    clear()


def rows_of(chosen: list[Case], clock: Clock) -> Rows:
    *before, last = chosen
    for case in before:
        if case.way != "others" or rivals.usable():  # imported here, when ours has been measured
            yield from run(case, clock)
    clock.kept = 0.0
    yield from run(last, clock)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    state = next(state for state in dispatch.describe() if state.name == "cuda")
    if not (state.usable and torch.cuda.is_available()):
        why = "torch finds no CUDA device" if state.usable else state.why
        print(f"bench/device.py: nothing to time: {why}", file=sys.stderr)
        return 2
    long = options.seconds is not None and options.seconds >= 3 * MILLION_SECONDS
    clock = Clock(options.seconds, kept=MILLION_SECONDS if long else 0.0)
    device, about, rows = torch.cuda.get_device_name(), report.versions(), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cut off: the table is printed
    try:
        for row in rows_of(cases(options.small), clock):
            rows.append(row)
            if options.json:  # after each: a later one may be killed
                report.write(options.json, device, about, rows)
    finally:
        report.tell(rows, device, options.small)
    return int(any("failed" in row and row["way"] == "neglog" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
