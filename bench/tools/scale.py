"""One step of clip_loss at a size whose similarities nobody could store; prints time and memory.

python bench/tools/scale.py [rows] [features]     262144 x 64 by default: minutes on two cores
"""

import sys
from time import perf_counter

import torch
from torch.nn import functional as F

import neglog
from neglog import dispatch
from neglog.bench import machine

MATMULS = 4  # scores twice, and the gradients of both sides


def main(rows: int = 262_144, features: int = 64) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(rows, features, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(14.3, requires_grad=True)
    start = perf_counter()
    with machine.PeakMemory() as peak, dispatch.record() as ran:
        loss = neglog.clip_loss(image, text, scale)
        middle = perf_counter()
        grads = torch.autograd.grad(loss, (image, text, scale))
    end = perf_counter()
    operations = MATMULS * 2 * rows**2 * features
    gradients = sum(grad.nbytes for grad in grads)
    print(f"{rows:,} x {features}, {', '.join(ran)}, loss {loss.item():.6f}")
    print(f"forward {middle - start:.1f} s, backward {end - middle:.1f} s")
    print(f"{operations / (end - start) / 1e9:.0f} GFLOP/s of {MATMULS} matmuls")
    print(f"similarities {rows**2 * 4 / 1e9:.0f} GB; gradients {gradients / 1e6:.0f} MB; ", end="")
    print("peak " + (f"{peak.extra / 1e6:.0f} MB" if peak.extra else "not known here"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
