"""The CUDA ops timed against torch on the GPU at hand; the table comes last.

python bench/device.py [--json FILE] [--small]

--small: sizes at which a run says only that everything runs. What is right is the tests' affair:
python -m pytest tests/test_cuda.py
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch.nn import functional as F

import neglog
from neglog import dispatch

ROUNDS = 15
NLL_SHAPES = ((8192, 131072), (8192, 32000), (32768, 1000), (8192, 50257))
LINEAR_SHAPES = ((4096, 4096, 128256, 1.0), (4096, 4096, 128256, 0.15))  # and the share that counts
CLIP_SHAPES = ((65536, 768),)
SMALL_NLL, SMALL_LINEAR, SMALL_CLIP = ((64, 5000),), ((64, 32, 5000, 0.5),), ((1024, 64),)
MEAN = 1
Runs = dict[str, Callable[[], object]]


def milliseconds(run: Callable[[], object]) -> float:
    """Median by device events, after three calls that warm up."""
    times = []
    for index in range(ROUNDS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return median(times)


def peak_megabytes(run: Callable[[], object]) -> float:
    """The most a call holds at once, beyond what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measured(name: str, runs: Runs, amount: float, unit: str) -> list[dict]:
    """`amount` is what a run moves or computes at the least: giga-bytes or tera-operations."""
    rows = []
    for way, run in runs.items():
        try:
            ms = milliseconds(run)
            row = {"ms": ms, unit: amount / ms * 1e3, "peak MB": peak_megabytes(run)}
        except Exception as error:  # the others are measured all the same
            torch.cuda.empty_cache()
            print(f"{name}, {way}: {type(error).__name__}: {error}", file=sys.stderr)
            row = {"ms": float("inf"), unit: 0.0, "peak MB": float("inf")}
        rows.append({"case": name, "way": way, **row})
        print(rows[-1], flush=True)
    return rows


def nll(rows: int, vocab: int, dtype: torch.dtype) -> list[dict]:
    """One read forward; forward and gradient 2 reads and 1 write, in place 1 and 1."""
    logits = torch.randn(rows, vocab, device="cuda", dtype=dtype)
    leaf = logits.clone().requires_grad_()
    torch._dynamo.reset()  # each shape compiles anew, and eight of a function are the most
    target = torch.randint(vocab, (rows,), device="cuda")
    other = torch.empty_like(logits)
    values = (MEAN, -100, 0.0, 1.0, 0.0, 0.0)
    ops = torch.ops.neglog
    compiled = torch.compile(F.cross_entropy, fullgraph=True, dynamic=False)
    gigabytes = logits.nbytes / 1e9
    name = f"{rows} x {vocab} {str(dtype)[6:]}"

    def gradient(loss: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(leaf, target), leaf)

    def in_place() -> object:  # of its own gradients after the first round: the same work
        return ops.nll_(other, target, None, None, *values, False, "")

    other.copy_(logits)
    with_compile = dtype == torch.bfloat16  # a compilation takes seconds
    forward = {
        "torch eager": lambda: F.cross_entropy(logits, target),
        "torch.compile": lambda: compiled(logits, target),
        "neglog": lambda: ops.nll(logits, target, None, None, *values, False, ""),
    }
    both = {
        "torch eager": gradient(F.cross_entropy),
        "torch.compile": gradient(compiled),
        "neglog": gradient(neglog.cross_entropy),
    }
    if not with_compile:
        del forward["torch.compile"], both["torch.compile"]
    return [
        *measured(name, {"copy": lambda: leaf.data.clone()}, 2 * gigabytes, "GB/s"),
        *measured(f"nll {name} forward", forward, gigabytes, "GB/s"),
        *measured(f"nll {name} forward, backward", both, 3 * gigabytes, "GB/s"),
        *measured(f"nll {name} in place", {"neglog": in_place}, 2 * gigabytes, "GB/s"),
    ]


def linear(rows: int, features: int, vocab: int, share: float) -> list[dict]:
    """3 matmuls of the rows that count."""
    x = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, features, device="cuda") / features**0.5).bfloat16()
    weight.requires_grad_()
    target = torch.randint(vocab, (rows,), device="cuda")
    target[int(rows * share) :] = -100
    counted = int((target != -100).sum())

    def gradients(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), (x, weight))

    runs = {
        "torch eager": gradients(lambda: F.cross_entropy(x @ weight.t(), target)),
        "torch linear_cross_entropy": gradients(lambda: F.linear_cross_entropy(x, weight, target)),
        "neglog": gradients(lambda: neglog.linear_cross_entropy(x, weight, target)),
    }
    if not hasattr(F, "linear_cross_entropy"):
        del runs["torch linear_cross_entropy"]  # new in torch 2.13
    name = f"linear {rows} x {features} x {vocab} bfloat16, {share:.0%} counted"
    return measured(name, runs, 6 * counted * features * vocab / 1e12, "TFLOP/s")


def clip(rows: int, features: int) -> list[dict]:
    """4 matmuls where the similarities are not kept."""
    made = (torch.randn(rows, features, device="cuda") for _ in range(2))
    image, text = (F.normalize(x, dim=1).bfloat16().requires_grad_() for x in made)
    scale = torch.tensor(100.0, device="cuda", requires_grad=True)
    leaves = (image, text, scale)

    def one_matrix() -> torch.Tensor:
        z, target = scale * image @ text.t(), torch.arange(rows, device="cuda")
        return (F.cross_entropy(z, target) + F.cross_entropy(z.t(), target)) / 2

    runs = {
        "torch eager": lambda: torch.autograd.grad(one_matrix(), leaves),
        "neglog": lambda: torch.autograd.grad(neglog.clip_loss(*leaves), leaves),
    }
    name = f"clip_loss {rows} x {features} bfloat16"
    return measured(name, runs, 8 * rows**2 * features / 1e12, "TFLOP/s")


def matmul() -> list[dict]:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    runs: Runs = {"torch": lambda: a @ b}
    return measured("matmul 8192 bfloat16", runs, 2 * 8192**3 / 1e12, "TFLOP/s")


def table(rows: list[dict]) -> None:
    for row in rows:
        rate = next(f"{row[unit]:.0f} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in row)
        print(f"{row['case']:<56} {row['way']:<28} {row['ms']:>9.3f} ms {rate:>14} "
              f"{row['peak MB']:>9.0f} MB")  # fmt: skip


def cases(small: bool) -> list[Callable[[], list[dict]]]:
    return [
        matmul,
        *(partial(linear, *shape) for shape in (SMALL_LINEAR if small else LINEAR_SHAPES)),
        *(partial(clip, *shape) for shape in (SMALL_CLIP if small else CLIP_SHAPES)),
        *(
            partial(nll, *shape, dtype)
            for dtype in (torch.bfloat16, torch.float32)
            for shape in (SMALL_NLL if small else NLL_SHAPES)
        ),
    ]


def write(path: str, rows: list[dict]) -> None:
    report = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "CUDA": torch.version.cuda,
                     "neglog": neglog.__version__},
        "rows": rows,
    }  # fmt: skip
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    state = next(state for state in dispatch.describe() if state.name == "cuda")
    if not (state.usable and torch.cuda.is_available()):
        why = "torch finds no CUDA device" if state.usable else state.why
        print(f"bench/device.py: nothing to time: {why}", file=sys.stderr)
        return 2
    rows: list[dict] = []
    for case in cases(options.small):
        rows += case()
        if options.json:  # after each: what comes later may be cut off
            write(options.json, rows)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
