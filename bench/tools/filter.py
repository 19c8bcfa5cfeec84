"""What linear_cross_entropy's filter_eps saves on a model that was trained, and what it costs.

python bench/tools/filter.py [task of the demo: clm, mlm] [steps]     clm and 300 by default
"""

import importlib
import sys
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

import neglog
from neglog.examples.demo.train import Training

THRESHOLDS = (0.0, 2.0**-16, 2.0**-12, 2.0**-10, 2.0**-8)
ROUNDS = 9


def gradients(head: tuple[Tensor, Tensor], target: Tensor, filter_eps: float) -> list[Tensor]:
    loss = neglog.linear_cross_entropy(*head, target, options={"filter_eps": filter_eps})
    return list(torch.autograd.grad(loss, head))


def share_that_counts(head: tuple[Tensor, Tensor], target: Tensor, filter_eps: float) -> float:
    """Of the classes, for all rows at once."""
    with torch.no_grad():
        gradient = torch.softmax((head[0] @ head[1].t()).float(), 1)
    gradient[torch.arange(len(target)), target] -= 1
    return (gradient.abs().amax(0) >= filter_eps).float().mean().item()


def report(head: tuple[Tensor, Tensor], target: Tensor) -> None:
    exact = gradients(head, target, 0.0)
    times: dict[float, list[float]] = {threshold: [] for threshold in THRESHOLDS}
    for _ in range(ROUNDS):
        for threshold in THRESHOLDS:
            start = perf_counter()
            gradients(head, target, threshold)
            times[threshold].append(perf_counter() - start)
    for threshold in THRESHOLDS:
        found = gradients(head, target, threshold)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        faster = median(a / b for a, b in zip(times[0.0], times[threshold], strict=True))
        print(
            f"{threshold:.1e}: {median(times[threshold]) * 1e3:7.1f} ms, {faster:.2f} times as "
            f"fast; {share_that_counts(head, target, threshold):4.0%} of the classes count; "
            f"error of the gradients {errors[0]:.1e} {errors[1]:.1e}"
        )


def main(name: str = "clm", steps: str = "300") -> None:
    task = importlib.import_module(f"neglog.examples.demo.{name}").load(False)
    training = Training(task, "neglog", 0)
    for _ in range(int(steps)):
        training.step()
    batch = next(training.batches)
    with torch.no_grad():
        features = task.features(training.model, batch)
    tokens = batch if name == "clm" else batch.tokens
    hidden, target = features[0].flatten(0, -2), tokens.flatten()
    print(f"{name}, {steps} steps, loss {training.losses[0]:.2f} to {training.losses[-1]:.2f}")
    for dtype in (torch.float32, torch.bfloat16):
        head = tuple(x.detach().to(dtype).requires_grad_() for x in (hidden, features[1]))
        print(f"{len(hidden)} x {hidden.shape[1]} x {len(features[1])} {dtype}")
        report(head, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
