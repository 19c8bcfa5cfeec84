"""The CUDA ops by themselves: held against the float64 oracle, then timed against torch.

python bench/device.py check [--device cuda] [--library build/cuda/neglog_cuda.so] [--small]
python bench/device.py time  [--library build/cuda/neglog_cuda.so] [--json FILE]
"""

import argparse
import json
import sys
from statistics import median

import torch
from torch.nn import functional as F

import neglog.functional  # noqa: F401 - registers the ops
from neglog import reference

# Relative to 1 + the largest number of the truth: losses are float32 for all but float64.
LOSS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
SMALL = ((1, 1), (2, 7), (7, 31), (5, 257), (3, 2049))
LARGE = (*SMALL, (64, 1000), (33, 50257), (300, 32000))
OPTIONS = {
    "plain": (0.0, 1.0, 0.0, 0.0),
    "smoothing": (0.1, 1.0, 0.0, 0.0),
    "all": (0.2, 0.7, 5.0, 0.1),
}
MEAN = 1
SHAPES = ((8192, 131072), (8192, 32000), (32768, 1000), (8192, 50257))


def case(shape: tuple, dtype: torch.dtype, probabilities: bool, device: str) -> tuple:
    """Logits at odd row strides, a target, and a class weight for index targets."""
    rows, vocab = shape
    generator = torch.Generator().manual_seed(rows + vocab)
    wide = torch.randn(rows, vocab + 3, generator=generator).mul_(3).to(dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(vocab, generator=generator).add_(0.5).to(real)
    if probabilities:
        target = torch.rand(rows, vocab, generator=generator).to(dtype)
    else:
        target = torch.randint(vocab, (rows,), generator=generator)
        target[1::5] = -100
    return wide.to(device)[:, 2:-1], target.to(device), weight.to(device)


def errors(logits, target, weight, options: tuple) -> tuple[float, float, float]:
    """Of the loss, the gradient, and the gradient in place."""
    smoothing, scale, softcap, z_loss = options
    values = (MEAN, -100, *options)
    truth = reference.nll(
        logits.double().cpu().numpy(), target.double().cpu().numpy()
        if target.dim() == 2 else target.cpu().numpy(), weight=weight.double().cpu().numpy(),
        label_smoothing=smoothing, logit_scale=scale, softcap=softcap or None, z_loss=z_loss,
    )  # fmt: skip
    ops = torch.ops.neglog
    loss, lse, low, total, _, _ = ops.nll(logits, target, weight, None, *values, True, "")
    upstream = torch.ones((), dtype=loss.dtype, device=loss.device)
    gradient = ops.nll_backward(
        upstream, None, logits, target, weight, lse, low, total, *values, ""
    )
    copy = logits.clone()
    ops.nll_(copy, target, weight, None, *values, False, "")
    if logits.dtype == torch.float16:
        copy = copy / total
    wanted = torch.from_numpy(truth.grad)

    def off(found):
        return float((found.double().cpu() - wanted).abs().max() / (1 + wanted.abs().max()))

    exact = float(truth.loss)
    return abs(float(loss) - exact) / (1 + abs(exact)), off(gradient), off(copy)


def check(device: str, small: bool) -> bool:
    """Every shape, dtype, kind of target and set of options; says what is wrong."""
    wrong = count = 0
    for shape in SMALL if small else LARGE:
        for dtype, allowed in GRADIENT.items():
            for name, options in OPTIONS.items():
                for probabilities in (False, True):
                    found = errors(*case(shape, dtype, probabilities, device), options)
                    limits = (LOSS[dtype], allowed, allowed)
                    count += 1
                    if not all(f <= limit for f, limit in zip(found, limits, strict=True)):
                        wrong += 1
                        print(
                            f"WRONG {shape} {dtype} {name} probabilities={probabilities}: {found}"
                        )
    print(f"check on {device}: {count} cases, {wrong} wrong")
    return wrong == 0


def milliseconds(run, rounds: int = 15) -> float:
    """Median by device events, after three calls that warm up."""
    times = []
    for index in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return median(times)


def times_of(rows: int, vocab: int, dtype: torch.dtype) -> dict:
    """Milliseconds of the copy, of torch, and of each op; passes each must make."""
    logits = torch.randn(rows, vocab, device="cuda", dtype=dtype)
    target = torch.randint(vocab, (rows,), device="cuda")
    other = torch.empty_like(logits)
    leaf = logits.clone().requires_grad_()
    values = (MEAN, -100, 0.0, 1.0, 0.0, 0.0)
    ops = torch.ops.neglog
    loss, lse, low, total, _, _ = ops.nll(logits, target, None, None, *values, False, "")
    upstream = torch.ones_like(loss)
    backward = (upstream, None, logits, target, None, lse, low, total, *values, "")

    def eager():
        torch.autograd.grad(F.cross_entropy(leaf, target), leaf)

    runs = {
        "copy": (lambda: other.copy_(logits), 2),
        "eager": (eager, 3),
        "forward": (lambda: ops.nll(logits, target, None, None, *values, False, ""), 1),
        "backward": (lambda: ops.nll_backward(*backward), 2),
        "in place": (lambda: ops.nll_(other, target, None, None, *values, False, ""), 2),
    }
    other.copy_(logits)
    found = {}
    for name, (run, passes) in runs.items():
        ms = milliseconds(run)
        found[name] = {"ms": ms, "passes": passes, "GB/s": passes * logits.nbytes / ms / 1e6}
    return found


def time(path: str | None) -> None:
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shapes": []}
    print(f"{report['device']}, torch {report['torch']}")
    for rows, vocab in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            found = times_of(rows, vocab, dtype)
            report["shapes"].append({"rows": rows, "vocab": vocab, "dtype": str(dtype)} | found)
            cells = (f"{name} {f['ms']:.3f} ms {f['GB/s']:.0f} GB/s" for name, f in found.items())
            print(f"{rows} x {vocab} {str(dtype)[6:]}: " + ", ".join(cells))
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("check", "time"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--library")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.library:
        torch.ops.load_library(options.library)
    if options.what == "check":
        return 0 if check(options.device, options.small) else 1
    time(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
