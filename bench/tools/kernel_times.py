"""Microseconds of each CUDA kernel, by torch's profiler, and of the host for small calls.

python bench/tools/kernel_times.py

Forward and backward of losses at sizes of training, in bfloat16, with warm caches; then the host's
time to issue calls of 8 x 10 numbers, as a loop that waits for nothing.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import neglog

ROWS = ((8192, 131072), (8192, 50257), (8192, 32000), (32768, 1000))
LONGEST = 8  # kernels of a loss that are printed
CALLS = 200  # of the host's measurement

Call = Callable[[], object]


def gradient_of(loss: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Call:
    return lambda: torch.autograd.grad(loss(*leaves), leaves)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def of_rows(rows: int, vocab: int) -> Iterator[tuple[str, Call]]:
    """Losses of logits."""
    x, target = draw(rows, vocab), torch.randint(vocab, (rows,), device="cuda")

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return neglog.cross_entropy(x, target)

    def in_place(x: torch.Tensor) -> torch.Tensor:
        return neglog.cross_entropy(x * 1, target, inplace_backward=True)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        found = neglog.token_logprobs(x, target)
        return -(found.logprob + 0.01 * found.entropy).mean()

    yield "cross_entropy, forward", forward
    yield "cross_entropy", gradient_of(lambda x: neglog.cross_entropy(x, target), x)
    yield "cross_entropy, in place, with the product before it", gradient_of(in_place, x)
    yield "token_logprobs", gradient_of(tokens, x)
    teacher = draw(rows, vocab).detach()
    yield "kl_div_loss", gradient_of(lambda x: neglog.kl_div_loss(x, teacher), x)
    logs, ids = teacher.float().log_softmax(-1).topk(64)
    logs = (logs - 0.01).bfloat16()
    yield (
        "kl_div_loss, top 64",
        gradient_of(lambda x: neglog.kl_div_loss(x, logs, teacher_ids=ids), x),
    )


def with_matmuls() -> Iterator[tuple[str, Call]]:
    hidden, head = draw(4096, 4096), draw(128256, 4096).detach().div(64).requires_grad_()
    target = torch.randint(128256, (4096,), device="cuda")
    yield (
        "linear_cross_entropy 4096 x 4096 x 128256",
        gradient_of(lambda x, w: neglog.linear_cross_entropy(x, w, target), hidden, head),
    )
    image, text = (F.normalize(draw(65536, 768)).detach().requires_grad_() for _ in range(2))
    yield (
        "clip_loss 65536 x 768",
        gradient_of(lambda x, y: neglog.clip_loss(x, y, 100.0), image, text),
    )


def print_kernels(name: str, call: Call) -> None:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    rounds = 5
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
    print(f"\n{name}")
    kernels = [event for event in found.key_averages() if event.device_time_total]
    for event in sorted(kernels, key=lambda event: -event.device_time_total)[:LONGEST]:
        kernel = event.key.removeprefix("void ").replace("neglog::(anonymous namespace)::", "")
        times, calls = event.device_time_total / rounds, event.count / rounds
        print(f"{times:11.1f} us {calls:6.1f} x  {kernel[:90]}", flush=True)


def print_host_times() -> None:
    x = torch.randn(8, 10, device="cuda").requires_grad_()
    target, teacher = torch.arange(8, device="cuda"), torch.randn(8, 10, device="cuda")
    calls = {
        "F.cross_entropy": gradient_of(lambda x: F.cross_entropy(x, target), x),
        "cross_entropy": gradient_of(lambda x: neglog.cross_entropy(x, target), x),
        "token_logprobs": gradient_of(lambda x: neglog.token_logprobs(x, target).logprob.sum(), x),
        "kl_div_loss": gradient_of(lambda x: neglog.kl_div_loss(x, teacher), x),
    }
    print("\nthe host, forward and backward of 8 x 10")
    for name, call in calls.items():
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        print(f"{(time.perf_counter() - start) / CALLS * 1e6:11.1f} us  {name}", flush=True)
        torch.cuda.synchronize()


def main() -> int:
    if not torch.cuda.is_available():
        print("bench/tools/kernel_times.py: nothing to time: no CUDA device", file=sys.stderr)
        return 2
    for rows, vocab in ROWS:
        for name, call in of_rows(rows, vocab):
            print_kernels(f"{name}, {rows} x {vocab}", call)
        torch.cuda.empty_cache()
    for name, call in with_matmuls():
        print_kernels(name, call)
    print_host_times()
    return 0


if __name__ == "__main__":
    sys.exit(main())
